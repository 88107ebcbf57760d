"""The start put back for a reference: there within the block, and as before after it, whatever happens."""

import pytest
import torch
from torch import nn

from megatron_lora.policy.frozen_start import FrozenStart

ON_CPU = pytest.mark.parametrize("on_cpu", [True, False])


def parameters() -> list[nn.Parameter]:
    return [nn.Parameter(torch.arange(3.0)), nn.Parameter(torch.ones(2, 2, dtype=torch.bfloat16))]


def values(trained: list[nn.Parameter]) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in trained]


def same(one: list, other: list) -> bool:
    return all(map(torch.equal, one, other))


@ON_CPU
def test_values_are_there_within_and_gone_after(on_cpu: bool) -> None:
    trained = parameters()
    start, began = FrozenStart(trained, on_cpu=on_cpu), values(trained)
    assert start.equals(trained) and start.num_bytes == 3 * 4 + 4 * 2
    with torch.no_grad():
        for parameter in trained:
            parameter.add_(1)
    now, places = values(trained), [parameter.data_ptr() for parameter in trained]
    assert not start.equals(trained)
    for _ in range(2):
        with start.put_back(trained):
            assert same(trained, began)
        assert same(trained, now)
    # Optimizers and gradient buffers point at this memory.
    assert [parameter.data_ptr() for parameter in trained] == places
    assert all(parameter.requires_grad for parameter in trained)


@ON_CPU
def test_restored_after_an_exception(on_cpu: bool) -> None:
    trained = parameters()
    start, began = FrozenStart(trained, on_cpu=on_cpu), values(trained)
    with torch.no_grad():
        trained[0].zero_()
    with pytest.raises(RuntimeError, match="in between"), start.put_back(trained):
        raise RuntimeError("in between")
    assert trained[0].tolist() == [0, 0, 0] and trained[1].tolist() == [[1, 1], [1, 1]]
    with start.put_back(trained):
        assert same(trained, began)


def test_restored_where_the_values_do_not_fit() -> None:
    trained = parameters()
    start = FrozenStart(trained)
    with torch.no_grad():
        trained[0].add_(1)
    other = [trained[0], nn.Parameter(torch.ones(5, dtype=torch.bfloat16))]
    with pytest.raises(ValueError, match="is not the"), start.put_back(other):
        pass
    assert trained[0].tolist() == [1, 2, 3]
