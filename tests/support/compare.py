"""Differences between what was found and what was wanted: the largest of them, and where they lie all on one side."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from tests.support.reference import Training, changes_of

# Rounding goes both ways; a dropped or a doubled term shows as a drift of one sign long before it is large. The mean
# signed difference may be this part of the largest that is allowed.
DRIFT = 0.25
RESUMED = 1e-5


def relative_differences(found: Sequence[float], wanted: Sequence[float]) -> list[float]:
    """|found - wanted| / |wanted|, one by one."""
    return [abs(a - b) / abs(b) for a, b in zip(found, wanted, strict=True)]


def drift(found: Sequence[float], wanted: Sequence[float]) -> float:
    """The mean of (found - wanted) / |wanted|, without its sign."""
    return abs(fmean((a - b) / abs(b) for a, b in zip(found, wanted, strict=True)))


def largest_difference(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> float:
    """The largest |found - wanted| / |wanted| (Frobenius norms) of all tensors, which must have the same names."""
    assert set(found) == set(wanted), sorted(set(found) ^ set(wanted))[:8]
    return max(_differences(found, wanted).values())


def _differences(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, float]:
    return {name: float((found[name] - value).norm() / value.norm()) for name, value in wanted.items()}


def assert_same_numbers_of_steps(found: Mapping[str, Any], wanted: Any, tolerance: float) -> None:
    """Losses and gradient norms of every step: the largest relative difference, and the mean signed one."""
    for name in ("losses", "grad_norms"):
        values, others = found[name], wanted[name] if isinstance(wanted, Mapping) else getattr(wanted, name)
        assert max(relative_differences(values, others)) < tolerance, (name, values, others)
        assert drift(values, others) < DRIFT * tolerance, (name, values, others)


def assert_same_training(
    found: Mapping[str, Any], wanted: Training, tolerance: float, *, of_what_trained: float | None = None
) -> None:
    """Losses and gradient norms of every step, and at the end what trained: an adapter, or the whole model.
    of_what_trained: the tolerance of that, where it is another."""
    assert_same_numbers_of_steps(found, wanted, tolerance)
    trained = found["adapter"] if "adapter" in found else found["weights"]
    allowed = of_what_trained or tolerance
    assert set(trained) == set(wanted.adapter), sorted(set(trained) ^ set(wanted.adapter))[:8]
    differing = {name: value for name, value in _differences(trained, wanted.adapter).items() if value > allowed}
    assert not differing, differing


def assert_same_update(found: Mapping[str, Any], wanted: Training, tolerance: float) -> None:
    """The same of a kind whose factors are not unique: what training has added to the weights is compared, to ten times
    the tolerance."""
    assert_same_numbers_of_steps(found, wanted, tolerance)
    assert largest_difference(changes_of(found["config"], found["adapter"]), wanted.adapter) < 10 * tolerance


def assert_same_run(wanted: Mapping[str, Any], again: Mapping[str, Any]) -> None:
    """Bit for bit: every number, what trained at the end, and scores by it."""
    assert again["losses"] == wanted["losses"]
    assert again["grad_norms"] == wanted["grad_norms"]
    assert set(again["adapter"]) == set(wanted["adapter"])
    assert all(torch.equal(again["adapter"][name], value) for name, value in wanted["adapter"].items())
    assert all(torch.equal(mine, other) for mine, other in zip(again["scores"], wanted["scores"], strict=True))


def assert_goes_on_alike(wanted: Mapping[str, Any], again: Mapping[str, Any]) -> None:
    """A run that another layout took over: to 1e-5, the optimizer's moments included (without them the next updates
    would be other ones)."""
    assert_same_numbers_of_steps(again, wanted, RESUMED)
    assert all((a - b).abs().max() < 10 * RESUMED for a, b in zip(again["scores"], wanted["scores"], strict=True))
    if wanted["adapter"]:
        assert largest_difference(again["adapter"], wanted["adapter"]) < RESUMED


def assert_stored_alike(found: Mapping[str, Any]) -> None:
    """A checkpoint's adapter, read in one process, is what the policy held when it was saved, bit for bit."""
    saved, stored = found.get("saved", {}), found.get("stored", {})
    assert set(stored) == set(saved)
    assert all(torch.equal(stored[name], value) for name, value in saved.items())
