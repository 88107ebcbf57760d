"""What a worker can be asked about training that must stop."""

from typing import Any

import torch
from torch import Tensor

from megatron_lora.data.batch import MicroBatch, Row
from megatron_lora.errors import UserError
from megatron_lora.objectives.base import LossSum
from megatron_lora.objectives.sft import SFTObjective
from megatron_lora.policy.interface import NonFiniteLoss
from megatron_lora.policy.megatron.policy import MegatronPolicy
from tests.distributed.cases import training_rows
from tests.distributed.megatron_build import build_policy
from tests.distributed.policy_checks import train_steps

POISON = 7
POISONED_ROW = 4


class NanGradient(SFTObjective):
    """A finite loss whose gradient is not: the slope of the root at 0, times 0."""

    def __call__(self, logps: Tensor, batch: MicroBatch) -> LossSum:
        result = super().__call__(logps, batch)
        return LossSum(loss=result.loss + (logps * 0.0).sum().abs().sqrt())


def poisoned_rows() -> list[Row]:
    """The first step's rows, token 7 in one of them only; row numbers count from 1."""
    rows = training_rows(1)[0]
    for number, row in enumerate(rows, start=1):
        row.index = number
        row.input_ids[row.input_ids == POISON] = POISON + 1
    rows[POISONED_ROW - 1].input_ids[3] = POISON
    return rows


def non_finite(case: dict[str, Any]) -> dict[str, Any]:
    """A step with an infinite embedding row, one with a NaN gradient, then two good ones."""
    policy = build_policy(case)
    before = policy.adapter().tensors
    kept = _set_embedding(policy, torch.full((), float("inf")))
    found: dict[str, Any] = {"loss": _failure(policy, poisoned_rows(), SFTObjective())}
    found["score"] = _failure(policy, poisoned_rows(), None)
    _set_embedding(policy, kept)
    found["gradient"] = _failure(policy, training_rows(1)[0], NanGradient())
    after = policy.adapter().tensors
    found["unchanged"] = all(torch.equal(after[name], value) for name, value in before.items())
    return found | train_steps(policy, training_rows(2))


def _set_embedding(policy: MegatronPolicy, value: Tensor) -> Tensor:
    """Replace the poisoned token's row where this rank holds it; returns what was there."""
    chunk = policy.base.chunks[0]
    if not chunk.pre_process:
        return value
    weight = chunk.embedding.word_embeddings.weight
    row = POISON - policy.world.tp_rank * weight.shape[0]
    if not 0 <= row < weight.shape[0]:
        return value
    before = weight[row].detach().clone()
    with torch.no_grad():
        weight[row] = value
    return before


def _failure(policy: MegatronPolicy, rows: list[Row], objective: SFTObjective | None) -> dict[str, Any]:
    """What a step raises; without an objective, what scoring raises."""
    try:
        if objective is None:
            policy.score(rows)
        else:
            policy.train_step([[row] for row in rows], objective)
    except NonFiniteLoss as failure:
        return {"message": str(failure), "rows": failure.row_indices}
    return {"message": "", "rows": []}


def no_gradient(case: dict[str, Any]) -> dict[str, Any]:
    """The message of the first step."""
    policy = build_policy(case)
    before = policy.adapter().tensors
    try:
        train_steps(policy, training_rows(1))
        message = ""
    except UserError as error:
        message = str(error)
    after = policy.adapter().tensors
    return {"message": message, "unchanged": all(torch.equal(after[name], value) for name, value in before.items())}


CHECKS = {"non_finite": non_finite, "no_gradient": no_gradient}
