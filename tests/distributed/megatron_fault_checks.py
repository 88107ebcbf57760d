"""Faults planted in a Megatron policy on two real ranks: what each does to three steps of training, or to a checkpoint.
A comparison that a fault leaves untouched would not find it in the code either."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from megatron_lora.data.batch import Row
from megatron_lora.lora.arithmetic import TensorParallel
from megatron_lora.lora.linear import LoRALinear
from megatron_lora.lora.methods.additive import Lora
from megatron_lora.objectives.sft import SFTObjective
from megatron_lora.policy.megatron.policy import MegatronPolicy
from tests.distributed.cases import TP, scored_rows, training_rows
from tests.distributed.megatron_build import build_policy
from tests.distributed.policy_checks import train_steps

NUM_STEPS = 3


@dataclass(frozen=True)
class Fault:
    """plant: what goes wrong within its context, given the policy. megatron: the layout. adapter: which of
    `conftest.ADAPTERS`; `dora` with norms that are kept. at_save: looked at in a checkpoint instead of in training."""

    plant: Callable[[MegatronPolicy], AbstractContextManager[Any]]
    megatron: dict[str, Any]
    adapter: str = "shared"
    at_save: bool = False


@contextmanager
def _nothing(policy: MegatronPolicy) -> Iterator[None]:
    yield


def _row_reduction(change: Callable[[TensorParallel, Tensor], None]) -> Callable[[MegatronPolicy], Any]:
    """Only that of the row-parallel forward pass."""

    @contextmanager
    def plant(policy: MegatronPolicy) -> Iterator[None]:
        row, reduce = Lora.row, TensorParallel.all_reduce

        def wrong(tp: TensorParallel, value: Tensor, async_op: bool = False) -> Any:
            if change is _averaged:
                reduce(tp, value)
            change(tp, value)

        def faulty(self: Lora, *arguments: Any) -> Tensor:
            with mock.patch.object(TensorParallel, "all_reduce", wrong):
                return row(self, *arguments)

        with mock.patch.object(Lora, "row", faulty):
            yield

    return plant


def _skipped(tp: TensorParallel, value: Tensor) -> None:
    """The partial sums stay as they are."""


def _averaged(tp: TensorParallel, value: Tensor) -> None:
    value.div_(tp.size)


def _not_synchronized(name: str) -> Callable[[MegatronPolicy], Any]:
    @contextmanager
    def plant(policy: MegatronPolicy) -> Iterator[None]:
        for linear in policy.adapted:
            for held in linear.held_factors:
                if held.factor.name == name:
                    held.parameter.sum_gradient_over = ()  # type: ignore[attr-defined]
        yield

    return plant


def _saved_shard(change: Callable[[Tensor], Tensor]) -> Callable[[MegatronPolicy], Any]:
    """The second rank writes something else than its part of B of each column-parallel linear."""

    @contextmanager
    def plant(policy: MegatronPolicy) -> Iterator[None]:
        parts = [linear.lora_B for linear in policy.adapted if linear.parallel_kind == "column"]
        before = [part.detach().clone() for part in parts]
        with torch.no_grad():
            for part in parts if policy.world.tp_rank == 1 else ():
                part.copy_(change(part))
        yield
        with torch.no_grad():
            for part, value in zip(parts, before, strict=True):
                part.copy_(value)

    return plant


@contextmanager
def _local_count(policy: MegatronPolicy) -> Iterator[None]:
    """Each rank divides by the targets of its own rows."""
    count = SFTObjective.count

    def local(self: SFTObjective, rows: list[Row]) -> float:
        return count(self, rows[policy.world.dp_rank :: policy.world.dp])

    with mock.patch.object(SFTObjective, "count", local):
        yield


@contextmanager
def _stale_norm(policy: MegatronPolicy) -> Iterator[None]:
    with mock.patch.object(LoRALinear, "factors_changed", lambda self: None):
        yield


@contextmanager
def _scale_doubled(policy: MegatronPolicy) -> Iterator[None]:
    for linear in policy.adapted:
        assert linear.scale is not None
        linear.scale *= 2
    yield


DORA: dict[str, Any] = {"peft": {"type": "dora"}}
FAULTS: dict[str, Fault] = {
    "none": Fault(_nothing, TP),
    "none, data parallel": Fault(_nothing, {}),
    "none, dora": Fault(_nothing, TP | DORA, "dora"),
    "none, saved": Fault(_nothing, TP, at_save=True),
    "row-parallel reduction skipped": Fault(_row_reduction(_skipped), TP),
    "row-parallel reduction averaged": Fault(_row_reduction(_averaged), TP),
    "A not synchronized": Fault(_not_synchronized("lora_A"), TP),
    "B not synchronized": Fault(_not_synchronized("lora_B"), TP),
    "local token count": Fault(_local_count, {}),
    "stale cached norm": Fault(_stale_norm, TP | DORA, "dora"),
    "adapter scale doubled": Fault(_scale_doubled, TP),
    "shard dropped at save": Fault(_saved_shard(torch.zeros_like), TP, at_save=True),
    "shard doubled at save": Fault(_saved_shard(lambda part: part * 2), TP, at_save=True),
}


def faults(case: dict[str, Any]) -> dict[str, Any]:
    """What every fault of the case's adapter leaves: losses, gradient norms and the adapter, or scores before and after
    a checkpoint."""
    mine = {name: fault for name, fault in FAULTS.items() if fault.adapter == case["adapter"]}
    return {name: _with_fault(case, number, fault) for number, (name, fault) in enumerate(mine.items())}


def _with_fault(case: dict[str, Any], number: int, fault: Fault) -> dict[str, Any]:
    policy = build_policy(case, fault.megatron)
    if not fault.at_save:
        with fault.plant(policy):
            return train_steps(policy, training_rows(NUM_STEPS)) | {"adapter": policy.adapter().tensors}
    weights = Path(case["shared_folder"]) / f"{case['name']}_{number}"
    train_steps(policy, training_rows(1))
    before = policy.score(scored_rows())
    with fault.plant(policy):
        policy.save(weights, None)
    policy.load(weights, None)
    return {"before": before, "after": policy.score(scored_rows())}


CHECKS = {"faults": faults}
