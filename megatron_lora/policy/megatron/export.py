"""The live model under Hugging Face names, adapters merged: what a rollout engine without adapters is given."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_lora.conversion.model_names import ModelParameter, model_parameters, unfuse, unshard_parameter
from megatron_lora.lora.layout import ModuleLayout
from megatron_lora.lora.peft_format import HFLinear, hf_linears, segment_delta
from megatron_lora.policy.megatron.adapter_gather import gather_adapter

if TYPE_CHECKING:
    from megatron_lora.policy.megatron.policy import MegatronPolicy


def merged_hf_weights(policy: "MegatronPolicy") -> Iterator[tuple[str, Tensor]]:
    """Every HF tensor of the model, W + s B A rounded to the model's dtype, on every rank, from any layout.

    One tensor at a time: a rank holds the adapter and one whole fused tensor beside its own part. Collective: every
    rank has to consume all of it. Vocabulary padding is cut off; a tied head is not repeated. A tensor without an
    update may be the model's own memory: copy it before the next step, and do not write to it.
    """
    shapes = policy.base.shapes
    mine = _own_parameters(policy)
    stages = _gather_over_pipeline({name: value.dtype for name, value in mine.items()})
    merge = _Merge(policy)
    for parameter in model_parameters(shapes):
        stage = next(index for index, names in enumerate(stages) if parameter.name in names)
        whole = _whole(parameter, mine.get(parameter.name), stages[stage][parameter.name], stage, policy)
        for name in parameter.hf_names:
            yield name, merge(name, unfuse(parameter, whole, name, shapes))


class _Merge:
    """Adds an HF linear's update to its weight, in fp32."""

    def __init__(self, policy: "MegatronPolicy"):
        self.linears: Mapping[str, HFLinear] = {}
        if policy.spec is not None:
            self.spec = policy.spec
            self.layouts: dict[Any, ModuleLayout] = {(m.kind, m.layer): m for m in policy.spec.modules}
            self.factors = gather_adapter(policy.adapted, policy.spec)
            self.linears = {f"{name}.weight": linear for name, linear in hf_linears(policy.spec.shapes).items()}

    def __call__(self, name: str, weight: Tensor) -> Tensor:
        linear = self.linears.get(name)
        layout = self.layouts.get((linear.kind, linear.layer)) if linear is not None else None
        if linear is None or layout is None:
            return weight
        a, b = (self.factors[f"{layout.name}.lora_{factor}"].to(weight.device) for factor in "AB")
        delta = segment_delta(layout, linear.segment, a, b, self.spec.shapes)
        return weight if delta is None else delta.add_(weight).to(weight.dtype)


def _own_parameters(policy: "MegatronPolicy") -> dict[str, Tensor]:
    """This rank's parts, by name with the global layer number. Factors are among them and asked for by nobody."""
    result: dict[str, Tensor] = {}
    for chunk in policy.base.chunks:
        layers: Any = chunk.decoder.layers
        numbers = {str(index): layer.layer_number - 1 for index, layer in enumerate(layers)}
        for name, parameter in chunk.named_parameters():
            parts = name.split(".")
            if parts[:2] == ["decoder", "layers"]:
                parts[2] = str(numbers[parts[2]])
            result[".".join(parts)] = parameter.detach()
    return result


def _gather_over_pipeline(mine: dict[str, torch.dtype]) -> list[dict[str, torch.dtype]]:
    """What each pipeline stage holds, by stage."""
    group: Any = parallel_state.get_pipeline_model_parallel_group()
    stages: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(stages, mine, group=group)
    return stages


def _whole(
    parameter: ModelParameter, local: Tensor | None, dtype: torch.dtype, stage: int, policy: "MegatronPolicy"
) -> Tensor:
    """The whole parameter, from the stage that holds it to every rank."""
    world = policy.world
    if world.pp_rank == stage:
        assert local is not None
        shards = [local]
        if parameter.tp_axis is not None and world.tp > 1:
            shards = [torch.empty_like(local) for _ in range(world.tp)]
            dist.all_gather(shards, local.contiguous(), group=parallel_state.get_tensor_model_parallel_group())
        whole = unshard_parameter(parameter, shards, policy.base.shapes)
    else:
        whole = torch.empty(parameter.shape, dtype=dtype, device=world.device)
    if world.pp > 1:
        group: Any = parallel_state.get_pipeline_model_parallel_group()
        whole = whole.contiguous()
        dist.broadcast(whole, src=dist.get_global_rank(group, stage), group=group)
    return whole
