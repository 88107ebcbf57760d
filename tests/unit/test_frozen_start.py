"""The starting adapter put back for a reference: there within the block, and as before after it, whatever happens."""

import pytest
import torch
from torch import nn

from megatron_lora.policy.frozen_start import copies, holding


def parameters() -> list[nn.Parameter]:
    return [nn.Parameter(torch.arange(3.0)), nn.Parameter(torch.ones(2, 2, dtype=torch.bfloat16))]


def test_values_are_there_within_and_gone_after() -> None:
    trained = parameters()
    start = copies(trained)
    with torch.no_grad():
        for parameter in trained:
            parameter.add_(1)
    now, places = copies(trained), [parameter.data_ptr() for parameter in trained]
    with holding(trained, start):
        assert all(torch.equal(parameter, value) for parameter, value in zip(trained, start, strict=True))
    assert all(torch.equal(parameter, value) for parameter, value in zip(trained, now, strict=True))
    # Optimizers and gradient buffers point at this memory.
    assert [parameter.data_ptr() for parameter in trained] == places
    assert all(parameter.requires_grad for parameter in trained)


def test_restored_after_an_exception() -> None:
    trained = parameters()
    zeros = [torch.zeros_like(parameter) for parameter in trained]
    with pytest.raises(RuntimeError, match="in between"), holding(trained, zeros):
        raise RuntimeError("in between")
    assert trained[0].tolist() == [0, 1, 2] and trained[1].tolist() == [[1, 1], [1, 1]]


def test_restored_where_the_values_do_not_fit() -> None:
    trained = parameters()
    with pytest.raises(RuntimeError), holding(trained, [torch.zeros(3), torch.zeros(5, dtype=torch.bfloat16)]):
        pass
    assert trained[0].tolist() == [0, 1, 2] and trained[1].tolist() == [[1, 1], [1, 1]]
