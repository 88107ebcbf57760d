"""Which tokens of a packed micro-batch each context-parallel rank holds."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_lora.runtime.context_parallel import local_token_indices


def test_two_ranks_hold_the_outer_and_the_inner_chunks_of_each_sequence():
    bounds = torch.tensor([0, 8, 12])
    assert local_token_indices(bounds, 2, 0).tolist() == [0, 1, 6, 7, 8, 11]
    assert local_token_indices(bounds, 2, 1).tolist() == [2, 3, 4, 5, 9, 10]


def test_one_rank_holds_everything_whatever_the_lengths():
    assert local_token_indices(torch.tensor([0, 3, 8]), 1, 0).tolist() == list(range(8))


@settings(deadline=None)
@given(st.integers(2, 4), st.lists(st.integers(1, 5), min_size=1, max_size=4))
def test_ranks_share_tokens_and_causal_work_equally(size, chunks):
    lengths = [2 * size * chunk for chunk in chunks]
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    ranks = [local_token_indices(bounds, size, rank) for rank in range(size)]
    assert torch.equal(torch.cat(ranks).sort().values, torch.arange(sum(lengths)))
    starts = torch.repeat_interleave(bounds[:-1], torch.tensor(lengths))
    # A token attends to all before it in its sequence.
    work = {int((1 + rank - starts[rank]).sum()) for rank in ranks}
    assert len(work) == 1 and len({rank.numel() for rank in ranks}) == 1


def test_a_sequence_that_does_not_divide_is_refused():
    with pytest.raises(AssertionError, match="sequence of 6 tokens is not a multiple of 4"):
        local_token_indices(torch.tensor([0, 8, 14]), 2, 0)
