"""The two shapes of data that every room agrees on: a tokenized `Row` and a packed `MicroBatch`."""

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Row:
    """One tokenized sequence.

    input_ids: [S] int64. target_mask: [S] bool, True where the token carries loss (never at position 0, which
    nothing predicts). token_fields: name -> [S] fp32, aligned with input_ids (old log-probabilities, advantages...).
    row_fields: name -> scalar. index: the row's number in its data set, counted from 1 as error messages do.
    """

    input_ids: Tensor
    target_mask: Tensor
    index: int = 0
    token_fields: dict[str, Tensor] = field(default_factory=dict)
    row_fields: dict[str, float] = field(default_factory=dict)

    def __len__(self) -> int:
        return self.input_ids.numel()

    @property
    def num_targets(self) -> int:
        return int(self.target_mask.sum())


@dataclass
class MicroBatch:
    """Rows packed one after the other into one flat sequence of T tokens.

    tokens, positions (within the row), targets: [T] int64; targets[t] is the token that follows tokens[t] in its row.
    target_mask: [T] bool, True where targets[t] carries loss. row_of_token: [T] int64; padding belongs to the row it
    follows. cu_seqlens: [rows + 1] int32. token_fields: name -> [T], shifted like targets. row_fields: name ->
    [rows] fp32. row_indices: data set row numbers, -1 for a padding row. row_lengths: each row's tokens without its
    padding, 0 for a padding row. num_rows counts the padding row too.
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

    @property
    def num_rows(self) -> int:
        return self.cu_seqlens.numel() - 1

    def to(self, device: torch.device | str) -> "MicroBatch":
        """A copy with every tensor on `device`."""

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=True)

        return MicroBatch(
            tokens=move(self.tokens),
            positions=move(self.positions),
            targets=move(self.targets),
            target_mask=move(self.target_mask),
            row_of_token=move(self.row_of_token),
            cu_seqlens=move(self.cu_seqlens),
            max_seqlen=self.max_seqlen,
            row_indices=self.row_indices,
            token_fields={name: move(value) for name, value in self.token_fields.items()},
            row_fields={name: move(value) for name, value in self.row_fields.items()},
            row_lengths=self.row_lengths,
        )


def sum_by_row(values: Tensor, batch: MicroBatch) -> Tensor:
    """Sum `values` [T] over each row's target tokens: [rows], differentiable."""
    masked = torch.where(batch.target_mask, values, torch.zeros_like(values))
    return values.new_zeros(batch.num_rows).index_add(0, batch.row_of_token, masked)
