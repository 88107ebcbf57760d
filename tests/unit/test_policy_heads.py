"""Heads on logits of one process, against torch; over ranks and through models in distributed/test_candidates.py."""

import math

import pytest
import torch

from megatron_lora.data.batch import Row
from megatron_lora.data.packing import collate
from megatron_lora.objectives.distillation import CANDIDATES, CandidatesObjective
from megatron_lora.policy.heads import TARGETS, LogprobsAt, MostLikely, head_of, split_logprobs, split_negative_entropy


def test_log_probabilities_at_several_tokens_and_their_gradient() -> None:
    torch.manual_seed(0)
    logits = torch.randn(4, 9, dtype=torch.float64).requires_grad_()
    wanted = torch.tensor([[0, 8, 3], [1, 1, 1], [7, 2, 0], [5, 6, 4]])  # the same token twice counts twice
    weights = torch.randn(4, 3, dtype=torch.float64)
    exact = logits.log_softmax(1).gather(1, wanted)
    found = split_logprobs(logits, wanted, None, 0)
    assert torch.allclose(found, exact, rtol=1e-12)
    [ours], [theirs] = (torch.autograd.grad((values * weights).sum(), logits) for values in (found, exact))
    assert torch.allclose(ours, theirs, rtol=1e-10, atol=1e-12)


def test_the_entropy_of_what_is_left_and_its_gradient() -> None:
    torch.manual_seed(0)
    logits = torch.randn(4, 9, dtype=torch.float64).requires_grad_()
    weights = torch.randn(4, 1, dtype=torch.float64)
    exact = (logits.softmax(1) * logits.log_softmax(1)).sum(1, keepdim=True)
    found = split_negative_entropy(logits, None)
    assert torch.allclose(found, exact, rtol=1e-12)
    [ours], [theirs] = (torch.autograd.grad((values * weights).sum(), logits) for values in (found, exact))
    assert torch.allclose(ours, theirs, rtol=1e-10, atol=1e-12)
    cut = torch.tensor([[1.0, float("-inf"), 1.0]], requires_grad=True)
    split_negative_entropy(cut, None).sum().backward()
    assert float(split_negative_entropy(cut, None)) == pytest.approx(-math.log(2)) and not cut.grad.any()  # type: ignore[union-attr]


def test_the_most_likely_tokens_of_what_is_left() -> None:
    """Log-probabilities are of the tokens that can be drawn; tokens of equal ids are told apart from the target."""
    logits = torch.tensor([[0.0, 2.0, 1.0, float("-inf")], [3.0, 0.0, float("-inf"), 1.0]])
    first, logps, ids = MostLikely(2).parts(MostLikely(2).of_logits(logits, torch.tensor([[2], [1]]), None, 0))
    exact = logits.log_softmax(1)
    assert ids.tolist() == [[1, 2], [0, 3]]
    assert torch.allclose(logps, exact.gather(1, ids.long()))
    assert torch.allclose(first, exact[[0, 1], [2, 1]])


def test_an_objective_says_what_it_is_called_with() -> None:
    class Plain:
        pass

    class Asking:
        candidates = "ids"

    ids = torch.tensor([[0.0, 0.0], [4.0, 5.0], [6.0, 7.0]])
    row = Row(torch.tensor([1, 2, 3]), torch.tensor([False, True, True]), token_fields={"ids": ids})
    batch = collate([row], pad_token_id=0)
    assert head_of(Plain()) == TARGETS and TARGETS.wanted(batch).tolist() == [2, 3, 0]  # type: ignore[arg-type]
    head = head_of(Asking())  # type: ignore[arg-type]
    assert head == LogprobsAt("ids") and head.shape(batch) == (3,)
    with_entropy = head_of(CandidatesObjective.of("reverse", 0.5, whole=True))
    assert with_entropy == LogprobsAt(CANDIDATES, with_entropy=True)
    assert LogprobsAt("ids", with_entropy=True).shape(batch) == (4,)
    assert head_of(CandidatesObjective.of("forward", 0.5, whole=True)) == LogprobsAt(CANDIDATES)
    assert head.wanted(batch).tolist() == [[2, 4, 5], [3, 6, 7], [0, 0, 0]]
