"""The adapter as it was when the run began: put back for as long as a reference policy is asked for, and compared."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def copies(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """The parameters' present values, in memory of their own."""
    return [parameter.detach().clone() for parameter in parameters]


@contextmanager
def holding(parameters: Sequence[nn.Parameter], values: Sequence[Tensor]) -> Iterator[None]:
    """Within it the parameters have `values` (equal shapes); bit for bit as before afterwards, also on an exception."""
    before = copies(parameters)
    try:
        _put(parameters, values)
        yield
    finally:
        _put(parameters, before)


@torch.no_grad()
def _put(parameters: Sequence[nn.Parameter], values: Sequence[Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)
