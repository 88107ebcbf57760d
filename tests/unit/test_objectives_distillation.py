"""The loss of on-policy distillation: by hand, and in expectation against the exact reverse divergence of TRL's GKD."""

import math
from typing import Any

import pytest
import torch
from objective_batches import pack
from torch import Tensor

from megatron_lora.data.batch import Row
from megatron_lora.objectives.distillation import DistillationObjective


def batch_of(targets: int, **fields: list[float]) -> Any:
    """One micro-batch of one row: a prompt of two tokens, then `targets` tokens with these fields."""
    length = 2 + targets
    row = Row(
        torch.arange(length),
        torch.arange(length) >= 2,
        token_fields={name: torch.tensor([0.0, 0.0, *values]) for name, values in fields.items()},
    )
    return row, pack([row])


def at_targets(batch: Any, values: list[float]) -> Tensor:
    """[T] log-probabilities as a backend gives them, a number that must not count where no target is."""
    logps = torch.full(batch.target_mask.shape, -9.0)
    logps[batch.target_mask] = torch.tensor(values)
    return logps.requires_grad_()


def test_the_first_update_by_hand() -> None:
    row, batch = batch_of(3, teacher_logps=[-1.0, -0.5, -2.0])
    logps = at_targets(batch, [-1.5, -0.25, -2.0])
    objective = DistillationObjective(on_policy=True)
    result = objective(logps, batch)
    result.loss.backward()
    assert objective.count([row]) == 3
    # -(log teacher - log pi) of each token, at a ratio of 1.
    assert float(result.loss) == pytest.approx(-0.5 + 0.25 + 0.0)
    assert logps.grad is not None
    assert logps.grad[batch.target_mask].tolist() == pytest.approx([-0.5, 0.25, 0.0])
    assert not logps.grad[~batch.target_mask].any()
    assert float(result.metrics["teacher_kl"]) == pytest.approx(-0.5 + 0.25)
    k3 = sum(math.exp(r) - r - 1 for r in (0.5, -0.25, 0.0))
    assert float(result.metrics["teacher_kl_k3"]) == pytest.approx(k3)
    assert float(result.metrics["teacher_nll"]) == pytest.approx(3.5) and not result.metrics["clip_fraction"]


def test_later_updates_weigh_by_the_ratio_and_clip_it() -> None:
    _, batch = batch_of(3, teacher_logps=[-1.0, -0.5, -3.0], old_logps=[-1.5, -0.75, -2.0])
    moved = [-1.5 + math.log(1.1), -0.75 + math.log(1.5), -2.0 + math.log(0.5)]
    logps = at_targets(batch, moved)
    result = DistillationObjective(0.2, 0.3)(logps, batch)
    result.loss.backward()
    # Inside; above 1 + 0.3 with an advantage; below 1 - 0.2 with a negative one.
    assert float(result.loss) == pytest.approx(-1.1 * 0.5 - 1.3 * 0.25 + 0.8 * 1.0)
    assert logps.grad is not None
    assert logps.grad[batch.target_mask].tolist() == pytest.approx([-1.1 * 0.5, 0.0, 0.0])
    assert float(result.metrics["clip_fraction"]) == 2


def test_scores_ahead_give_the_advantage_of_a_first_update() -> None:
    """With dropout the training pass is another than the policy that answered."""
    _, batch = batch_of(1, teacher_logps=[-1.0], old_logps=[-1.5])
    logps = at_targets(batch, [-1.7])
    result = DistillationObjective(on_policy=True)(logps, batch)
    result.loss.backward()
    assert logps.grad is not None and float(logps.grad.sum()) == pytest.approx(-0.5)


def test_an_update_without_the_old_policy_is_refused() -> None:
    _, batch = batch_of(1, teacher_logps=[-1.0])
    with pytest.raises(KeyError, match="old_logps"):
        DistillationObjective()(at_targets(batch, [-1.5]), batch)


def test_over_all_tokens_it_is_the_exact_divergence_of_gkd() -> None:
    """The mean over every token that the policy could have drawn, weighed by its probability: value and gradient are
    those of TRL's generalized divergence at beta 1, D(student || teacher)."""
    from trl.experimental.gkd.gkd_trainer import GKDTrainer

    torch.manual_seed(0)
    vocabulary = 7
    teacher = torch.randn(vocabulary, dtype=torch.float64)
    student = torch.randn(vocabulary, dtype=torch.float64).requires_grad_()
    exact = GKDTrainer.generalized_jsd_loss(student[None, None], teacher[None, None], beta=1.0, reduction="sum")
    [wanted] = torch.autograd.grad(exact, student)
    value, found = 0.0, torch.zeros(vocabulary, dtype=torch.float64)
    for token in range(vocabulary):
        _, batch = batch_of(1, teacher_logps=[0.0])
        batch.token_fields["teacher_logps"] = teacher.log_softmax(0)[token].expand(batch.target_mask.shape)
        logps = student.log_softmax(0)[token].expand(batch.target_mask.shape)
        result = DistillationObjective(on_policy=True)(logps, batch)
        weight = student.detach().softmax(0)[token]
        found += weight * torch.autograd.grad(result.loss, student)[0]
        value += float(weight * result.metrics["teacher_kl"])
    assert value == pytest.approx(float(exact), rel=1e-9)
    assert torch.allclose(found, wanted, rtol=1e-9, atol=1e-12)
