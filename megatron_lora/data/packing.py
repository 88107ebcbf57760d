"""From rows to micro-batches: which groups share one (`plan_micro_batches`), and its tensors (`collate`)."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from megatron_lora.data.batch import MicroBatch, Row
from megatron_lora.data.bins import PACKING_ALGORITHMS, Bins, concatenative, sorted_by_length
from megatron_lora.errors import UserError

# In the place of the experts of a token of which nothing is said.
NOT_REPORTED = -1


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is not below `value`."""
    return -(-value // multiple) * multiple


def padded_group_lengths(groups: Sequence[Sequence[Row]], row_multiple: int = 1) -> list[int]:
    """Tokens that each group takes in a micro-batch whose rows are padded to `row_multiple`."""
    return [sum(round_up(len(row), row_multiple) for row in group) for group in groups]


def plan_micro_batches(
    group_lengths: Sequence[int],
    *,
    dp_size: int,
    max_groups: int | None = None,
    max_tokens: int | None = None,
    micro_batch_multiple: int = 1,
    dynamic: bool = False,
    algorithm: str = "modified_first_fit_decreasing",
    length_round: int = 1,
    seed: int = 0,
    group_counts: Sequence[int] | None = None,
) -> list[list[list[int]]]:
    """Divide a global batch: for each data-parallel rank, its micro-batches, each a list of group positions.

    group_lengths: tokens of each group (`padded_group_lengths`). group_counts: as how many each counts, where they are
    groups already joined. Exactly one of the two limits is given: `max_groups`, so many groups a micro-batch; or
    `max_tokens`, sequence packing by `algorithm`, or with `dynamic` groups of like length whose number times the
    longest stays within it. Lengths count rounded up to `length_round` against `max_tokens`; a group beyond it gets a
    micro-batch of its own.

    Every rank computes the same plan. Each group appears exactly once; every rank gets the same number of
    micro-batches, a multiple of `micro_batch_multiple` (a schedule with virtual stages needs that), longest first, so
    that ranks meet with equals. Where that is more than the limits ask for, the longest micro-batches are halved, and
    only what then is left over is empty. Raises UserError for an unknown algorithm.
    """
    if (max_groups is None) == (max_tokens is None):
        raise ValueError(f"give one of max_groups and max_tokens, got max_groups={max_groups}, max_tokens={max_tokens}")
    if max_groups is not None:
        bins = concatenative(group_counts or [1] * len(group_lengths), max_groups)
    else:
        assert max_tokens is not None
        rounded = [round_up(length, length_round) for length in group_lengths]
        pack = sorted_by_length if dynamic else _packing_algorithm(algorithm)
        bins = pack(rounded, max_tokens, seed)
    per_rank = round_up(max(1, math.ceil(len(bins) / dp_size)), micro_batch_multiple)
    bins = _split_to(bins, group_lengths, per_rank * dp_size)
    return _deal(bins, group_lengths, dp_size, per_rank)


def _packing_algorithm(name: str) -> Callable[[Sequence[int], int, int], Bins]:
    if name not in PACKING_ALGORITHMS:
        raise UserError(
            f"policy.sequence_packing.algorithm={name!r} is not known; use one of "
            + ", ".join(sorted(PACKING_ALGORITHMS))
        )
    return PACKING_ALGORITHMS[name]


def _split_to(bins: Bins, lengths: Sequence[int], num_bins: int) -> Bins:
    """Halve the longest bins that hold several groups until there are `num_bins` (or nothing is left to halve).

    The ranks run that many micro-batches anyway: an even share of the tokens costs less than an empty one.
    """
    bins = [list(members) for members in bins]
    while len(bins) < num_bins:
        divisible = [number for number, members in enumerate(bins) if len(members) > 1]
        if not divisible:
            break
        longest = max(divisible, key=lambda number: (_tokens(bins[number], lengths), -number))
        halves = _deal([[position] for position in bins[longest]], lengths, 2, len(bins[longest]) - 1)
        bins[longest : longest + 1] = [sorted(position for [position] in filter(None, half)) for half in halves]
    return bins


def _deal(bins: Bins, lengths: Sequence[int], num_ranks: int, per_rank: int) -> list[Bins]:
    """Longest bin first to the rank with the fewest tokens that still has a place; empty bins fill what is left."""
    ranks: list[Bins] = [[] for _ in range(num_ranks)]
    load = [0] * num_ranks
    for members in sorted(bins, key=lambda members: (-_tokens(members, lengths), members)):
        rank = min((r for r in range(num_ranks) if len(ranks[r]) < per_rank), key=lambda r: (load[r], r))
        ranks[rank].append(members)
        load[rank] += _tokens(members, lengths)
    return [members + [[] for _ in range(per_rank - len(members))] for members in ranks]


def _tokens(members: Sequence[int], lengths: Sequence[int]) -> int:
    return sum(lengths[position] for position in members)


def collate(
    rows: Sequence[Row],
    *,
    pad_token_id: int,
    row_multiple: int = 1,
    total_multiple: int = 1,
    fixed_total: int | None = None,
    like: Row | None = None,
) -> MicroBatch:
    """Pack rows, in order, into one `MicroBatch` (see there for shapes).

    Each row is padded to `row_multiple` tokens (context parallelism divides rows); the padding belongs to the row, is
    masked, and its positions go on. One masked padding row (row index -1) then fills up to `total_multiple` (sequence
    parallelism divides the total) or to exactly `fixed_total`. No rows give one padding row alone, with the field
    names of `like`: what a rank with an empty micro-batch runs. Raises ValueError where rows do not fit
    `fixed_total` or have different fields.
    """
    token_names, row_names = field_names(rows, like)
    padded = [round_up(len(row), row_multiple) for row in rows]
    used = sum(padded)
    total = round_up(max(used, 1), math.lcm(row_multiple, total_multiple)) if fixed_total is None else fixed_total
    if used > total or total == 0 or total % row_multiple:
        raise ValueError(
            f"{used} tokens of {len(rows)} rows do not fit a micro-batch of {total} in rows of {row_multiple}s"
        )
    row_indices = [row.index for row in rows]
    row_lengths = [len(row) for row in rows]
    if total > used:
        padded.append(total - used)
        row_indices.append(-1)
        row_lengths.append(0)

    sizes = torch.tensor(padded, dtype=torch.int64)
    bounds = torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)])
    row_of_token = torch.repeat_interleave(torch.arange(len(padded)), sizes)
    positions = torch.arange(total) - bounds[row_of_token]
    # Where the rows' tokens stand; what describes a row's token i + 1 goes to the place of its token i.
    real = (positions < torch.tensor(row_lengths)[row_of_token]).nonzero().squeeze(1)
    follows = positions[real] > 0
    places = real[follows] - 1

    def spread(values: Sequence[Tensor], fill: Tensor) -> Tensor:
        if places.numel():
            fill[places] = torch.cat(list(values))[follows].to(fill.dtype)
        return fill

    tokens = torch.full((total,), pad_token_id, dtype=torch.int64)
    if rows:
        tokens[real] = torch.cat([row.input_ids for row in rows])
    experts = routed_experts([(row.routed_experts, len(row)) for row in rows])
    if experts is not None:
        experts = experts.new_full((total, *experts.shape[1:]), NOT_REPORTED).index_copy(0, real, experts)
    return MicroBatch(
        tokens=tokens,
        positions=positions,
        targets=spread([row.input_ids for row in rows], torch.full((total,), pad_token_id, dtype=torch.int64)),
        target_mask=spread([row.target_mask for row in rows], torch.zeros(total, dtype=torch.bool)),
        row_of_token=row_of_token,
        cu_seqlens=bounds.to(torch.int32),
        max_seqlen=max(padded),
        row_indices=row_indices,
        token_fields={
            name: spread([row.token_fields[name] for row in rows], torch.zeros(total, *field_shape(name, rows, like)))
            for name in token_names
        },
        row_fields=collate_row_fields(rows, row_names, len(padded)),
        row_lengths=row_lengths,
        bounds=bounds.tolist(),
        routed_experts=experts,
    )


