"""Plain PyTorch layers with the parameters, names and arguments of Transformer Engine's.

They stand in for Transformer Engine where there is no GPU (see `transformer_engine.py`), so a model has the same
modules and parameter names on both. The core attention also serves a GPU in fp32, which Transformer Engine's fused
attention does not offer.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention, make_sharded_tensors_for_checkpoint
from torch import Tensor

from megatron_lora.runtime.context_parallel import local_token_indices


def apply_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, normalization: str, eps: float, zero_centered_gamma: bool
) -> Tensor:
    """RMSNorm or LayerNorm over the last dimension; `zero_centered_gamma` scales by 1 + weight (Gemma)."""
    if zero_centered_gamma:
        weight = 1.0 + weight
    if normalization == "RMSNorm":
        return F.rms_norm(x, weight.shape, weight, eps)
    return F.layer_norm(x, weight.shape, weight, bias, eps)


class NativeNorm(torch.nn.Module):
    """Transformer Engine's norm in plain PyTorch; works on a sequence-parallel shard as on the whole."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, has_residual: bool = False):
        super().__init__()
        self.config = config
        self.eps = eps
        start = torch.zeros if config.layernorm_zero_centered_gamma else torch.ones
        self.weight = torch.nn.Parameter(start(hidden_size, dtype=config.params_dtype))
        self.bias = None
        if config.normalization == "LayerNorm":
            self.bias = torch.nn.Parameter(torch.zeros(hidden_size, dtype=config.params_dtype))
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        config = self.config
        return apply_norm(
            x, self.weight, self.bias, config.normalization, self.eps, config.layernorm_zero_centered_gamma
        )


class NativeLayerNormColumnParallelLinear(ColumnParallelLinear):
    """A norm and the column-parallel linear behind it in one module, with Transformer Engine's parameter names."""

    def __init__(self, input_size: int, output_size: int, *, config: TransformerConfig, **kwargs: Any):
        super().__init__(input_size, output_size, config=config, **kwargs)
        norm = NativeNorm(config, input_size, eps=config.layernorm_epsilon)
        self.eps = norm.eps
        self.layer_norm_weight = norm.weight
        self.layer_norm_bias = norm.bias

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:  # type: ignore[override]
        config = self.config
        x = apply_norm(
            x,
            self.layer_norm_weight,
            self.layer_norm_bias,
            config.normalization,  # type: ignore[attr-defined]
            self.eps,
            config.layernorm_zero_centered_gamma,  # type: ignore[attr-defined]
        )
        return super().forward(x, *args, **kwargs)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {"weight": 0, "bias": 0},
            sharded_offsets,
            tp_group=self.tp_group,  # type: ignore[arg-type]
            dp_cp_group=(metadata or {})["dp_cp_group"],
        )


class NativeColumnParallelLinear(ColumnParallelLinear):
    """Column-parallel linear under the name that stands for Transformer Engine's."""


class NativeRowParallelLinear(RowParallelLinear):
    """Row-parallel linear under the name that stands for Transformer Engine's."""


class NativeLinear(torch.nn.Module):
    """Transformer Engine's linear that every tensor-parallel rank holds whole (`parallel_mode="duplicated"`)."""

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        parallel_mode: str | None,
        config: TransformerConfig,
        bias: bool,
        **_: Any,
    ):
        super().__init__()
        assert parallel_mode == "duplicated" and not bias
        self.config = config
        self.weight = torch.nn.Parameter(torch.empty(output_size, input_size, dtype=config.params_dtype))

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return F.linear(x, self.weight), None


@dataclass
class RoutedParams(PackedSeqParams):
    """A packed micro-batch. routed_experts: [this rank's tokens, layers, k] of `data.batch.MicroBatch`, None where its
    routers choose."""

    routed_experts: Tensor | None = None


@dataclass
class SharedPrefixParams(RoutedParams):
    """A micro-batch whose rows share prefixes. shared_keys: `data.batch.SharedKeys`, which core attention goes by; the
    other fields describe all tokens as one sequence, which is what rotary embeddings given token by token want."""

    shared_keys: Any = None


