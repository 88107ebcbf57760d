"""Micro-batches stretched to few shapes, for what is recorded once a shape: CUDA graphs.

What fills up stands behind the micro-batch's own tokens and targets, in segments of its own, so that nothing it is
followed by changes a number: who reads the model's output takes the first targets only.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_lora.data.batch import MicroBatch, SharedKeys
from megatron_lora.data.packing import round_up

# Sizes are multiples of the power of two at or below them divided by this: tokens cost time, keys and targets little.
TOKEN_PARTS, OTHER_PARTS = 8, 4
LEAST_MULTIPLE, LEAST_SEGMENTS, LEAST_LENGTH = 64, 8, 64


@dataclass(frozen=True)
class FixedShape:
    """tokens: T. segments: of queries. longest: tokens of one segment or row at most. targets: N; keys: K;
    longest_keys: keys of one segment at most. Those three are 0 where rows share no prefixes: each token then has its
    target and its key."""

    tokens: int
    segments: int
    longest: int
    targets: int = 0
    keys: int = 0
    longest_keys: int = 0

    @property
    def shares(self) -> bool:
        return self.keys > 0


def fixed_shape(batch: MicroBatch) -> FixedShape:
    """The smallest shape of the few that holds the micro-batch."""
    used = batch.tokens.numel()
    tokens = _stepped(used, TOKEN_PARTS)
    longest = _power_of_two(max(batch.max_seqlen, LEAST_LENGTH))
    shared = batch.shared_keys
    if shared is None:
        segments = len(batch.bounds) - 1 + len(_pieces(tokens - used, longest))
        return FixedShape(tokens, _power_of_two(max(segments, LEAST_SEGMENTS)), longest)
    if tokens == used:
        # Keys that fill up need a query.
        tokens = _stepped(used + 1, TOKEN_PARTS)
    num_keys, filling = shared.index.numel(), tokens - used
    keys = _stepped(num_keys + filling, OTHER_PARTS)
    return FixedShape(
        tokens=tokens,
        segments=_power_of_two(max(len(shared.query_bounds), LEAST_SEGMENTS)),
        longest=_power_of_two(max(longest, shared.max_queries, filling)),
        targets=_stepped(batch.targets.numel(), OTHER_PARTS),
        keys=keys,
        longest_keys=_power_of_two(max(shared.max_keys, keys - num_keys)),
    )


def stretched(batch: MicroBatch, shape: FixedShape, pad_token_id: int) -> MicroBatch:
    """The micro-batch in a shape that `fixed_shape` gave for it. Its rows' own numbers (fields, indices) are those of
    the micro-batch, unstretched: they are for objectives, which see only its own targets."""
    used = batch.tokens.numel()
    filling = shape.tokens - used
    device = batch.tokens.device
    tokens = _filled(batch.tokens, shape.tokens, pad_token_id)
    tail = torch.arange(filling, device=device)
    if batch.shared_keys is not None:
        keys = _stretched_keys(batch.shared_keys, used, shape, device)
        return replace(
            batch,
            tokens=tokens,
            positions=torch.cat([batch.positions, tail]),
            targets=_filled(batch.targets, shape.targets, pad_token_id),
            sources=_filled(_tensor(batch.sources), shape.targets, shape.tokens - 1),
            cu_seqlens=keys.cu_queries,
            bounds=keys.query_bounds,
            max_seqlen=shape.longest,
            shared_keys=keys,
        )
    pieces = _pieces(filling, shape.longest)
    ends = [used + sum(pieces[: number + 1]) for number in range(len(pieces))]
    ends += [shape.tokens] * (shape.segments + 1 - len(batch.bounds) - len(ends))
    return replace(
        batch,
        tokens=tokens,
        positions=torch.cat([batch.positions, tail % shape.longest]),
        targets=_filled(batch.targets, shape.tokens, pad_token_id),
        cu_seqlens=_joined(batch.cu_seqlens, ends),
        bounds=[*batch.bounds, *ends],
        max_seqlen=shape.longest,
    )


def _stretched_keys(keys: SharedKeys, used: int, shape: FixedShape, device: torch.device) -> SharedKeys:
    """One more segment of the tokens that fill up, which see themselves, the first of them as often as keys are to be
    filled up; then segments of nothing."""
    filling = shape.tokens - used
    repeated = shape.keys - keys.index.numel() - filling
    own = torch.arange(used, shape.tokens, device=device)
    empty = shape.segments - len(keys.query_bounds)
    queries, ends = [shape.tokens] * (1 + empty), [shape.keys] * (1 + empty)
    return SharedKeys(
        index=torch.cat([keys.index, own[:1].expand(repeated), own]),
        query_bounds=[*keys.query_bounds, *queries],
        key_bounds=[*keys.key_bounds, *ends],
        cu_queries=_joined(keys.cu_queries, queries),
        cu_keys=_joined(keys.cu_keys, ends),
        max_queries=shape.longest,
        max_keys=shape.longest_keys,
    )


def _pieces(number: int, longest: int) -> list[int]:
    """Tokens that fill up, cut into segments."""
    whole, rest = divmod(number, longest)
    return [longest] * whole + [rest] * (rest > 0)


def _stepped(number: int, parts: int) -> int:
    return round_up(number, max(LEAST_MULTIPLE, (1 << (number.bit_length() - 1)) // parts))


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()


def _filled(values: Tensor, size: int, fill: int) -> Tensor:
    return torch.cat([values, values.new_full((size - values.numel(),), fill)])


def _joined(bounds: Tensor, ends: list[int]) -> Tensor:
    return torch.cat([bounds, torch.tensor(ends, dtype=bounds.dtype).to(bounds.device)])


def _tensor(value: Tensor | None) -> Tensor:
    assert value is not None
    return value
