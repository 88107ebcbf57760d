"""Faults planted in a policy of either backend on two real ranks: what each does to three steps of training, or to a
checkpoint. A comparison that a fault leaves untouched would not find it in the code either.

The faults themselves: `megatron_fault_checks.py`, `dtensor_fault_checks.py`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from torch import Tensor

from megatron_lora.data.batch import Row
from megatron_lora.objectives.sft import SFTObjective
from megatron_lora.policy.backend import BackendPolicy
from tests.distributed.build import build_policy
from tests.distributed.cases import scored_rows, training_rows
from tests.distributed.policy_checks import train_steps
from tests.support.compare import relative_differences
from tests.support.reference import Training

TOLERANCE, NUM_STEPS = 1e-4, 3
Plant = Callable[[Any], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Fault:
    """plant: what goes wrong within its context, given the policy. keys: of the backend's section. adapter: which of
    `conftest.ADAPTERS`; `dora` with norms that are kept. at_save: looked at in a checkpoint instead of in training."""

    plant: Plant
    keys: dict[str, Any] = field(default_factory=dict)
    adapter: str | None = "shared"
    at_save: bool = False


@contextmanager
def nothing(policy: BackendPolicy) -> Iterator[None]:
    yield


@contextmanager
def local_count(policy: BackendPolicy) -> Iterator[None]:
    """Each rank divides by the targets of its own rows."""
    count = SFTObjective.count

    def local(self: SFTObjective, rows: list[Row]) -> float:
        return count(self, rows[policy.world.dp_rank :: policy.world.dp])

    with mock.patch.object(SFTObjective, "count", local):
        yield


def stale_norm(linear: type) -> Plant:
    """linear: the class of adapted linears, which are not told of a step."""
    return lambda policy: mock.patch.object(linear, "factors_changed", lambda self: None)


def saved_otherwise(parts: Callable[[Any], Sequence[Tensor]], change: Callable[[Tensor], Tensor]) -> Plant:
    """parts: what this rank is to write wrongly, given the policy: nothing on one of the two."""

    @contextmanager
    def plant(policy: BackendPolicy) -> Iterator[None]:
        mine = [part.detach() for part in parts(policy)]
        before = [part.clone() for part in mine]
        for part in mine:
            part.copy_(change(part))
        yield
        for part, value in zip(mine, before, strict=True):
            part.copy_(value)

    return plant


def look_at(faults: Mapping[str, Fault], case: dict[str, Any]) -> dict[str, Any]:
    """What every fault of the case's adapter leaves: losses, gradient norms and what trained, or scores before and
    after a checkpoint."""
    mine = {name: fault for name, fault in faults.items() if fault.adapter == case["adapter"]}
    return {name: _with_fault(case, number, fault) for number, (name, fault) in enumerate(mine.items())}


def _with_fault(case: dict[str, Any], number: int, fault: Fault) -> dict[str, Any]:
    policy = build_policy(case, fault.keys)
    if not fault.at_save:
        with fault.plant(policy):
            found: dict[str, Any] = train_steps(policy, training_rows(NUM_STEPS))
            return found | ({"adapter": policy.adapter().tensors} if fault.adapter is not None else {})
    weights = Path(case["shared_folder"]) / f"{case['name']}_{number}"
    train_steps(policy, training_rows(1))
    before = policy.score(scored_rows())
    with fault.plant(policy):
        policy.save(weights, None)
    policy.load(weights, None)
    return {"before": before, "after": policy.score(scored_rows())}


def assert_training_tells(fault: str, ranks_found: Sequence[Mapping[str, Any]], wanted: Training) -> None:
    """Its three steps are peft's where nothing is planted ("none"), and nowhere else."""
    distances = []
    for found in ranks_found:
        got = found[fault]
        distances.append(
            max(
                *relative_differences(got["losses"], wanted.losses[:NUM_STEPS]),
                *relative_differences(got["grad_norms"], wanted.grad_norms[:NUM_STEPS]),
            )
        )
    assert max(distances) < TOLERANCE if fault.startswith("none") else max(distances) > 3 * TOLERANCE, distances


def assert_checkpoint_tells(fault: str, ranks_found: Sequence[Mapping[str, Any]]) -> None:
    """A policy that loads what it has saved is the same, and with a fault it is not."""
    for found in ranks_found:
        pairs = zip(found[fault]["before"], found[fault]["after"], strict=True)
        distance = max(float((before - after).abs().max()) for before, after in pairs)
        assert distance == 0 if fault.startswith("none") else distance > 3 * TOLERANCE, distance