def routed_experts(pieces: Sequence[tuple[Tensor | None, int]]) -> Tensor | None:
    """[tokens, layers, k] of pieces laid one after the other, each with its number of tokens; None where no piece has
    any. Raises ValueError where two are of different models."""
    shapes = {experts.shape[1:] for experts, _ in pieces if experts is not None}
    if not shapes:
        return None
    if len(shapes) > 1:
        raise ValueError(f"experts were reported in the shapes {sorted(map(tuple, shapes))} (layers, experts a token)")
    [shape] = shapes
    nothing = torch.full((1, *shape), NOT_REPORTED, dtype=torch.int16)
    return torch.cat([nothing.expand(size, *shape) if experts is None else experts for experts, size in pieces])


def field_names(rows: Sequence[Row], like: Row | None) -> tuple[list[str], list[str]]:
    """(token fields, row fields) of all rows, or of `like` where there are none. Raises ValueError where two rows have
    different ones."""
    like = rows[0] if rows else like
    token_names = list(like.token_fields) if like else []
    row_names = list(like.row_fields) if like else []
    for row in rows:
        if row.token_fields.keys() != set(token_names) or row.row_fields.keys() != set(row_names):
            raise ValueError(
                f"row {row.index} has fields {[*row.token_fields, *row.row_fields]}, row {rows[0].index} has "
                f"{[*token_names, *row_names]}; rows of one micro-batch must have the same"
            )
    return token_names, row_names


