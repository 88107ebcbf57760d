"""The whole adapter on every rank: gathered over TP, then over PP, unfused into HF names."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_lora.lora.layout import AdapterSpec
from megatron_lora.lora.linear import LoRALinear
from megatron_lora.lora.sharding import unshard


def gather_adapter(adapted: Sequence[LoRALinear], spec: AdapterSpec) -> dict[str, Tensor]:
    """`<module>.<factor>` -> the full factor (TP=1 order) on the CPU, on every rank."""
    mine: dict[str, Tensor] = {}
    for linear in adapted:
        for held in linear.held_factors:
            value = held.parameter.detach()
            if held.axis is not None:
                kind, key = linear.layout.kind, held.factor.key
                value = unshard(_gather(value, linear), key, kind, spec.shapes, a2a=linear.all_to_all)
            mine[f"{linear.layout.name}.{held.factor.name}"] = value.cpu()
    return over_pipeline(mine)


def _gather(value: Tensor, linear: LoRALinear) -> list[Tensor]:
    if linear.tp.size == 1:
        return [value]
    shards = [torch.empty_like(value) for _ in range(linear.tp.size)]
    dist.all_gather(shards, value.contiguous(), group=linear.tp.group)
    return shards


def over_pipeline(mine: dict[str, Tensor]) -> dict[str, Tensor]:
    """The stages' tensors together, on every rank."""
    if parallel_state.get_pipeline_model_parallel_world_size() == 1:
        return mine
    group: Any = parallel_state.get_pipeline_model_parallel_group()
    everyone: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, mine, group=group)
    return {name: tensor for part in everyone for name, tensor in part.items()}
