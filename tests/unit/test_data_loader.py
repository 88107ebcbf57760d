"""Global batches: an order from the seed alone, resumed exactly."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_lora.data.loader import GroupLoader
from megatron_lora.errors import UserError


def take(loader: GroupLoader, count: int) -> list[list[int]]:
    return list(itertools.islice(loader.forever(), count))


@settings(max_examples=80, deadline=None)
@given(
    size=st.integers(1, 30),
    batch=st.integers(1, 8),
    seed=st.integers(0, 100),
    drop_last=st.booleans(),
    taken=st.integers(0, 20),
)
def test_resumes_exactly_where_it_stood(size, batch, seed, drop_last, taken) -> None:
    if drop_last and size < batch:
        return
    options = {"seed": seed, "drop_last": drop_last}
    whole = take(GroupLoader(range(size), batch, **options), taken + 10)
    first = GroupLoader(range(size), batch, **options)
    assert take(first, taken) == whole[:taken]
    second = GroupLoader(range(size), batch, **options)
    second.load_state_dict(first.state_dict())
    assert take(second, 10) == whole[taken:]


def test_epochs_cover_the_data_once_in_orders_of_their_own() -> None:
    loader = GroupLoader(range(10), 3, seed=5, drop_last=False)
    epochs = [list(itertools.chain.from_iterable(loader)) for _ in range(3)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] and epochs[0] != list(range(10))
    assert list(itertools.chain.from_iterable(GroupLoader(range(10), 3, seed=5, drop_last=False))) == epochs[0]
    assert list(itertools.chain.from_iterable(GroupLoader(range(10), 3, seed=6, drop_last=False))) != epochs[0]
    assert len(loader) == 4 and loader.epoch == 3


def test_training_batches_are_whole_and_file_order_is_kept() -> None:
    loader = GroupLoader(range(7), 3, shuffle=False)
    assert list(loader) == [[0, 1, 2], [3, 4, 5]] and len(loader) == 2
    assert take(loader, 3) == [[0, 1, 2], [3, 4, 5], [0, 1, 2]]
    assert list(GroupLoader(range(7), 3, shuffle=False, drop_last=False))[-1] == [6]


def test_another_batch_size_goes_on_at_the_same_row() -> None:
    first = GroupLoader(range(12), 4, shuffle=False)
    take(first, 2)
    second = GroupLoader(range(12), 2, shuffle=False)
    second.load_state_dict(first.state_dict())
    assert take(second, 2) == [[8, 9], [10, 11]]


def test_mistakes() -> None:
    with pytest.raises(UserError, match="policy.train_global_batch_size=8, but the data set has only 3 usable rows"):
        GroupLoader(range(3), 8)
    with pytest.raises(UserError, match="grpo.num_prompts_per_step=0 must be at least 1"):
        GroupLoader(range(3), 0, size_key="grpo.num_prompts_per_step")
    with pytest.raises(UserError, match="num_items=3.*num_items=4"):
        GroupLoader(range(4), 2).load_state_dict(GroupLoader(range(3), 2).state_dict())
    with pytest.raises(UserError, match="seed=1"):
        GroupLoader(range(3), 2, seed=2).load_state_dict(GroupLoader(range(3), 2, seed=1).state_dict())


def test_neighbouring_seeds_have_no_order_in_common() -> None:
    orders = []
    for seed in (42, 43, 44):
        loader = GroupLoader(range(50), 50, seed=seed)
        for epoch in range(3):
            loader.epoch, loader.position = epoch, 0
            orders.append(next(iter(loader)))
    assert len({tuple(order) for order in orders}) == len(orders) == 9


def test_other_orders_are_refused_in_mid_epoch_only() -> None:
    first = GroupLoader(range(12), 4, seed=3)
    take(first, 2)
    state = first.state_dict()
    with pytest.raises(UserError, match=r"data\.shuffle=true, in the middle of an epoch \(8 of 12 rows seen\)"):
        GroupLoader(range(12), 4, seed=3, shuffle=False).load_state_dict(state)
    with pytest.raises(UserError, match="order of rows in epoch 1 is not the one"):
        GroupLoader(range(12), 4, seed=3).load_state_dict(state | {"order": "other"})
    take(first, 1)
    second = GroupLoader(range(12), 4, seed=3, shuffle=False)
    second.load_state_dict(first.state_dict())
    assert take(second, 1) == [[0, 1, 2, 3]]


def test_states_of_older_releases_go_on_with_a_notice() -> None:
    first = GroupLoader(range(12), 4, seed=3)
    take(first, 2)
    old = {key: first.state_dict()[key] for key in ("epoch", "position", "seed", "num_items")}
    second = GroupLoader(range(12), 4, seed=3)
    [notice] = second.check_state(old)
    assert "older release" in notice and first.state_dict() == GroupLoader(range(12), 4, seed=3).state_dict() | {
        "position": 8
    }
    second.load_state_dict(old)
    assert take(second, 1) == take(first, 1)


def test_steps_left_are_counted_from_the_row_with_another_batch_size() -> None:
    first = GroupLoader(range(12), 2, shuffle=False)
    take(first, 4)
    second = GroupLoader(range(12), 4, shuffle=False)
    [notice] = second.check_state(first.state_dict())
    assert "policy.train_global_batch_size was 2, is 4" in notice
    assert second.has_another_batch_size(first.state_dict())
    assert [second.batches_left(first.state_dict(), epochs) for epochs in (1, 2, 3)] == [1, 4, 7]
    assert first.batches_left(first.state_dict(), 2) == 8
