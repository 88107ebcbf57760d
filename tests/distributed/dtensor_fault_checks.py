"""Faults planted in a DTensor policy."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultReduceScatter
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam
from torch.distributed.tensor import DTensor, Placement

from megatron_lora.policy.backend import local_part
from megatron_lora.policy.dtensor import optim, parallel
from megatron_lora.policy.dtensor.adapter import AdaptedLinear
from megatron_lora.policy.dtensor.factor_sets import ADAPTER_NAME
from megatron_lora.policy.dtensor.policy import DTensorPolicy
from tests.distributed.cases import SP2, TP2
from tests.distributed.fault_checks import Fault, Plant, local_count, look_at, nothing, saved_otherwise, stale_norm


def _row_reduction(change: Callable[[Tensor, int], Tensor]) -> Plant:
    """change: what a rank takes for the sum of all ranks' partial ones, given its own and how many there are."""
    to_local = parallel._to_local

    def wrong(value: Any, mesh: DeviceMesh, layout: Placement) -> Tensor:
        if not isinstance(value, DTensor) or not value.placements[0].is_partial():
            return to_local(value, mesh, layout)
        return change(value if change is _skipped else to_local(value, mesh, layout), mesh.size())

    return lambda policy: mock.patch.object(parallel, "_to_local", wrong)


def _skipped(value: Any, ranks: int) -> Tensor:
    return value.to_local()


def _averaged(value: Tensor, ranks: int) -> Tensor:
    return value / ranks


def _not_synchronized(factor: str) -> Plant:
    """Over TP: FSDP takes each rank's partial sum for the gradient."""
    inner = FSDPParam._get_grad_inner_tensor

    def wrong(self: FSDPParam, grad: Any) -> Tensor:
        return grad._local_tensor if f".lora_{factor}." in str(self._param_fqn) else inner(self, grad)

    return lambda policy: mock.patch.object(FSDPParam, "_get_grad_inner_tensor", wrong)


class _OwnPart(DefaultReduceScatter):
    """Each data-parallel rank keeps its own gradient."""

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: Any, op: Any, async_op: bool = False
    ) -> None:
        output_tensor.copy_(input_tensor.chunk(group.size())[group.rank()])


@contextmanager
def _own_gradients(policy: DTensorPolicy) -> Iterator[None]:
    for module in policy.root.modules():
        if isinstance(module, FSDPModule):
            module.set_custom_reduce_scatter(_OwnPart())
    yield


def _norms_not_summed(policy: DTensorPolicy) -> AbstractContextManager[Any]:
    """Of those that see a part of the tokens each."""
    return mock.patch.object(optim, "sum_gradients_over_tp", lambda parameters, mesh: None)


def _second_ranks_rows(policy: DTensorPolicy) -> Sequence[Tensor]:
    """Of every B whose rows the two ranks share, whichever axis they are of."""
    every: list[Any] = [linear.factors["B"] for linear in policy._linears.values()]
    return [local_part(b) for b in every if b.placements[-1].is_shard() and policy.world.rank == 1]


@contextmanager
def _scale_doubled(policy: DTensorPolicy) -> Iterator[None]:
    for linear in policy._linears.values():
        linear.scaling[ADAPTER_NAME] *= 2
    yield


DORA: dict[str, Any] = TP2 | {"lora_cfg": {"type": "dora"}}
FAULTS: dict[str, Fault] = {
    "none": Fault(nothing, TP2),
    "none, data parallel": Fault(nothing),
    "none, dora": Fault(nothing, DORA, "dora"),
    "none, full": Fault(nothing, SP2, None),
    "none, saved": Fault(nothing, TP2, at_save=True),
    "none, saved by data-parallel ranks": Fault(nothing, at_save=True),
    "row-parallel reduction skipped": Fault(_row_reduction(_skipped), TP2),
    "row-parallel reduction averaged": Fault(_row_reduction(_averaged), TP2),
    "A not synchronized": Fault(_not_synchronized("A"), TP2),
    "B not synchronized": Fault(_not_synchronized("B"), TP2),
    "gradients not synchronized over DP": Fault(_own_gradients),
    "norms not synchronized over TP": Fault(_norms_not_summed, SP2, None),
    "local token count": Fault(local_count),
    "stale cached norm": Fault(stale_norm(AdaptedLinear), DORA, "dora"),
    "adapter scale doubled": Fault(_scale_doubled, TP2),
    "shard dropped at save": Fault(saved_otherwise(_second_ranks_rows, torch.zeros_like), TP2, at_save=True),
    "shard doubled at save": Fault(saved_otherwise(_second_ranks_rows, lambda part: part * 2), at_save=True),
}


CHECKS = {"faults": partial(look_at, FAULTS)}
