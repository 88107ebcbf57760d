"""What follows from an adapter's factors is kept between updates: scores after each event that changes the factors."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from megatron_lora.data.batch import Row
from megatron_lora.objectives.sft import SFTObjective
from megatron_lora.policy.interface import Policy

# (event, whether the linears were not told of it) -> the scored rows' log-probabilities
Scores = dict[tuple[str, bool], list[Tensor]]
EVENTS = ("step", "reference", "back", "load")


def scores_after_changes(
    policy: Policy, linears: Iterable[Any], train: list[Row], rows: list[Row], out: Path
) -> Scores:
    """Each event twice: as it is, and with the planted fault that the linears are not told of it. `reference`: within
    the switch, `back`: after it. linears: the adapted ones. Collective; writes a checkpoint into `out`."""
    linears = list(linears)
    policy.save(out, None)
    found: Scores = {}
    for stale in (False, True):
        for event, happen in _events(policy, train, rows, out).items():
            policy.score(rows)  # fills what is kept
            found[event, stale] = happen(_deaf(linears) if stale else nullcontext())
            for linear in linears:
                linear.factors_changed()
    return found


def _deaf(linears: list[Any]) -> AbstractContextManager[Any]:
    owner = next(kind for kind in type(linears[0]).__mro__ if "factors_changed" in vars(kind))
    return mock.patch.object(owner, "factors_changed", lambda self: None)


Happen = Callable[[AbstractContextManager[Any]], list[Tensor]]


def _events(policy: Policy, train: list[Row], rows: list[Row], out: Path) -> dict[str, Happen]:
    def step(fault: AbstractContextManager[Any]) -> list[Tensor]:
        with fault:
            policy.train_step([[row] for row in train], SFTObjective())
            return policy.score(rows)

    def reference(fault: AbstractContextManager[Any]) -> list[Tensor]:
        with fault, policy.reference():
            return policy.score(rows)

    def back(fault: AbstractContextManager[Any]) -> list[Tensor]:
        switch = policy.reference()
        switch.__enter__()
        policy.score(rows)
        with fault:
            switch.__exit__(None, None, None)
            return policy.score(rows)

    def load(fault: AbstractContextManager[Any]) -> list[Tensor]:
        with fault:
            policy.load(out, None)
            return policy.score(rows)

    return {"step": step, "reference": reference, "back": back, "load": load}


def assert_never_stale(kept: Scores, anew: Scores) -> None:
    """kept: of a policy that keeps its norms; anew: of the same that computes them in every forward pass."""
    for event in EVENTS:
        for stale in (False, True):
            distance = _distance(kept[event, stale], anew[event, stale])
            assert distance > 1e-3 if stale else distance < 1e-5, (event, stale, distance)


def _distance(left: list[Tensor], right: list[Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(left, right, strict=True)) if left else float(torch.inf)
