"""Samples taken out of the loss. A filtered row stays in the batch with no target token, so it counts for nothing."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_lora.data.batch import Row


def without_targets(row: Row) -> Row:
    """The row with no target token; the rest is shared with `row`."""
    return replace(row, target_mask=torch.zeros_like(row.target_mask))


def filter_overlong(rows: Sequence[Row], truncated: Sequence[bool]) -> list[Row]:
    """DAPO's overlong filtering (Yu et al. 2025, section 3.4): answers cut off by the length limit carry no loss.

    Applied after advantages, whose baseline still sees the truncated answers.
    """
    return [without_targets(row) if cut else row for row, cut in zip(rows, truncated, strict=True)]


def sequence_prob_errors(rows: Sequence[Row]) -> list[float]:
    """Each row's mean over its targets of exp|old_logps - rollout_logps|: 1 where trainer and rollout engine agree; 0
    for a row without targets."""
    if not rows:
        return []

    def joined(name: str) -> Tensor:
        return torch.cat([row.token_fields[name] for row in rows])

    mask = torch.cat([row.target_mask for row in rows])
    of_row = torch.repeat_interleave(torch.arange(len(rows)), torch.tensor([len(row) for row in rows]))[mask]
    errors = (joined("old_logps") - joined("rollout_logps"))[mask].abs().double().exp()
    sums = torch.zeros(len(rows), dtype=torch.float64).index_add(0, of_row, errors)
    return (sums / torch.bincount(of_row, minlength=len(rows)).clamp(min=1)).tolist()


@dataclass
class MaskedRows:
    """rows: as given, those above the threshold without targets. num_masked, share of them whose reward was above 0,
    and the largest error seen before and after masking."""

    rows: list[Row]
    num_masked: int
    masked_positive_share: float
    max_error: float
    max_error_after_mask: float


def mask_by_logprob_error(rows: Sequence[Row], threshold: float | None) -> MaskedRows:
    """`grpo.seq_logprob_error_threshold`: leave out sequences on which trainer and rollout engine disagree too much.

    rows carry the token fields "old_logps" and "rollout_logps" and the row field "reward". threshold: largest
    `sequence_prob_errors` kept (2 means that probabilities differ by a factor of 2 on average); None only measures.
    A NaN error is masked.
    """
    errors = sequence_prob_errors(rows)
    masked = [threshold is not None and not error <= threshold for error in errors]
    positive = [row.row_fields["reward"] > 0 for row, out in zip(rows, masked, strict=True) if out]
    return MaskedRows(
        rows=[without_targets(row) if out else row for row, out in zip(rows, masked, strict=True)],
        num_masked=sum(masked),
        masked_positive_share=sum(positive) / len(positive) if positive else 0.0,
        max_error=max(errors, default=0.0),
        max_error_after_mask=max((e for e, out in zip(errors, masked, strict=True) if not out), default=0.0),
    )
