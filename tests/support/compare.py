"""Relative differences between what was found and what was wanted."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from tests.support.reference import Training


def relative_differences(found: Sequence[float], wanted: Sequence[float]) -> list[float]:
    """|found - wanted| / |wanted|, one by one."""
    return [abs(a - b) / abs(b) for a, b in zip(found, wanted, strict=True)]


def largest_difference(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> float:
    """The largest |found - wanted| / |wanted| (Frobenius norms) of all tensors, which must have the same names."""
    assert set(found) == set(wanted), sorted(set(found) ^ set(wanted))[:8]
    return max(_differences(found, wanted).values())


def _differences(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, float]:
    return {name: float((found[name] - value).norm() / value.norm()) for name, value in wanted.items()}


def assert_same_training(found: Mapping[str, Any], wanted: Training, trained: str, tolerance: float) -> None:
    """Losses and gradient norms of every step, and at the end what trained (a key of `found`)."""
    assert max(relative_differences(found["losses"], wanted.losses)) < tolerance
    assert max(relative_differences(found["grad_norms"], wanted.grad_norms)) < tolerance
    largest = largest_difference(found[trained], wanted.adapter)
    differing = {
        name: value for name, value in _differences(found[trained], wanted.adapter).items() if value > tolerance
    }
    assert largest < tolerance, differing
