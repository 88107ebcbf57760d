"""Rows that begin alike: which they are, and the micro-batch that holds what they share once.

The G answers of a GRPO group have their prompt in common, a DPO pair has its own. Sent through the model once, P + G R
tokens take the place of G (P + R). The numbers are the same: each row's tokens keep their positions, see the same keys
and predict the same targets (`MicroBatch`, `SharedKeys`); gradients of the shared tokens are the sum over their rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from megatron_lora.data.batch import MicroBatch, Row, SharedKeys
from megatron_lora.data.packing import (
    collate_row_fields,
    field_names,
    padded_group_lengths,
    round_up,
    routed_experts,
)

Groups = Sequence[Sequence[Row]]


@dataclass(frozen=True)
class Family:
    """Groups that share a micro-batch and the first `prefix` tokens of all their rows (0: none). groups: their
    positions. num_tokens: what it takes, the prefix counted once."""

    groups: tuple[int, ...]
    prefix: int
    num_tokens: int


def single(position: int, rows: Sequence[Row], row_multiple: int = 1) -> Family:
    """A group whose rows share nothing."""
    return Family((position,), 0, padded_group_lengths([rows], row_multiple)[0])


def find_families(groups: Groups, *, max_tokens: int | None, max_groups: int | None, min_families: int) -> list[Family]:
    """Neighbouring groups with one prompt, in order, joined as far as a micro-batch's limit allows.

    A row's prompt is what stands before its first target. A family beyond `max_tokens` or `max_groups` is halved until
    it fits, and the largest ones are halved until there are `min_families` (ranks that each need a part of the batch)
    or nothing is left to halve. Each group is in exactly one family.
    """
    families: list[Family] = []
    for members, prefix in _neighbours(groups):
        families += _fitting(groups, members, prefix, max_tokens, max_groups)
    while len(families) < min_families:
        divisible = [number for number, family in enumerate(families) if len(family.groups) > 1]
        if not divisible:
            break
        largest = max(divisible, key=lambda number: (families[number].num_tokens, -number))
        families[largest : largest + 1] = _halves(groups, families[largest].groups, families[largest].prefix)
    return families


def _neighbours(groups: Groups) -> list[tuple[list[int], int]]:
    """(positions of groups that follow each other and begin alike, tokens that all their rows begin with)."""
    found: list[tuple[list[int], int]] = []
    prefix: Tensor | None = None
    for position, rows in enumerate(groups):
        if prefix is not None and all(_begins_with(row, prefix) for row in rows):
            found[-1][0].append(position)
            continue
        prefix = _common_prompt(rows)
        found.append(([position], 0 if prefix is None else prefix.numel()))
    return found


def _common_prompt(rows: Sequence[Row]) -> Tensor | None:
    """The tokens before any row's first target that all rows begin with; None where there are none."""
    length = min(_prompt_length(row) for row in rows)
    first = rows[0].input_ids[:length]
    for row in rows[1:]:
        differs = (row.input_ids[: first.numel()] != first).nonzero()
        first = first[: int(differs[0])] if differs.numel() else first
    return first if first.numel() else None


def _prompt_length(row: Row) -> int:
    """Tokens before the first target; 0 for a row without targets, whose prompt is unknown."""
    return int(row.target_mask.to(torch.uint8).argmax())


def _begins_with(row: Row, prefix: Tensor) -> bool:
    size = prefix.numel()
    return len(row) > size and torch.equal(row.input_ids[:size], prefix)


def _fitting(
    groups: Groups, members: Sequence[int], prefix: int, max_tokens: int | None, max_groups: int | None
) -> list[Family]:
    family = _family(groups, members, prefix)
    fits = max_tokens is None or family.num_tokens <= max_tokens
    if len(members) == 1 or (fits and (max_groups is None or len(members) <= max_groups)):
        return [family]
    middle = (len(members) + 1) // 2
    return [
        piece
        for part in (members[:middle], members[middle:])
        for piece in _fitting(groups, part, prefix, max_tokens, max_groups)
    ]


def _halves(groups: Groups, members: Sequence[int], prefix: int) -> list[Family]:
    middle = (len(members) + 1) // 2
    return [_family(groups, members[:middle], prefix), _family(groups, members[middle:], prefix)]


def _family(groups: Groups, members: Sequence[int], prefix: int) -> Family:
    rows = [row for position in members for row in groups[position]]
    if len(rows) == 1:
        return single(members[0], rows)
    return Family(tuple(members), prefix, prefix + sum(len(row) - prefix for row in rows))


