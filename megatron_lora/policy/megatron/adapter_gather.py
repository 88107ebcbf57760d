"""The whole adapter on every rank: gathered over TP, then over PP, unfused into HF names."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_lora.lora.inject import Adapted
from megatron_lora.lora.layout import AdapterSpec
from megatron_lora.lora.sharding import unshard


def gather_adapter(adapted: Sequence[Adapted], spec: AdapterSpec) -> dict[str, Tensor]:
    """`<module>.<factor>` -> the full factor (TP=1 order) on the CPU, on every rank."""
    mine: dict[str, Tensor] = {}
    of_experts: dict[str, Tensor] = {}
    for linear in adapted:
        for held in linear.held_factors:
            value = held.value.detach()
            if held.axis is not None:
                kind, key = linear.layout.kind, held.factor.key
                value = unshard(_gather(value, linear), key, kind, spec.shapes, a2a=linear.all_to_all)
            (mine if linear.expert is None else of_experts)[f"{linear.layout.name}.{held.factor.name}"] = value.cpu()
    return over_pipeline(mine | _over_experts(of_experts))


def _gather(value: Tensor, linear: Adapted) -> list[Tensor]:
    if linear.split.size == 1:
        return [value]
    shards = [torch.empty_like(value) for _ in range(linear.split.size)]
    dist.all_gather(shards, value.contiguous(), group=linear.split.group)
    return shards


def _over_experts(mine: dict[str, Tensor]) -> dict[str, Tensor]:
    """The factors of all experts of this rank's layers. A model without experts has no ranks that share them."""
    if parallel_state.get_expert_model_parallel_world_size() == 1:
        return mine
    return _together(mine, parallel_state.get_expert_model_parallel_group())


def over_pipeline(mine: dict[str, Tensor]) -> dict[str, Tensor]:
    """The stages' tensors together, on every rank."""
    if parallel_state.get_pipeline_model_parallel_world_size() == 1:
        return mine
    return _together(mine, parallel_state.get_pipeline_model_parallel_group())


def _together(mine: dict[str, Tensor], group: Any) -> dict[str, Tensor]:
    everyone: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, mine, group=group)
    return {name: tensor for part in everyone for name, tensor in part.items()}
