"""The live model under Hugging Face names, adapters merged: what a rollout engine without adapters is given."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_lora.conversion.experts import packed_views
from megatron_lora.conversion.model_names import ModelParameter, model_parameters, unfuse, unshard_parameter
from megatron_lora.lora.base_weight import BaseWeight
from megatron_lora.lora.layout import AdapterSpec, ModelSpec
from megatron_lora.lora.merge import merge_targets
from megatron_lora.policy.megatron.base_weights import first_expert, global_names, stored_weights
from megatron_lora.policy.megatron.model import BaseModel
from megatron_lora.runtime.world import World


def merged_hf_weights(
    base: BaseModel, world: World, spec: AdapterSpec | None, factors: Mapping[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """Every HF tensor of the model, adapter merged, rounded to the model's dtype, on every rank, from any layout.

    factors: the whole adapter's, none without one. One tensor at a time: a rank holds one whole fused tensor beside its
    own part. Collective: every rank has to consume all of it. Vocabulary padding is cut off; a tied head is not
    repeated. A tensor without an update may be the model's own memory: copy it before the next step, and do not write
    to it.
    """
    mine = _own_parameters(base, world)
    stages = _gather_over_pipeline({_place(name): value.dtype for name, value in mine.items()})
    targets = {f"{name}.weight": target for name, target in merge_targets(spec).items()}

    def merged_experts(kind: str, name: str, packed: Tensor) -> Tensor:
        """Of a tensor of all experts of a layer; their biases have no adapters."""
        for linear, view in packed_views(base.shapes.linear(kind), name, packed) if packed.dim() == 3 else ():
            view.copy_(merged(f"{linear}.weight", view))
        return packed

    def merged(name: str, weight: Tensor) -> Tensor:
        return targets[name].weight_update(factors, weight.device).merged(weight) if name in targets else weight

    for parameter in model_parameters(base.shapes):
        if parameter.packed is not None or parameter.name in base.rounded:
            # Frozen, and not held here as HF has it: experts that share a tensor, linears in FP8.
            for name in parameter.hf_names:
                weight = base.weights.read(name).to(world.device, base.config.params_dtype)
                if parameter.packed is None:
                    yield name, merged(name, weight)
                else:
                    yield name, merged_experts(parameter.packed, name, weight.clone())
            continue
        place = _place(parameter.name)
        stage = next(index for index, names in enumerate(stages) if place in names)
        dtype = stages[stage][place]
        local = mine.get(parameter.name)
        if isinstance(local, BaseWeight):
            local = local.dense()
        whole = _whole(parameter, local, dtype, stage, world, base.shapes)
        for name in parameter.hf_names:
            yield name, merged(name, unfuse(parameter, whole, name, base.shapes))


def _own_parameters(base: BaseModel, world: World) -> dict[str, BaseWeight | Tensor]:
    """This rank's parts, by name with global numbers. Factors are among them and asked for by nobody."""
    first = first_expert(base.shapes, world)
    result: dict[str, BaseWeight | Tensor] = {}
    for chunk in base.chunks:
        result |= {name: parameter.detach() for name, parameter in global_names(chunk, first).items()}
        result |= stored_weights(chunk)
    return result


def _place(name: str) -> str:
    """The name without an expert's number: each rank of a stage holds other experts."""
    return re.sub(r"(\.experts\.linear_fc[12]\.)\d+", r"\1*", name)


def _gather_over_pipeline(mine: dict[str, torch.dtype]) -> list[dict[str, torch.dtype]]:
    """What each pipeline stage holds, by stage."""
    group: Any = parallel_state.get_pipeline_model_parallel_group()
    stages: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(stages, mine, group=group)
    return stages


def _whole(
    parameter: ModelParameter,
    local: Tensor | None,
    dtype: torch.dtype,
    stage: int,
    world: World,
    shapes: ModelSpec,
) -> Tensor:
    """The whole parameter, from the stage that holds it to every rank."""
    if world.pp_rank == stage:
        if parameter.expert is None:
            assert local is not None
            whole = _over_tensor_parallel(
                parameter, local, world.tp, parallel_state.get_tensor_model_parallel_group(), shapes
            )
        else:
            whole = _whole_expert(parameter, local, dtype, world, shapes)
    else:
        whole = torch.empty(parameter.shape, dtype=dtype, device=world.device)
    if world.pp > 1:
        group: Any = parallel_state.get_pipeline_model_parallel_group()
        whole = whole.contiguous()
        dist.broadcast(whole, src=dist.get_global_rank(group, stage), group=group)
    return whole


def _over_tensor_parallel(parameter: ModelParameter, local: Tensor, size: int, group: Any, shapes: ModelSpec) -> Tensor:
    shards = [local]
    if parameter.tp_axis is not None and size > 1:
        shards = [torch.empty_like(local) for _ in range(size)]
        dist.all_gather(shards, local.contiguous(), group=group)
    return unshard_parameter(parameter, shards, shapes)


def _whole_expert(
    parameter: ModelParameter, local: Tensor | None, dtype: torch.dtype, world: World, shapes: ModelSpec
) -> Tensor:
    """An expert's whole parameter, from the expert-parallel rank that holds it to the others of its stage."""
    assert parameter.expert is not None
    owner = parameter.expert // (shapes.num_experts // world.ep)
    if world.ep_rank == owner:
        assert local is not None
        group = parallel_state.get_expert_tensor_parallel_group()
        whole = _over_tensor_parallel(parameter, local, world.etp, group, shapes).contiguous()
    else:
        whole = torch.empty(parameter.shape, dtype=dtype, device=world.device)
    if world.ep > 1:
        among: Any = parallel_state.get_expert_model_parallel_group()
        dist.broadcast(whole, src=dist.get_global_rank(among, owner), group=among)
    return whole