def collate_families(
    families: Sequence[tuple[int, Sequence[Row]]],
    *,
    pad_token_id: int,
    total_multiple: int = 1,
    fixed_total: int | None = None,
) -> MicroBatch:
    """Rows with their prefixes held once (see `MicroBatch`): (prefix, rows) of each family, at least one. A prefix goes
    to the experts that are reported of its first row.

    A padding row (index -1) fills up to `total_multiple` or to exactly `fixed_total`, as in `packing.collate`. Raises
    ValueError where rows do not fit `fixed_total` or have different fields.
    """
    rows = [row for _, members in families for row in members]
    token_names, row_names = field_names(rows, None)
    layout = _Layout()
    for prefix, members in families:
        layout.add(prefix, members)
    total = round_up(layout.used, total_multiple) if fixed_total is None else fixed_total
    if layout.used > total:
        raise ValueError(f"{layout.used} tokens of {len(rows)} rows do not fit a micro-batch of {total}")
    row_indices, row_lengths = [row.index for row in rows], [len(row) for row in rows]
    padding = total - layout.used
    if padding:
        layout.pad(padding, pad_token_id)
        row_indices.append(-1)
        row_lengths.append(0)

    keys = layout.shared_keys()
    where = _targets(rows)
    positions = torch.cat([torch.arange(len(row)) for row in rows])[where.place]
    # The token of the model's sequence that is each row's token, one row after the other.
    row_tokens = torch.cat(layout.row_tokens)

    def pick(values: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(values))[where.place]

    return MicroBatch(
        tokens=torch.cat(layout.tokens),
        positions=torch.cat(layout.positions),
        targets=pick([row.input_ids for row in rows]),
        target_mask=where.mask,
        row_of_token=torch.repeat_interleave(torch.arange(len(rows)), torch.tensor(row_lengths[: len(rows)]))[
            where.place
        ],
        cu_seqlens=keys.cu_queries,
        max_seqlen=max(*row_lengths, padding),
        row_indices=row_indices,
        token_fields={name: pick([row.token_fields[name] for row in rows]).float() for name in token_names},
        row_fields=collate_row_fields(rows, row_names, len(row_indices)),
        row_lengths=row_lengths,
        bounds=layout.bounds,
        shared_keys=keys,
        sources=row_tokens[(where.place - 1).clamp(min=0)],
        target_positions=positions,
        routed_experts=routed_experts(layout.experts),
    )


@dataclass(frozen=True)
class _Targets:
    """place: of each target in the rows laid one after the other, [N >= 1]; mask: False for the one that stands in
    where no row has a target."""

    place: Tensor
    mask: Tensor


def _targets(rows: Sequence[Row]) -> _Targets:
    mask = torch.cat([row.target_mask for row in rows])
    starts = torch.tensor([0] + [len(row) for row in rows[:-1]]).cumsum(0)
    mask[starts] = False  # nothing predicts a row's first token
    place = mask.nonzero().squeeze(1)
    if place.numel():
        return _Targets(place, torch.ones_like(place, dtype=torch.bool))
    return _Targets(torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.bool))


class _Layout:
    """The model's sequence as it is filled: segments of queries, and the keys that each sees."""

    def __init__(self) -> None:
        self.tokens: list[Tensor] = []
        self.positions: list[Tensor] = []
        self.row_tokens: list[Tensor] = []
        self.bounds: list[int] = [0]
        self.keys: list[Tensor] = []
        self.experts: list[tuple[Tensor | None, int]] = []

    @property
    def used(self) -> int:
        return self.bounds[-1]

    def add(self, prefix: int, rows: Sequence[Row]) -> None:
        trunk = torch.empty(0, dtype=torch.int64)
        if prefix:
            trunk = self._segment(rows[0].input_ids[:prefix], 0, trunk, rows[0].routed_experts)
        for row in rows:
            self.row_tokens.append(self._segment(row.input_ids[prefix:], prefix, trunk, row.routed_experts))

    def pad(self, size: int, pad_token_id: int) -> None:
        self._segment(torch.full((size,), pad_token_id, dtype=torch.int64), 0, torch.empty(0, dtype=torch.int64))

    def _segment(self, ids: Tensor, first_position: int, before: Tensor, experts: Tensor | None = None) -> Tensor:
        """Append tokens that follow those at `before`; returns where all of them stand: the segment's keys. experts:
        of the whole row."""
        start, size = self.used, ids.numel()
        self.tokens.append(ids)
        self.positions.append(torch.arange(first_position, first_position + size))
        self.bounds.append(start + size)
        keys = torch.cat([before, torch.arange(start, start + size)])
        self.keys.append(keys)
        self.experts.append((experts if experts is None else experts[first_position : first_position + size], size))
        return keys

    def shared_keys(self) -> SharedKeys:
        bounds = [0, *accumulate(keys.numel() for keys in self.keys)]
        return SharedKeys(
            index=torch.cat(self.keys),
            query_bounds=self.bounds,
            key_bounds=bounds,
            cu_queries=torch.tensor(self.bounds, dtype=torch.int32),
            cu_keys=torch.tensor(bounds, dtype=torch.int32),
            max_queries=max(stop - start for start, stop in pairwise(self.bounds)),
            max_keys=max(stop - start for start, stop in pairwise(bounds)),
        )
