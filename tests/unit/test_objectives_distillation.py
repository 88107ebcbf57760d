"""The loss of on-policy distillation: by hand, and in expectation against the exact reverse divergence of TRL's GKD."""

import math
from typing import Any

import pytest
import torch
from objective_batches import pack
from torch import Tensor

from megatron_lora.data.batch import Row
from megatron_lora.objectives.distillation import CandidatesObjective, DistillationObjective


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


def candidates_batch(ids: list[list[int]], teacher: torch.Tensor) -> tuple[Row, Any]:
    """A row with two tokens of prompt; ids [n, k] of the teacher's tokens, and its log-probabilities [n, V]."""
    n, k = len(ids), len(ids[0])
    places = torch.tensor(ids)
    front = torch.zeros(2, k)
    fields = {
        "teacher_logps": torch.cat([torch.zeros(2), teacher[:, 0]]),
        "teacher_ids": torch.cat([front, places.float()]),
        "teacher_candidate_logps": torch.cat([front, teacher.gather(1, places)]),
    }
    row = Row(torch.arange(n + 2), torch.arange(n + 2) >= 2, token_fields=fields)
    return row, pack([row])


def candidates_found(batch: Any, logits: torch.Tensor, ids: list[list[int]]) -> torch.Tensor:
    """[T, 1 + k] as a backend gives them; token 0 was drawn. Elsewhere a number that must not count."""
    logps = logits.log_softmax(-1)
    wanted = torch.cat([torch.zeros(len(ids), 1, dtype=torch.long), torch.tensor(ids)], 1)
    found = torch.full((*batch.target_mask.shape, wanted.shape[1]), -9.0, dtype=logits.dtype)
    return found.index_put((batch.target_mask.nonzero().squeeze(1),), logps.gather(1, wanted))


def test_over_candidates_by_hand() -> None:
    """A vocabulary of 3, of which the teacher's 2 most likely tokens have 1/2 and 1/4: 2/3 and 1/3 of each other. The
    policy gives them 1/5 and 3/5: 1/4 and 3/4 of each other."""
    teacher = torch.tensor([[0.5, 0.25, 0.25]]).log()
    logits = torch.tensor([[0.2, 0.6, 0.2]]).log()
    _, batch = candidates_batch([[0, 1]], teacher)
    found = candidates_found(batch, logits, [[0, 1]])
    forward = 2 / 3 * math.log((2 / 3) / (1 / 4)) + 1 / 3 * math.log((1 / 3) / (3 / 4))
    reverse = 1 / 4 * math.log((1 / 4) / (2 / 3)) + 3 / 4 * math.log((3 / 4) / (1 / 3))
    whole = 2 / 3 * math.log((2 / 3) / 0.2) + 1 / 3 * math.log((1 / 3) / 0.6)
    mixed = 0.3 * forward + 0.7 * reverse
    cases: list[tuple[Any, float]] = [("forward", forward), ("reverse", reverse), ("mixed", mixed)]
    for kl_type, wanted in cases:
        result = CandidatesObjective.of(kl_type, 0.3, whole=False)(found, batch)
        assert float(result.loss) == pytest.approx(wanted, rel=1e-5)
        assert float(result.metrics["forward_kl"]) == pytest.approx(forward, rel=1e-5)
        assert float(result.metrics["reverse_kl"]) == pytest.approx(reverse, rel=1e-5)
        assert float(result.metrics["teacher_candidate_mass"]) == pytest.approx(0.75)
        assert float(result.metrics["teacher_kl"]) == pytest.approx(math.log(0.2 / 0.5))
    assert float(CandidatesObjective.of("forward", 0.3, whole=True)(found, batch).loss) == pytest.approx(whole)
    # Of all tokens, the teacher's log-probability of the third is -100.
    entropy = 2 * 0.2 * math.log(0.2) + 0.6 * math.log(0.6)
    outside = entropy - 0.2 * math.log(2 / 3) - 0.6 * math.log(1 / 3) + 0.2 * 100
    found = torch.cat([found, torch.full((len(found), 1), entropy)], 1)
    cases = [("reverse", outside), ("mixed", 0.3 * whole + 0.7 * outside)]
    for kl_type, wanted in cases:
        result = CandidatesObjective.of(kl_type, 0.3, whole=True)(found, batch)
        assert float(result.loss) == pytest.approx(wanted, rel=1e-5)
        assert float(result.metrics["reverse_kl"]) == pytest.approx(outside, rel=1e-5)


@pytest.mark.parametrize("kl_type", ["forward", "reverse", "mixed"])
def test_with_every_token_a_candidate_it_is_torchs_divergence(kl_type: Any) -> None:
    """Value and gradient over the whole vocabulary."""
    torch.manual_seed(1)
    teacher = torch.randn(4, 6, dtype=torch.float64).log_softmax(-1)
    logits = torch.randn(4, 6, dtype=torch.float64).requires_grad_()
    ids = [torch.randperm(6).tolist() for _ in range(4)]
    _, batch = candidates_batch(ids, teacher)
    batch.token_fields["teacher_candidate_logps"] = torch.zeros(6, 6, dtype=torch.float64)
    batch.token_fields["teacher_candidate_logps"][batch.target_mask] = teacher.gather(1, torch.tensor(ids))
    policy = logits.log_softmax(-1)
    forward = torch.nn.functional.kl_div(policy, teacher, reduction="sum", log_target=True)
    reverse = torch.nn.functional.kl_div(teacher, policy, reduction="sum", log_target=True)
    weight = {"forward": 1.0, "reverse": 0.0, "mixed": 0.25}[kl_type]
    exact = weight * forward + (1 - weight) * reverse
    [wanted] = torch.autograd.grad(exact, logits, retain_graph=True)
    result = CandidatesObjective.of(kl_type, 0.25, whole=False)(candidates_found(batch, logits, ids), batch)
    [found] = torch.autograd.grad(result.loss, logits)
    assert float(result.loss) == pytest.approx(float(exact), rel=1e-9)
    assert torch.allclose(found, wanted, rtol=1e-9, atol=1e-12)


def test_candidates_that_the_policy_is_as_sure_of_teach_nothing() -> None:
    teacher = torch.randn(3, 5).log_softmax(-1)
    logits = (teacher + 2.0).requires_grad_()
    ids = [[4, 0], [1, 2], [3, 1]]
    row, batch = candidates_batch(ids, teacher)
    result = CandidatesObjective.of("mixed", 0.5, whole=False)(candidates_found(batch, logits, ids), batch)
    result.loss.backward()
    assert abs(float(result.loss)) < 1e-6 and logits.grad is not None and logits.grad.abs().max() < 1e-6
    assert CandidatesObjective().count([row]) == 3
