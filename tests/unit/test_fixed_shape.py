"""Micro-batches stretched to few shapes: what the model is given beyond them, and that nothing of theirs changes."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_lora.data.batch import MicroBatch, Row
from megatron_lora.data.fixed_shape import fixed_shape, stretched
from megatron_lora.data.packing import collate
from megatron_lora.data.shared_prefix import collate_families

PAD = 7


def row(length: int, prompt: int, first: int = 1) -> Row:
    ids = torch.arange(first, first + length)
    ids[:prompt] = torch.arange(100, 100 + prompt)
    return Row(ids, torch.arange(length) >= max(1, prompt))


def plain(lengths: list[int]) -> MicroBatch:
    return collate([row(length, 1) for length in lengths], pad_token_id=PAD)


def shared(families: list[list[int]], prompt: int = 5) -> MicroBatch:
    members = [[row(prompt + n, prompt, 10 * i) for i, n in enumerate(answers)] for answers in families]
    return collate_families([(prompt, rows) for rows in members], pad_token_id=PAD)


def keys_of(batch: MicroBatch) -> list[list[int]]:
    """The tokens that each query sees, one list a query of the model's sequence."""
    if batch.shared_keys is None:
        return [list(range(a, q + 1)) for a, b in pairwise(batch.cu_seqlens.tolist()) for q in range(a, b)]
    found = []
    keys = batch.shared_keys
    for (a, b), (c, d) in zip(pairwise(keys.cu_queries.tolist()), pairwise(keys.cu_keys.tolist()), strict=True):
        assert b - a <= keys.max_queries and d - c <= keys.max_keys and d - c >= b - a
        found += [keys.index[c : d - (b - 1 - q)].tolist() for q in range(a, b)]
    return found


def assert_stretched(batch: MicroBatch) -> None:
    shape = fixed_shape(batch)
    after = stretched(batch, shape, PAD)
    used, targets = batch.tokens.numel(), batch.targets.numel()

    def begins_as(ours: Tensor | None, theirs: Tensor | None) -> bool:
        return ours is theirs or torch.equal(ours[: theirs.numel()], theirs)  # type: ignore[index, union-attr]

    for name in ("tokens", "positions", "targets", "sources"):
        assert begins_as(getattr(after, name), getattr(batch, name)), name
    assert after.tokens.numel() == after.positions.numel() == shape.tokens
    assert after.cu_seqlens.numel() == shape.segments + 1 and after.cu_seqlens[-1] == shape.tokens
    assert after.bounds == after.cu_seqlens.tolist()
    assert int(after.positions.max()) < after.max_seqlen == shape.longest
    assert max(b - a for a, b in pairwise(after.bounds)) <= shape.longest
    seen, before = keys_of(after), keys_of(batch)
    assert seen[:used] == before
    # What fills up sees nothing but itself.
    assert all(min(keys) >= used for keys in seen[used:])
    if batch.shared_keys is not None:
        assert after.shared_keys is not None and after.shared_keys.index.numel() == shape.keys
        assert after.targets.numel() == after.sources.numel() == shape.targets >= targets  # type: ignore[union-attr]
    # Few shapes: what comes on top is bounded.
    assert shape.tokens <= max(128, used * 1.26 + 64)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 300), min_size=1, max_size=40))
def test_plain_rows(lengths: list[int]) -> None:
    assert_stretched(plain(lengths))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.integers(1, 80), min_size=2, max_size=9), min_size=1, max_size=6), st.integers(1, 90))
def test_rows_that_share_prefixes(families: list[list[int]], prompt: int) -> None:
    assert_stretched(shared(families, prompt))


def test_like_batches_have_one_shape() -> None:
    lengths = [[37, 120, 64], [121, 63, 40], [50, 60, 110]]
    assert len({fixed_shape(plain(some)) for some in lengths}) == 1
    assert fixed_shape(plain([2000])) != fixed_shape(plain([900]))


@pytest.mark.parametrize("batch", [plain([60, 50]), shared([[30, 25], [20, 40]])], ids=["plain", "shared"])
def test_every_batch_of_a_shape_fits_the_same_buffers(batch: MicroBatch) -> None:
    shape = fixed_shape(batch)
    other = plain([40, 64]) if batch.shared_keys is None else shared([[31, 26], [21, 39]])
    assert fixed_shape(other) == shape
    first, second = stretched(batch, shape, PAD), stretched(other, shape, PAD)
    for name in ("tokens", "positions", "targets", "cu_seqlens"):
        assert getattr(first, name).shape == getattr(second, name).shape