class NativeAttention(torch.nn.Module):
    """Core attention over packed sequences, causal within each, with GQA, sliding window, capped scores and context
    parallelism, or with prefixes that rows share.

    query [T, heads, d], key and value [T, groups, d] with `packed_seq_params` (T is the local part under context
    parallelism); without it query [S, B, heads, d] and key, value [S_kv, B, groups, d], the query being the last S of
    the S_kv positions. Returns [T, heads * d] or [S, B, heads * d]. Under context parallelism keys and values are
    gathered over the group: simple, exact, and as much memory as one rank holds without it.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        pg_collection: Any = None,
        **_: Any,
    ):
        super().__init__()
        self.config = config
        self.layer_number = layer_number
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.scale = softmax_scale if softmax_scale is not None else config.softmax_scale
        self.window = layer_window(config, layer_number)
        self.softcap: float | None = getattr(config, "attn_logit_softcapping", None)
        self.softmax_offset: torch.nn.Parameter | None = None
        if config.softmax_type == "learnable":
            heads = config.num_attention_heads // config.tensor_model_parallel_size
            self.softmax_offset = torch.nn.Parameter(torch.zeros(heads, dtype=config.params_dtype))
        self.cp_group = pg_collection.cp if pg_collection is not None else None

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        if packed_seq_params is None:
            out = self._attend(query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1))
            return out.transpose(0, 1).flatten(2)
        if isinstance(packed_seq_params, SharedPrefixParams):
            return self._shared(query, key, value, packed_seq_params.shared_keys).flatten(1)
        cu_seqlens = packed_seq_params.cu_seqlens_q
        cp_size = self.cp_group.size() if self.cp_group is not None else 1
        if cp_size == 1:
            return self._packed(query, key, value, cu_seqlens.tolist()).flatten(1)
        return self._context_parallel(query, key, value, cu_seqlens, cp_size).flatten(1)

    def _packed(self, query: Tensor, key: Tensor, value: Tensor, bounds: list[int]) -> Tensor:
        pieces = [
            self._attend(query[None, a:b], key[None, a:b], value[None, a:b])[0]
            for a, b in zip(bounds, bounds[1:], strict=False)
            if b > a
        ]
        return torch.cat(pieces)

    def _shared(self, query: Tensor, key: Tensor, value: Tensor, shared: Any) -> Tensor:
        """Each segment of queries over the keys that it sees, of which its own are the last."""
        key, value = key[shared.index], value[shared.index]
        queries, keys = pairwise(shared.query_bounds), pairwise(shared.key_bounds)
        pieces = [
            self._attend(query[None, a:b], key[None, c:d], value[None, c:d])[0]
            for (a, b), (c, d) in zip(queries, keys, strict=True)
        ]
        return torch.cat(pieces)

    def _context_parallel(self, query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, cp_size: int) -> Tensor:
        group = self.cp_group
        assert group is not None
        indices = [local_token_indices(cu_seqlens, cp_size, rank) for rank in range(cp_size)]
        order = torch.argsort(torch.cat(indices))
        key = gather_from_sequence_parallel_region(key, group=group)[order]
        value = gather_from_sequence_parallel_region(value, group=group)[order]
        mine = indices[group.rank()]
        out = torch.empty_like(query)
        bounds = cu_seqlens.tolist()
        pieces, places = [], []
        for a, b in zip(bounds, bounds[1:], strict=False):
            local = torch.nonzero((mine >= a) & (mine < b)).flatten()
            if local.numel():
                positions = mine[local] - a
                pieces.append(self._attend(query[None, local], key[None, a:b], value[None, a:b], positions)[0])
                places.append(local)
        out = torch.cat(pieces)
        return out[torch.argsort(torch.cat(places))]

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, positions: Tensor | None = None) -> Tensor:
        """query [B, S, heads, d], key/value [B, S_kv, groups, d] -> [B, S, heads, d]; causal by position."""
        queries, keys = query.shape[1], key.shape[1]
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        scale = self.scale if self.scale is not None else query.shape[-1] ** -0.5
        dropout = self.dropout if self.training else 0.0
        simple = positions is None and queries == keys and (self.window is None or keys <= self.window)
        if simple and self.softcap is None and self.softmax_offset is None:
            out = F.scaled_dot_product_attention(
                query, key, value, dropout_p=dropout, is_causal=True, scale=scale, enable_gqa=True
            )
            return out.transpose(1, 2)
        if positions is None:
            positions = torch.arange(keys - queries, keys, device=query.device)
        distance = positions[:, None] - torch.arange(keys, device=query.device)[None, :]
        visible = distance >= 0
        if self.window is not None:
            visible &= distance < self.window
        if self.softcap is not None or self.softmax_offset is not None:
            sinks = None if self.softmax_offset is None else self.softmax_offset[:, None]
            return plain_attention(query, key, value, visible, scale, self.softcap, sinks).transpose(1, 2)
        out = F.scaled_dot_product_attention(
            query, key, value, attn_mask=visible, dropout_p=dropout, scale=scale, enable_gqa=True
        )
        return out.transpose(1, 2)


def plain_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visible: Tensor,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention that torch's own does not compute. query [B, heads, S, d], key and value [B, groups, S_kv, d], visible
    [S, S_kv] -> [B, heads, S, d].

    softcap: scores x become softcap tanh(x / softcap) (Gemma 2, arXiv 2408.00118, section 2). sinks: of each head
    ([heads, 1] or [heads, S]), a score beside the keys' that takes its part of the softmax and gives nothing (GPT-OSS,
    arXiv 2508.10925, section 2.2).
    """
    repeats = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(repeats, 1) for x in (key, value))
    if softcap is None:
        scores = query @ key.transpose(-1, -2) * scale
    else:
        scores = softcap * torch.tanh(query @ key.transpose(-1, -2) * (scale / softcap))
    scores = scores.masked_fill(~visible, float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks[..., None].to(scores.dtype).expand(*scores.shape[:-1], 1)], -1)
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    return weights[..., : value.shape[-2]] @ value


def layer_window(config: TransformerConfig, layer_number: int) -> int | None:
    """How many positions back, itself included, a token of this layer (counted from 1) sees; None for all."""
    window = config.window_size
    if window is None or not is_layer_window_attention(window, config.window_attn_skip_freq, layer_number):  # type: ignore[arg-type]
        return None
    return None if window[0] < 0 else window[0] + 1
