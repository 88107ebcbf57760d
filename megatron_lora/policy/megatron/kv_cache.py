"""A KV cache around the training model's own attention layers, and what recurrent mixers carry (`mixer_cache.py`).

While `cached_attention` is open, every layer's core attention is a `CachedAttention` and rotary embeddings follow each
token's own position. The model is then called with new tokens only, as one flat sequence [T, 1, hidden] in which any
token may belong to any row: nothing but the core attention knows about rows, so sequence parallelism, pipeline stages
and adapters work as in training, and prompts of different lengths need no padding.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from megatron_lora.policy.lanes import LaneStep, whole_reads
from megatron_lora.policy.megatron.mixer_cache import CachedMixer
from megatron_lora.policy.megatron.recurrent_mixer import RecurrentMixer
from megatron_lora.runtime.native_layers import NativeAttention, plain_attention
from megatron_lora.runtime.rotary import picked, rotary_modules
from megatron_lora.runtime.shared_attention import LARGEST_HEAD_DIM, shared_attention


def row_bytes(chunks: Sequence[GPTModel], capacity: int) -> int:
    """What one row of up to `capacity` tokens keeps on this rank."""
    mixers: list[Any] = [layer.self_attention for chunk in chunks for layer in chunk.decoder.layers]
    attentions = [mixer for mixer in mixers if hasattr(mixer, "core_attention")]
    widths = [a.num_query_groups_per_partition * (a.key_hidden_size + a.val_hidden_size) for a in attentions]
    carried = sum(mixer.row_bytes() for mixer in mixers if isinstance(mixer, RecurrentMixer))
    return carried + sum(widths) * whole_reads(capacity) * chunks[0].config.params_dtype.itemsize


class CacheSession:
    """The caches of all layers of this rank. step: what the model is being called with."""

    def __init__(self, num_slots: int, capacity: int, max_position: int):
        self.num_slots = num_slots
        self.capacity = whole_reads(capacity)
        self.max_position = max_position
        self.layers: list[CachedAttention | CachedMixer] = []
        self.step: LaneStep | None = None

    def copy(self, lane: int, sources: list[int], targets: list[int], length: int) -> None:
        """Put the first `length` keys and values of the source slots into the target slots, none of which is both, and
        what their rows carry."""
        if not self.layers:
            return  # a stage of MLPs alone
        device = self.layers[0].lanes[lane][0].device
        read, written = (torch.tensor(slots, device=device) for slots in (sources, targets))
        for layer in self.layers:
            layer.copy(lane, read, written, length)


class CachedAttention(torch.nn.Module):
    """Core attention that keeps each row's keys and values.

    attention: holds the layer's scale and window, and attends within whole prompts. lanes: lane number ->
    (keys, values), each [slots, groups, capacity, d], with rotary positions applied.
    """

    def __init__(self, attention: NativeAttention, session: CacheSession):
        super().__init__()
        self.attention = attention
        self.session = session
        self.lanes: dict[int, tuple[Tensor, Tensor]] = {}

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        """query [T, 1, heads, d], key, value [T, 1, groups, d] of the session's step -> [T, 1, heads * d]."""
        step = self.session.step
        assert step is not None
        out = query.new_zeros(query.shape[0], 1, query.shape[2] * value.shape[3])
        if step.lengths:
            keys, values = self._lane(step.lane, key, value)
            attend = self._decode if step.decoding else self._prefill
            attend(step, query, key, value, keys, values, out)
        return out

    def copy(self, lane: int, read: Tensor, written: Tensor, length: int) -> None:
        """Put the first `length` keys and values of the slots `read` into the slots `written`."""
        for tensor in self.lanes[lane]:
            part = tensor[:, :, :length]
            part.index_copy_(0, written, part.index_select(0, read))

    def _lane(self, lane: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        if lane not in self.lanes:
            slots, capacity = self.session.num_slots, self.session.capacity
            # Zeros, because a masked weight of zero times a NaN left in memory would be NaN.
            self.lanes[lane] = (
                key.new_zeros(slots, key.shape[2], capacity, key.shape[3]),
                value.new_zeros(slots, value.shape[2], capacity, value.shape[3]),
            )
        return self.lanes[lane]

    def _prefill(
        self, step: LaneStep, query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, out: Tensor
    ) -> None:
        total = step.ends[-1]
        positions = step.positions[:total]
        keys[step.slot_of_token, :, positions] = key[:total, 0]
        values[step.slot_of_token, :, positions] = value[:total, 0]
        if self._has_kernel(query, value):
            q, k, v = query[:total, 0], key[:total, 0], value[:total, 0]
            attended = shared_attention(q, k, v, step.prompts, self.attention.scale, self.attention.window)
            out[:total, 0] = attended.flatten(1)
            return
        for length, end in zip(step.lengths, step.ends, strict=True):
            part = slice(end - length, end)
            out[part] = self.attention(query[part], key[part], value[part])

    def _has_kernel(self, query: Tensor, value: Tensor) -> bool:
        """Whether one flash-attention call serves the prompts of all rows."""
        plain = self.attention.softcap is None and self.attention.softmax_offset is None
        fits = query.shape[-1] == value.shape[-1] <= LARGEST_HEAD_DIM
        return query.is_cuda and query.dtype != torch.float32 and plain and fits

    def _decode(
        self, step: LaneStep, query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, out: Tensor
    ) -> None:
        rows = len(step.lengths)
        positions = step.positions[:rows]
        keys[step.slots, :, positions] = key[:rows, 0]
        values[step.slots, :, positions] = value[:rows, 0]
        keys, values = keys[step.span, :, : step.longest], values[step.span, :, : step.longest]
        out[:rows, 0] = self._attend(query[:rows, 0], keys, values, step.distance)

    def _attend(self, query: Tensor, keys: Tensor, values: Tensor, distance: Tensor) -> Tensor:
        """query [n, heads, d], keys, values [n, groups, L, d], distance [n, L] -> [n, heads * d]."""
        attention = self.attention
        visible = distance >= 0
        if attention.window is not None:
            visible &= distance < attention.window
        visible = visible[:, None, None, :]
        # A group's query heads take the place of query positions: its keys are then read once, not once a head.
        query = query.unflatten(1, (keys.shape[1], -1))
        scale = attention.scale if attention.scale is not None else query.shape[-1] ** -0.5
        mask = visible.expand(-1, -1, query.shape[2], -1)
        sinks = attention.softmax_offset
        if attention.softcap is not None or sinks is not None:
            sinks = None if sinks is None else sinks.unflatten(0, (keys.shape[1], -1))
            return plain_attention(query, keys, values, mask, scale, attention.softcap, sinks).flatten(1)
        return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=scale).flatten(1)


