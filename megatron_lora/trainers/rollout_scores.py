"""Log-probabilities of a rollout's answers: those computed ahead of the updates, as far as no update computes them.

The old policy is the one that drew the answers. For the first update of a step that is the policy as it stands, so its
log-probabilities are those of the update's own forward pass; only later updates, and what must know them before the
loss (a KL divergence in the reward, `grpo.seq_logprob_error_threshold`), need a pass of their own. So does dropout,
which the comparison with the rollout engine must not see. The reference needs one as soon as the policy has left it.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from megatron_lora.data.batch import Row
from megatron_lora.objectives.kl import KLType, kl_estimate
from megatron_lora.policy.interface import Policy

OLD, REFERENCE = "old_logps", "reference_logps"


def with_scores(policy: Policy, rows: Sequence[Row], *, old_from: int, reference: bool) -> list[Row]:
    """The rows with the token fields "old_logps", from row `old_from` on, and with `reference` "reference_logps".

    Where the policy's weights are still its reference's the two are the same numbers, and rows before `old_from` get
    neither: the base alone takes other kernels than the base with an adapter that adds nothing, and their difference is
    rounding, no divergence to learn from. Collective.
    """
    at_reference = reference and policy.at_reference()
    first, rest = list(rows[:old_from]), list(rows[old_from:])
    if first and reference and not at_reference:
        with policy.reference():
            first = with_field(first, REFERENCE, policy.score(first))
    if not rest:
        return first
    if reference and not at_reference:
        old, found = policy.score_with_reference(rest)
    else:
        old = found = policy.score(rest)
    rest = with_field(rest, OLD, old)
    return first + (with_field(rest, REFERENCE, found) if reference else rest)


def with_field(rows: Sequence[Row], name: str, values: Sequence[Tensor]) -> list[Row]:
    """The rows with one more token field, [S] a row."""
    return [
        replace(row, token_fields=row.token_fields | {name: value}) for row, value in zip(rows, values, strict=True)
    ]


def mean_kl(rows: Sequence[Row], kl_type: KLType) -> float:
    """KL(policy || reference) in nats, the mean over all target tokens. rows: with both log-probabilities."""
    kept = [row for row in rows if row.num_targets]
    if not kept:
        return 0.0
    policy, reference = (
        torch.cat([row.token_fields[name][row.target_mask] for row in kept]) for name in (OLD, REFERENCE)
    )
    return float(kl_estimate(policy, reference, kl_type).mean())
