"""The live model under Hugging Face names, adapters merged: what a rollout engine without adapters is given."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from megatron_lora.conversion.model_names import ModelParameter, model_parameters, unfuse, unshard_parameter
from megatron_lora.lora.base_weight import BaseWeight
from megatron_lora.lora.layout import AdapterSpec, ModelSpec
from megatron_lora.lora.merge import merge_targets
from megatron_lora.policy.megatron.base_weights import global_names, stored_weights
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
    mine = _own_parameters(base.chunks)
    stages = _gather_over_pipeline({name: value.dtype for name, value in mine.items()})
    targets = {f"{name}.weight": target for name, target in merge_targets(spec).items()}
    for parameter in model_parameters(base.shapes):
        stage = next(index for index, names in enumerate(stages) if parameter.name in names)
        dtype = stages[stage][parameter.name]
        local = mine.get(parameter.name)
        if isinstance(local, BaseWeight):
            local = local.dense()
        whole = _whole(parameter, local, dtype, stage, world, base.shapes)
        for name in parameter.hf_names:
            weight = unfuse(parameter, whole, name, base.shapes)
            yield (
                name,
                targets[name].weight_update(factors, weight.device).merged(weight) if name in targets else weight,
            )


def _own_parameters(chunks: Sequence[GPTModel]) -> dict[str, BaseWeight | Tensor]:
    """This rank's parts, by name with the global layer number. Factors are among them and asked for by nobody."""
    result: dict[str, BaseWeight | Tensor] = {}
    for chunk in chunks:
        result |= {name: parameter.detach() for name, parameter in global_names(chunk).items()}
        result |= stored_weights(chunk)
    return result


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
        assert local is not None
        shards = [local]
        if parameter.tp_axis is not None and world.tp > 1:
            shards = [torch.empty_like(local) for _ in range(world.tp)]
            dist.all_gather(shards, local.contiguous(), group=parallel_state.get_tensor_model_parallel_group())
        whole = unshard_parameter(parameter, shards, shapes)
    else:
        whole = torch.empty(parameter.shape, dtype=dtype, device=world.device)
    if world.pp > 1:
        group: Any = parallel_state.get_pipeline_model_parallel_group()
        whole = whole.contiguous()
        dist.broadcast(whole, src=dist.get_global_rank(group, stage), group=group)
    return whole