@contextmanager
def cached_attention(
    chunks: Sequence[GPTModel], *, num_slots: int, capacity: int, max_position: int
) -> Iterator[CacheSession]:
    """Put KV caches around the layers of these chunks; the layers are as before, and the caches gone, afterwards.

    num_slots: rows a lane. capacity: tokens a row. max_position: a bound on positions that stays the same from call to
    call (rotary tables are kept per bound).
    """
    session = CacheSession(num_slots, capacity, max_position)
    with ExitStack() as restore:
        for chunk in chunks:
            for rotary in rotary_modules(chunk):
                rotary.forward = partial(_rotary_at_positions, rotary.forward, session)
                restore.callback(delattr, rotary, "forward")
            for layer in chunk.decoder.layers:
                attention: Any = layer.self_attention
                if isinstance(attention, RecurrentMixer):
                    attention.cache = CachedMixer(session)
                    session.layers.append(attention.cache)
                    restore.callback(delattr, attention, "cache")
                    continue
                if not hasattr(attention, "core_attention"):
                    continue  # a hybrid's MLP
                original = attention.core_attention
                cached = CachedAttention(_native(attention), session)
                session.layers.append(cached)
                restore.callback(setattr, attention, "core_attention", original)
                attention.core_attention = cached
        yield session


def _native(attention: Any) -> NativeAttention:
    """A layer's core attention in plain PyTorch: itself, or with the settings of Transformer Engine's."""
    core = attention.core_attention
    if isinstance(core, NativeAttention):
        return core
    native = NativeAttention(
        core.config,
        attention.layer_number,
        attention.attn_mask_type,
        attention.attention_type,
        # Latent attention has its own.
        softmax_scale=getattr(attention, "softmax_scale", attention.config.softmax_scale),
    )
    return native.eval()


def _rotary_at_positions(table: Callable[..., Any], session: CacheSession, *_: Any, **__: Any) -> Any:
    """Rotary angles [..., T, 1, 1, d] of the step's positions, in place of those of 0 to T - 1."""
    assert session.step is not None
    return picked(table(session.max_position, packed_seq=True), session.step.positions)
