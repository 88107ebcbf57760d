"""Modules of a Megatron model that train whole beside adapters: norms, embeddings, the output layer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.utils import make_sharded_tensor_for_checkpoint, make_tp_sharded_tensor_for_checkpoint
from torch import Tensor, nn

from megatron_lora.conversion.model_names import ModelParameter, shard_parameter, unshard_parameter
from megatron_lora.conversion.saved_modules import saved_parameters
from megatron_lora.lora.layout import AdapterSpec, ModelSpec
from megatron_lora.policy.megatron.adapter_gather import over_pipeline
from megatron_lora.policy.megatron.base_weights import first_expert, global_names
from megatron_lora.runtime.world import World


@dataclass(frozen=True)
class SavedTensor:
    """name: the HF tensor's. parameter: this rank's part."""

    name: str
    entry: ModelParameter
    parameter: nn.Parameter
    shapes: ModelSpec


def unfreeze(chunks: Sequence[GPTModel], spec: AdapterSpec, world: World) -> list[SavedTensor]:
    """Let the spec's `saved` tensors train, as far as this rank holds them; in the model's order."""
    found: list[SavedTensor] = []
    first = first_expert(spec.shapes, world)
    mine: dict[str, Any] = {name: value for chunk in chunks for name, value in global_names(chunk, first).items()}
    for name, entry in saved_parameters(spec.shapes).items() if spec.saved else ():
        if name in spec.saved and entry.name in mine:
            parameter = mine[entry.name]
            parameter.requires_grad_(True)
            found.append(SavedTensor(name, entry, parameter, spec.shapes))
    return found


@torch.no_grad()
def put(saved: Sequence[SavedTensor], tensors: Mapping[str, Tensor], world: World) -> None:
    """Copy this rank's part of whole tensors, where they are given."""
    for one in saved:
        if one.name in tensors:
            whole = tensors[one.name].to(one.parameter.dtype)
            one.parameter.copy_(
                shard_parameter(one.entry, whole, world.tp_rank, world.tp, one.parameter.shape[0], one.shapes)
            )


def gather(saved: Sequence[SavedTensor], world: World) -> dict[str, Tensor]:
    """HF tensor name -> the whole tensor on the CPU, on every rank."""
    mine: dict[str, Tensor] = {}
    for one in saved:
        local = one.parameter.detach()
        shards = [local]
        if one.entry.tp_axis is not None and world.tp > 1:
            shards = [torch.empty_like(local) for _ in range(world.tp)]
            dist.all_gather(shards, local.contiguous(), group=parallel_state.get_tensor_model_parallel_group())
        mine[one.name] = unshard_parameter(one.entry, shards, one.shapes)[: one.entry.shape[0]].cpu().clone()
    return over_pipeline(mine)


def sharded_state(saved: Sequence[SavedTensor]) -> dict[str, Any]:
    """Sharded tensors under the HF tensors' names."""
    groups: dict[str, Any] = {
        "tp_group": parallel_state.get_tensor_model_parallel_group(),
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }
    state: dict[str, Any] = {}
    for one in saved:
        if one.entry.tp_axis is None:
            state[one.name] = make_sharded_tensor_for_checkpoint(one.parameter, one.name, **groups)
        else:
            # The padded vocabulary depends on the TP size.
            state[one.name] = make_tp_sharded_tensor_for_checkpoint(
                one.parameter, one.name, one.entry.tp_axis, allow_shape_mismatch=True, **groups
            )
    return state
