"""Planning and collating: every group once, ranks in step, rows whole."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_lora.data.batch import Row, sum_by_row
from megatron_lora.data.bins import PACKING_ALGORITHMS, modified_first_fit_decreasing, sorted_by_length
from megatron_lora.data.packing import collate, padded_group_lengths, plan_micro_batches, split_by_row, unpack
from megatron_lora.errors import UserError

lengths_strategy = st.lists(st.integers(1, 70), min_size=0, max_size=40)


def tokens(members: list[int], lengths: list[int]) -> int:
    return sum(lengths[position] for position in members)


@settings(max_examples=150, deadline=None)
@given(
    lengths=lengths_strategy,
    dp_size=st.integers(1, 5),
    multiple=st.integers(1, 4),
    limit=st.one_of(
        st.builds(lambda n: {"max_groups": n}, st.integers(1, 6)),
        st.builds(
            lambda n, algorithm: {"max_tokens": n, "algorithm": algorithm},
            st.integers(10, 200),
            st.sampled_from(sorted(PACKING_ALGORITHMS)),
        ),
        st.builds(lambda n: {"max_tokens": n, "dynamic": True}, st.integers(10, 200)),
    ),
)
def test_plan_has_every_group_once_within_the_limit(lengths, dp_size, multiple, limit) -> None:
    plan = plan_micro_batches(lengths, dp_size=dp_size, micro_batch_multiple=multiple, **limit)
    again = plan_micro_batches(lengths, dp_size=dp_size, micro_batch_multiple=multiple, **limit)
    assert plan == again
    assert len(plan) == dp_size
    assert {len(rank) for rank in plan} == {len(plan[0])}
    assert len(plan[0]) > 0 and len(plan[0]) % multiple == 0
    everyone = list(itertools.chain.from_iterable(itertools.chain.from_iterable(plan)))
    assert sorted(everyone) == list(range(len(lengths)))
    for members in itertools.chain.from_iterable(plan):
        if "max_groups" in limit:
            assert len(members) <= limit["max_groups"]
        elif len(members) > 1:
            cost = tokens(members, lengths)
            if limit.get("dynamic"):
                cost = len(members) * max(lengths[position] for position in members)
            assert cost <= limit["max_tokens"]


@settings(max_examples=100, deadline=None)
@given(lengths=lengths_strategy, dp_size=st.integers(1, 4), multiple=st.integers(1, 3))
def test_no_rank_idles_while_another_could_share(lengths, dp_size, multiple) -> None:
    plan = plan_micro_batches(lengths, dp_size=dp_size, micro_batch_multiple=multiple, max_tokens=150)
    bins = list(itertools.chain.from_iterable(plan))
    if any(not members for members in bins):
        assert max(map(len, bins)) <= 1


def test_plan_balances_tokens_over_ranks() -> None:
    lengths = [100, 10, 10, 10, 10, 10, 10, 40]
    plan = plan_micro_batches(lengths, dp_size=2, max_groups=1)
    loads = [sum(tokens(members, lengths) for members in rank) for rank in plan]
    # Four micro-batches on each rank: 100 with three tens, or 40 with three.
    assert sorted(loads) == [70, 130]
    assert [tokens(members, lengths) for members in plan[0]] == [100, 10, 10, 10]  # longest first


def test_packing_reaches_the_hand_made_optimum() -> None:
    # 6 + 4, 6 + 4, 5 + 3 + 2, 5 + 3 + 2
    bins = modified_first_fit_decreasing([2, 3, 5, 6, 4, 2, 3, 5, 6, 4], 10)
    assert len(bins) == 4


def test_modified_first_fit_decreasing_beats_first_fit_decreasing_on_its_worst_case() -> None:
    """Johnson and Garey's kind of instance: small pairs next to the large group save bins that plain FFD wastes."""
    lengths = [51] * 6 + [27] * 6 + [26] * 6 + [23] * 12
    modified = PACKING_ALGORITHMS["modified_first_fit_decreasing"](lengths, 100, 0)
    plain = PACKING_ALGORITHMS["first_fit_decreasing"](lengths, 100, 0)
    assert len(modified) < len(plain) == 11


def test_dynamic_batches_hold_like_lengths() -> None:
    assert sorted_by_length([9, 1, 8, 2], 18) == [[1, 3], [2, 0]]
    plan = plan_micro_batches([60, 65, 66], dp_size=1, max_tokens=128, dynamic=True, length_round=64)
    assert sorted(map(sorted, plan[0])) == [[0], [1], [2]]  # 65 counts as 128


def test_unknown_algorithm_and_contradictory_limits() -> None:
    with pytest.raises(UserError, match="algorithm='best'.*concatenative"):
        plan_micro_batches([1], dp_size=1, max_tokens=8, algorithm="best")
    with pytest.raises(ValueError, match="one of max_groups and max_tokens"):
        plan_micro_batches([1], dp_size=1)