def field_shape(name: str, rows: Sequence[Row], like: Row | None) -> torch.Size:
    """What a token field has of each token: () or (m,)."""
    row = rows[0] if rows else like
    assert row is not None
    return row.token_fields[name].shape[1:]


def collate_row_fields(rows: Sequence[Row], names: Sequence[str], num_rows: int) -> dict[str, Tensor]:
    """Each field [num_rows] fp32, 0 for padding rows."""
    padding = [0.0] * (num_rows - len(rows))
    return {name: torch.tensor([row.row_fields[name] for row in rows] + padding) for name in names}


def row_places(batch: MicroBatch) -> tuple[Tensor, Tensor]:
    """Where per-target values of a batch on the CPU go in its rows, laid one after the other without padding: (places
    in the batch, places in those rows), [targets] int64 each. A row's token 0, which nothing predicts, has none."""
    lengths = torch.tensor(batch.row_lengths)
    positions = batch.positions + 1 if batch.target_positions is None else batch.target_positions
    valid = ((positions > 0) & (positions < lengths[batch.row_of_token])).nonzero().squeeze(1)
    starts = lengths.cumsum(0) - lengths
    return valid, starts[batch.row_of_token[valid]] + positions[valid]


def split_by_row(values: Tensor, batch: MicroBatch) -> list[Tensor]:
    """Cut per-target values [T, ...] into one tensor [S, ...] a row, aligned with its input_ids again.

    Place 0, which nothing predicts, is 0; padding is left out, and so is the padding row. Inverse of `collate` for
    token fields. Where rows share prefixes, tokens without a target are 0 too.
    """
    sources, destinations = row_places(batch)
    flat = values.new_zeros(sum(batch.row_lengths), *values.shape[1:])
    flat[destinations] = values[sources]
    return list(flat.split([length for length in batch.row_lengths if length]))


def unpack(batch: MicroBatch) -> list[Row]:
    """The rows that `collate` was given, token fields zero at place 0."""
    masks = split_by_row(batch.target_mask, batch)
    fields = {name: split_by_row(values, batch) for name, values in batch.token_fields.items()}
    rows = []
    for number, mask in enumerate(masks):
        start = int(batch.cu_seqlens[number])
        rows.append(
            Row(
                input_ids=batch.tokens[start : start + mask.numel()],
                target_mask=mask,
                index=batch.row_indices[number],
                token_fields={name: values[number] for name, values in fields.items()},
                row_fields={name: float(values[number]) for name, values in batch.row_fields.items()},
            )
        )
    return rows
