"""Faults planted in a Megatron policy."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from megatron_lora.lora.arithmetic import TensorParallel
from megatron_lora.lora.expert_linear import AdaptedExpert
from megatron_lora.lora.held import GradientGroup
from megatron_lora.lora.linear import LoRALinear
from megatron_lora.lora.methods.additive import Lora
from megatron_lora.policy.megatron.policy import MegatronPolicy
from tests.distributed.cases import EP, ETP, TP
from tests.distributed.fault_checks import Fault, Plant, local_count, look_at, nothing, saved_otherwise, stale_norm


def _row_reduction(change: Callable[[TensorParallel, Tensor], None]) -> Plant:
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


def _not_synchronized(name: str) -> Plant:
    @contextmanager
    def plant(policy: MegatronPolicy) -> Iterator[None]:
        for linear in policy.adapted:
            for held in linear.held_factors:
                if held.factor.name == name:
                    held.parameter.sum_gradient_over = ()  # type: ignore[attr-defined]
        yield

    return plant


def _not_summed_over(group: GradientGroup) -> Plant:
    """The sum of experts' factors over these ranks is forgotten."""

    @contextmanager
    def plant(policy: MegatronPolicy) -> Iterator[None]:
        changed = 0
        for linear in policy.adapted:
            for held in linear.held_factors if isinstance(linear, AdaptedExpert) else ():
                parameter: Any = held.parameter
                changed += group in parameter.sum_gradient_over
                parameter.sum_gradient_over = tuple(one for one in parameter.sum_gradient_over if one != group)
        assert changed
        yield

    return plant


@contextmanager
def _scaled_by_all_ranks(policy: MegatronPolicy) -> Iterator[None]:
    """Gradients of experts' factors are divided by the data-parallel size, though no other rank has these experts."""
    config: Any = policy.base.config
    finalize = config.finalize_model_grads_func

    def wrong(chunks: list[Any], *arguments: Any, **options: Any) -> None:
        finalize(chunks, *arguments, **options)
        for chunk in chunks:
            for parameter in chunk.module.parameters():
                if parameter.requires_grad and not getattr(parameter, "allreduce", True):
                    parameter.main_grad.div_(policy.world.dp)

    config.finalize_model_grads_func = wrong
    yield
    config.finalize_model_grads_func = finalize


def _expert_adapters(policy: MegatronPolicy) -> list[Any]:
    """Each `ExpertAdapter` once."""
    return list(dict.fromkeys(linear.adapter for linear in policy.adapted if isinstance(linear, AdaptedExpert)))


@contextmanager
def _expert_scale_doubled(policy: MegatronPolicy) -> Iterator[None]:
    for adapter in _expert_adapters(policy):
        assert adapter.scale is not None
        adapter.scale *= 2
    yield


def _second_ranks_experts(policy: MegatronPolicy) -> Sequence[Tensor]:
    return [adapter.lora_B for adapter in _expert_adapters(policy) if policy.world.ep_rank == 1]


def _second_ranks_rows(policy: MegatronPolicy) -> Sequence[Tensor]:
    """Of B of each column-parallel linear."""
    return [
        linear.lora_B for linear in policy.adapted if linear.parallel_kind == "column" and policy.world.tp_rank == 1
    ]


@contextmanager
def _scale_doubled(policy: MegatronPolicy) -> Iterator[None]:
    for linear in policy.adapted:
        assert linear.scale is not None
        linear.scale *= 2
    yield


DORA: dict[str, Any] = {"peft": {"type": "dora"}}
SHARED: dict[str, Any] = {"peft": {"share_expert_adapters": True}}
FAULTS: dict[str, Fault] = {
    "none": Fault(nothing, TP),
    "none, data parallel": Fault(nothing, {}),
    "none, dora": Fault(nothing, TP | DORA, "dora"),
    "none, saved": Fault(nothing, TP, at_save=True),
    "row-parallel reduction skipped": Fault(_row_reduction(_skipped), TP),
    "row-parallel reduction averaged": Fault(_row_reduction(_averaged), TP),
    "A not synchronized": Fault(_not_synchronized("lora_A"), TP),
    "B not synchronized": Fault(_not_synchronized("lora_B"), TP),
    "local token count": Fault(local_count, {}),
    "stale cached norm": Fault(stale_norm(LoRALinear), TP | DORA, "dora"),
    "adapter scale doubled": Fault(_scale_doubled, TP),
    "shard dropped at save": Fault(saved_otherwise(_second_ranks_rows, torch.zeros_like), TP, at_save=True),
    "shard doubled at save": Fault(saved_otherwise(_second_ranks_rows, lambda part: part * 2), TP, at_save=True),
    "none, experts": Fault(nothing, EP, "experts"),
    "none, experts saved": Fault(nothing, EP, "experts", at_save=True),
    "none, shared experts": Fault(nothing, EP | SHARED, "shared_experts"),
    "shared factors not summed over EP": Fault(_not_summed_over("expert"), EP | SHARED, "shared_experts"),
    "factors not summed over ETP": Fault(_not_summed_over("expert_tp"), ETP, "experts"),
    "expert gradients of the wrong DP size": Fault(_scaled_by_all_ranks, EP, "experts"),
    "local token count, experts": Fault(local_count, EP, "experts"),
    "expert scale doubled": Fault(_expert_scale_doubled, EP, "experts"),
    "experts swapped at save": Fault(
        saved_otherwise(_second_ranks_experts, lambda part: part.flip(0)), EP, "experts", at_save=True
    ),
}


CHECKS = {"faults": partial(look_at, FAULTS)}
