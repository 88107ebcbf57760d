"""The two shapes of data that every room agrees on: a tokenized `Row` and a packed `MicroBatch`."""

from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor


@dataclass
class Row:
    """One tokenized sequence.

    input_ids: [S] int64. target_mask: [S] bool, True where the token carries loss (never at position 0, which
    nothing predicts). token_fields: name -> [S] or [S, m] fp32, aligned with input_ids (old
    log-probabilities, advantages, a teacher's most likely tokens...). row_fields: name -> scalar. index: the row's
    number in its data set, counted from 1 as error messages do.
    routed_experts: [S, layers, k] int16, the experts that a rollout engine sent each token to, -1 for a token of which
    it says nothing; None: of none.
    """

    input_ids: Tensor
    target_mask: Tensor
    index: int = 0
    token_fields: dict[str, Tensor] = field(default_factory=dict)
    row_fields: dict[str, float] = field(default_factory=dict)
    routed_experts: Tensor | None = None

    def __len__(self) -> int:
        return self.input_ids.numel()

    @property
    def num_targets(self) -> int:
        return int(self.target_mask.sum())


@dataclass(frozen=True, eq=False)
class SharedKeys:
    """Whose keys and values each query sees where rows share a prefix.

    Queries stand in segments: a prefix, what follows it in one row, or a whole row. The keys of a segment are those of
    everything its row has read so far, itself included: the micro-batch's tokens at index[key_bounds[i]:key_bounds[i +
    1]], of which the segment's own are the last. A query sees all keys up to its own: causal attention aligned to the
    end of the keys.

    index: [K] int64. query_bounds, key_bounds: [segments + 1], on the CPU; cu_queries, cu_keys: the same as int32
    tensors. max_queries, max_keys: of one segment.
    """

    index: Tensor
    query_bounds: list[int]
    key_bounds: list[int]
    cu_queries: Tensor
    cu_keys: Tensor
    max_queries: int
    max_keys: int


@dataclass
class MicroBatch:
    """Rows packed one after the other into one flat sequence of T tokens.

    tokens, positions (within the row), targets: [T] int64; targets[t] is the token that follows tokens[t] in its row.
    target_mask: [T] bool, True where targets[t] carries loss. row_of_token: [T] int64; padding belongs to the row it
    follows. cu_seqlens: [rows + 1] int32. token_fields: name -> [T] or [T, m], shifted like targets. row_fields: name
    -> [rows] fp32. row_indices: data set row numbers, -1 for a padding row. row_lengths: each row's tokens without its
    padding, 0 for a padding row. num_rows counts the padding row too. bounds: cu_seqlens on the CPU. max_seqlen: the
    longest row. routed_experts: [T, layers, k] of `tokens`, not shifted, -1 where nothing is said; None: of no row.

    Where rows share prefixes (`data.shared_prefix`), tokens, positions [T] and cu_seqlens [segments + 1] hold each
    prefix once, and `shared_keys` says who attends to it. What is predicted then has a length N of its own: targets,
    target_mask, row_of_token and token_fields are [N], one place for each target of each row; `sources` [N] names the
    token that predicts it and `target_positions` [N] its position in its row. Elsewhere those three are None.
    """

    tokens: Tensor
    positions: Tensor
    targets: Tensor
    target_mask: Tensor
    row_of_token: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    row_indices: list[int]
    token_fields: dict[str, Tensor] = field(default_factory=dict)
    row_fields: dict[str, Tensor] = field(default_factory=dict)
    row_lengths: list[int] = field(default_factory=list)
    bounds: list[int] = field(default_factory=list)
    shared_keys: SharedKeys | None = None
    sources: Tensor | None = None
    target_positions: Tensor | None = None
    routed_experts: Tensor | None = None

    def __post_init__(self) -> None:
        if not self.bounds:
            self.bounds = self.cu_seqlens.tolist()

    @property
    def num_rows(self) -> int:
        return len(self.row_indices)

    def to(self, device: torch.device | str) -> "MicroBatch":
        """A copy with every tensor on `device`."""

        def move(value: Any) -> Any:
            if isinstance(value, Tensor):
                return value.to(device, non_blocking=True)
            if isinstance(value, dict):
                return {name: move(item) for name, item in value.items()}
            if isinstance(value, SharedKeys):
                tensors = {name: move(getattr(value, name)) for name in ("index", "cu_queries", "cu_keys")}
                return replace(value, **tensors)
            return value

        return MicroBatch(**{each.name: move(getattr(self, each.name)) for each in fields(self)})


def sum_by_row(values: Tensor, batch: MicroBatch) -> Tensor:
    """Sum `values` [T] over each row's target tokens: [rows], differentiable."""
    masked = torch.where(batch.target_mask, values, torch.zeros_like(values))
    return values.new_zeros(batch.num_rows).index_add(0, batch.row_of_token, masked)
