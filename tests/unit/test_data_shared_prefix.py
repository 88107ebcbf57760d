"""Rows that begin alike: each target is predicted from its row's own tokens, and what rows share stands there once."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_lora.config.schema_policy import PolicyConfig
from megatron_lora.data.batch import MicroBatch, Row, sum_by_row
from megatron_lora.data.packing import row_places, split_by_row
from megatron_lora.data.shared_prefix import collate_families, find_families
from megatron_lora.policy.batching import BatchingOptions, Groups, Share, divide


def make_row(prompt: list[int], answer: list[int], index: int = 0) -> Row:
    ids = torch.tensor(prompt + answer)
    return Row(
        input_ids=ids,
        target_mask=torch.arange(len(ids)) >= len(prompt),
        index=index,
        token_fields={"old": ids * 0.5, "both": torch.stack([ids * 0.5, ids * 2.0], 1)},
        row_fields={"reward": float(index)},
    )


def answers_to(prompt_length: int, answer_lengths: list[int], seed: int) -> list[Row]:
    draw = torch.Generator().manual_seed(seed)
    prompt = torch.randint(3, 99, (prompt_length,), generator=draw).tolist()
    return [
        make_row(prompt, torch.randint(3, 99, (length,), generator=draw).tolist(), 1 + number)
        for number, length in enumerate(answer_lengths)
    ]


def what_predicts(batch: MicroBatch, target: int) -> tuple[list[int], list[int]]:
    """The tokens that the model has read where it predicts a target, and their positions."""
    keys, source = batch.shared_keys, int(batch.sources[target])  # type: ignore[index]
    assert keys is not None
    segment = next(i for i, stop in enumerate(keys.query_bounds[1:]) if source < stop)
    later = keys.query_bounds[segment + 1] - 1 - source
    seen = keys.index[keys.key_bounds[segment] : keys.key_bounds[segment + 1] - later]
    assert int(seen[-1]) == source
    return batch.tokens[seen].tolist(), batch.positions[seen].tolist()


def check_batch(batch: MicroBatch, rows: list[Row]) -> None:
    """Every target of every row once, predicted from what stands before it in its row."""
    wanted = [(number, place) for number, row in enumerate(rows) for [place] in row.target_mask.nonzero().tolist()]
    assert batch.target_positions is not None
    found = list(zip(batch.row_of_token.tolist(), batch.target_positions.tolist(), strict=True))
    assert found == wanted and bool(batch.target_mask.all())
    for target, (number, place) in enumerate(wanted):
        ids = rows[number].input_ids.tolist()
        assert int(batch.targets[target]) == ids[place]
        assert batch.token_fields["old"][target] == ids[place] * 0.5
        assert batch.token_fields["both"][target].tolist() == [ids[place] * 0.5, ids[place] * 2.0]
        assert what_predicts(batch, target) == (ids[:place], list(range(place)))


@settings(max_examples=60, deadline=None)
@given(
    families=st.lists(
        st.tuples(st.integers(1, 6), st.lists(st.integers(1, 5), min_size=1, max_size=4)), min_size=1, max_size=4
    ),
    multiple=st.integers(1, 8),
)
def test_targets_are_predicted_from_their_own_rows(families: list[tuple[int, list[int]]], multiple: int) -> None:
    groups = [(prompt, answers_to(prompt, lengths, seed)) for seed, (prompt, lengths) in enumerate(families)]
    rows = [row for _, members in groups for row in members]
    shared = [(prompt if len(members) > 1 else 0, members) for prompt, members in groups]
    batch = collate_families(shared, pad_token_id=0, total_multiple=multiple)
    check_batch(batch, rows)
    assert batch.tokens.numel() % multiple == 0
    used = sum(prompt + sum(lengths) for prompt, lengths in families)
    assert used <= batch.tokens.numel() < used + multiple
    assert batch.bounds == batch.cu_seqlens.tolist() and batch.bounds[-1] == batch.tokens.numel()
    assert batch.row_indices[: len(rows)] == [row.index for row in rows]
    pieces = split_by_row(batch.token_fields["old"], batch)
    for row, piece in zip(rows, pieces, strict=True):
        assert torch.equal(piece, torch.where(row.target_mask, row.token_fields["old"], 0.0))
    sums = sum_by_row(batch.token_fields["old"], batch)[: len(rows)]
    assert sums.tolist() == pytest.approx([float(row.token_fields["old"][row.target_mask].sum()) for row in rows])


def test_eight_answers_read_their_prompt_once() -> None:
    rows = answers_to(300, [100] * 8, 0)
    share = divide_rows([[row] for row in rows], max_tokens=4096)
    assert share.num_tokens == 1100 == share.batches[0].tokens.numel()
    keys = share.batches[0].shared_keys
    assert keys is not None and (keys.max_queries, keys.max_keys) == (300, 400)
    assert divide_rows([[row] for row in rows], max_tokens=4096, shared=False).num_tokens == 3200


def test_a_row_without_targets_has_a_place_but_predicts_nothing() -> None:
    rows = [Row(torch.tensor([5, 6, 7 + n]), torch.zeros(3, dtype=torch.bool), index=n) for n in range(2)]
    batch = collate_families([(2, rows)], pad_token_id=0)
    assert batch.targets.numel() == 1 and not batch.target_mask.any()
    values, places = row_places(batch)
    assert values.numel() == places.numel() == 0


def divide_rows(
    groups: Groups, *, max_tokens: int | None = None, rows: int = 1, shared: bool = True, dp: int = 1, **options: Any
) -> Share:
    """Rank 0's part, after looking at every rank's."""
    policy = PolicyConfig.model_validate(
        {
            "model_name": "m",
            "train_global_batch_size": 64,
            "train_micro_batch_size": rows,
            "sequence_packing": {"enabled": max_tokens is not None, "train_mb_tokens": max_tokens},
        }
    )
    wanted = BatchingOptions(pad_token_id=0, shares_prefixes=shared, **options)
    shares = [divide(groups, policy, wanted, dp_size=dp, dp_rank=rank, purpose="training") for rank in range(dp)]
    assert all(share.plan == shares[0].plan for share in shares)
    everyone = [position for share in shares for members in share.groups for position in members]
    assert sorted(everyone) == list(range(len(groups)))
    for share in shares:
        for batch, members in zip(share.batches, share.groups, strict=True):
            in_order = [row for position in members for row in groups[position]]
            assert batch.row_indices[: len(in_order)] == [row.index for row in in_order]
            if batch.shared_keys is not None:
                check_batch(batch, in_order)
    return shares[0]


def test_families_keep_to_the_limits_of_a_micro_batch() -> None:
    groups = [[row] for seed in range(3) for row in answers_to(20, [10] * 4, seed)]
    # 60 tokens a family of four: one a micro-batch, or halves of 40.
    assert [len(members) for members in divide_rows(groups, max_tokens=60).groups] == [4, 4, 4]
    assert [len(members) for members in divide_rows(groups, max_tokens=59).groups] == [2] * 6
    assert [len(members) for members in divide_rows(groups, rows=2).groups] == [2] * 6
    assert divide_rows(groups, rows=1).batches[0].shared_keys is None


def test_every_rank_has_a_part_of_one_family() -> None:
    groups = [[row] for row in answers_to(20, [10] * 8, 0)]
    share = divide_rows(groups, max_tokens=1000, dp=2)
    assert [sum(len(members) for members in rank) for rank in share.plan] == [4, 4]
    assert share.num_tokens == 2 * (20 + 40)
    stages = divide_rows(groups, max_tokens=1000, micro_batch_multiple=2, equal_totals=True, total_multiple=8)
    assert len({batch.tokens.numel() for batch in stages.batches}) == 1 and len(stages.batches) == 2


def test_pairs_share_what_stands_before_both_answers() -> None:
    pairs = [
        [make_row([5, 6, 7], [8, 9], 1), make_row([5, 6, 7], [4], 2)],
        [make_row([5, 6], [1], 3), make_row([5, 7], [2], 4)],
    ]
    families = find_families(pairs, max_tokens=None, max_groups=None, min_families=1)
    assert [(family.groups, family.prefix, family.num_tokens) for family in families] == [((0,), 3, 6), ((1,), 1, 5)]
    share = divide_rows(pairs, rows=2)
    assert share.num_tokens == 11
    assert sorted(share.batches[0].row_indices) == [1, 2, 3, 4]


def test_rows_whose_prompt_is_unknown_stand_alone() -> None:
    rows = answers_to(4, [3, 3, 3], 0)
    rows[0].target_mask[:] = False
    families = find_families([[row] for row in rows], max_tokens=None, max_groups=None, min_families=1)
    assert [family.groups for family in families] == [(0,), (1, 2)]
