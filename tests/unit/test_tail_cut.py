"""Top-k and top-p as the trainer sees them: which tokens stay, and a target that rounding would cut."""

import pytest
import torch
from torch import Tensor

from megatron_lora.policy.interface import NonFiniteLoss, check_scores
from megatron_lora.policy.tail_cut import SORT_ROWS, cut_around_targets, tail_cut
from tests.support.reference import cut_logits, make_rows, of_targets


def logits_of(num_rows: int, vocabulary: int = 50) -> Tensor:
    return torch.randn(num_rows, vocabulary, generator=torch.Generator().manual_seed(3)) * 2


def test_equal_logits_at_the_border() -> None:
    # 0.25 four times: top_k keeps ties with its last; top_p = 0.5 is reached by two of them, whichever these are.
    equal = torch.zeros(1, 4)
    assert not tail_cut(equal, 1, 1.0).any()
    assert int((~tail_cut(equal, -1, 0.5)).sum()) == 2
    assert int((~tail_cut(equal, -1, 1e-6)).sum()) == 1


@pytest.mark.parametrize(("top_k", "top_p"), [(7, 1.0), (-1, 0.7), (0, 0.7), (12, 0.8), (50, 0.9), (500, 0.4)])
def test_every_target_stays_and_nothing_else_is_added(top_k: int, top_p: float) -> None:
    logits, targets = logits_of(SORT_ROWS + 44), torch.arange(SORT_ROWS + 44) % 50
    cut = cut_around_targets(logits, targets, None, vocab_size=50, top_k=top_k, top_p=top_p)
    wanted = cut_logits(logits, targets, top_k if top_k > 0 else 50, top_p)
    assert torch.equal(cut, wanted == float("-inf"))
    # Least likely tokens are among the targets: cut without the rule, finite with it.
    assert tail_cut(logits, top_k, top_p).gather(1, targets[:, None]).any()
    assert of_targets(logits.masked_fill(cut, float("-inf")), targets).isfinite().all()


def test_padding_behind_the_vocabulary_is_not_counted() -> None:
    logits, targets = logits_of(9), torch.arange(9)
    padded = torch.cat([logits, torch.full((9, 6), 30.0)], 1)
    cut = cut_around_targets(padded, targets, None, vocab_size=50, top_k=20, top_p=0.7)
    assert cut[:, 50:].all()
    assert torch.equal(cut[:, :50], cut_around_targets(logits, targets, None, vocab_size=50, top_k=20, top_p=0.7))


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_a_score_that_is_no_number_stops_and_names_the_row(value: str) -> None:
    rows = make_rows(3, 50, seed=1)
    for number, row in enumerate(rows, start=7):
        row.index = number
    scores = [torch.zeros(len(row)) for row in rows]
    check_scores(rows, scores, "log-probability of a token")
    scores[1][2] = float(value)
    with pytest.raises(NonFiniteLoss, match=rf"log-probability of a token is {value} for data rows \[8\]"):
        check_scores(rows, scores, "log-probability of a token")