@st.composite
def rows(draw) -> list[Row]:
    result = []
    for number in range(draw(st.integers(1, 6))):
        length = draw(st.integers(1, 12))
        generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
        mask = torch.rand(length, generator=generator) > 0.5
        mask[0] = False
        values = torch.randn(length, generator=generator)
        values[0] = 0
        result.append(
            Row(
                torch.randint(1, 100, (length,), generator=generator),
                mask,
                index=number + 1,
                token_fields={"advantages": values, "candidates": values[:, None] * torch.tensor([1.0, 2.0, 3.0])},
                row_fields={"reference": float(number) / 4},
            )
        )
    return result


@settings(max_examples=100, deadline=None)
@given(rows=rows(), row_multiple=st.sampled_from([1, 2, 4, 8]), total_multiple=st.sampled_from([1, 2, 6, 16]))
def test_unpack_undoes_collate(rows, row_multiple, total_multiple) -> None:
    batch = collate(rows, pad_token_id=0, row_multiple=row_multiple, total_multiple=total_multiple)
    total = batch.tokens.numel()
    assert total % total_multiple == 0
    sizes = batch.cu_seqlens.diff()
    assert (sizes % row_multiple == 0).all() and batch.cu_seqlens[0] == 0 and batch.cu_seqlens[-1] == total
    assert batch.cu_seqlens.dtype == torch.int32 and batch.max_seqlen == int(sizes.max())
    assert padded_group_lengths([rows], row_multiple) == [int(sizes[: len(rows)].sum())]
    for start, end in itertools.pairwise(batch.cu_seqlens.tolist()):
        assert batch.positions[start:end].tolist() == list(range(end - start))
    assert int(batch.target_mask.sum()) == sum(row.num_targets for row in rows)
    back = unpack(batch)
    assert len(back) == len(rows)
    for ours, theirs in zip(back, rows, strict=True):
        assert torch.equal(ours.input_ids, theirs.input_ids) and torch.equal(ours.target_mask, theirs.target_mask)
        assert ours.token_fields.keys() == theirs.token_fields.keys()
        assert all(torch.equal(value, theirs.token_fields[name]) for name, value in ours.token_fields.items())
        assert ours.row_fields == theirs.row_fields and ours.index == theirs.index


def test_collate_by_hand() -> None:
    first = Row(torch.tensor([5, 6, 7]), torch.tensor([False, True, True]), 3, {"a": torch.tensor([0.0, 1.0, 2.0])})
    second = Row(torch.tensor([8, 9]), torch.tensor([False, True]), 4, {"a": torch.tensor([0.0, 3.0])})
    batch = collate([first, second], pad_token_id=1, row_multiple=2, total_multiple=8)
    assert batch.tokens.tolist() == [5, 6, 7, 1, 8, 9, 1, 1]
    assert batch.targets.tolist() == [6, 7, 1, 1, 9, 1, 1, 1]
    assert batch.target_mask.tolist() == [True, True, False, False, True, False, False, False]
    assert batch.positions.tolist() == [0, 1, 2, 3, 0, 1, 0, 1]
    assert batch.row_of_token.tolist() == [0, 0, 0, 0, 1, 1, 2, 2]
    assert batch.cu_seqlens.tolist() == [0, 4, 6, 8]
    assert batch.token_fields["a"].tolist() == [1, 2, 0, 0, 3, 0, 0, 0]
    assert (batch.row_indices, batch.row_lengths, batch.num_rows) == ([3, 4, -1], [3, 2, 0], 3)
    values = torch.arange(8.0)
    assert [piece.tolist() for piece in split_by_row(values, batch)] == [[0, 0, 1], [0, 4]]
    assert sum_by_row(values, batch).tolist() == [1, 4, 0]
    moved = batch.to("cpu")
    assert moved.row_lengths == batch.row_lengths and torch.equal(moved.tokens, batch.tokens)


def test_an_empty_micro_batch_has_one_masked_row_and_the_fields_of_the_others() -> None:
    like = Row(
        torch.tensor([1, 2]), torch.tensor([False, True]), 1, {"a": torch.zeros(2), "b": torch.zeros(2, 3)}, {"r": 1.0}
    )
    batch = collate([], pad_token_id=7, row_multiple=4, total_multiple=6, like=like)
    assert batch.tokens.tolist() == [7] * 12
    assert not batch.target_mask.any() and batch.row_indices == [-1] and batch.cu_seqlens.tolist() == [0, 12]
    assert batch.token_fields["b"].shape == (12, 3)
    assert batch.token_fields["a"].shape == (12,) and batch.row_fields["r"].tolist() == [0.0]
    assert unpack(batch) == []


def test_fixed_total_and_what_does_not_fit() -> None:
    row = Row(torch.tensor([1, 2, 3]), torch.tensor([False, True, True]))
    assert collate([row], pad_token_id=0, fixed_total=10).cu_seqlens.tolist() == [0, 3, 10]
    assert collate([], pad_token_id=0, fixed_total=10).cu_seqlens.tolist() == [0, 10]
    with pytest.raises(ValueError, match="3 tokens of 1 rows do not fit"):
        collate([row], pad_token_id=0, fixed_total=2)
    other = Row(torch.tensor([1, 2]), torch.tensor([False, True]), 2, {"a": torch.zeros(2)})
    with pytest.raises(ValueError, match="must have the same"):
        collate([row, other], pad_token_id=0)
