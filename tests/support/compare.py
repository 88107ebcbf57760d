"""Relative differences between what was found and what was wanted."""

from collections.abc import Mapping, Sequence

from torch import Tensor


def relative_differences(found: Sequence[float], wanted: Sequence[float]) -> list[float]:
    """|found - wanted| / |wanted|, one by one."""
    return [abs(a - b) / abs(b) for a, b in zip(found, wanted, strict=True)]


def largest_difference(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> float:
    """The largest |found - wanted| / |wanted| (Frobenius norms) of all tensors, which must have the same names."""
    assert set(found) == set(wanted), sorted(set(found) ^ set(wanted))[:8]
    return max(float((found[name] - value).norm() / value.norm()) for name, value in wanted.items())
