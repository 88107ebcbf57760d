"""Fused adapter tensors <-> HF PEFT's names and `adapter_config.json`. Pure: dictionaries and tensors in and out."""

import functools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from megatron_lora.errors import UserError
from megatron_lora.lora.layout import (
    FACTORS,
    AdapterSpec,
    Block,
    Factor,
    ModelSpec,
    ModuleLayout,
    features,
    segment_rows,
    segments_of,
)
from megatron_lora.lora.model_spec import ROUTER
from megatron_lora.lora.packed_experts import (
    is_on_experts,
    is_on_router,
    pack,
    packed_name,
    router_parameter,
)
from megatron_lora.lora.peft_config import build_config

ExpertLayout = Literal["each", "packed"]
PREFIX = "base_model.model."


@dataclass(frozen=True)
class HFLinear:
    """One HF linear: its module name in the HF model, and the fused linear and segment that it is; the number of the
    expert whose it is, if any's."""

    name: str
    kind: str
    segment: str
    layer: int | None
    expert: int | None = None


def hf_name(module: ModuleLayout, segment: str, shapes: ModelSpec, expert: int | None = None) -> str:
    """The HF module name of a segment, e.g. `model.layers.3.self_attn.q_proj`, or `lm_head`. expert: whose, of an
    adapter that experts share."""
    return shapes.linear(module.kind).hf_name(segment, module.layer, expert if module.expert is None else module.expert)


def hf_linears(shapes: ModelSpec) -> dict[str, HFLinear]:
    """Every HF linear of the model that can carry an adapter, by name, layer by layer in the forward's order."""
    result: dict[str, HFLinear] = {}
    for layer in [*range(shapes.num_layers), None]:
        for linear in shapes.adaptable(layer):
            for expert in linear.expert_numbers:
                for segment in linear.segments:
                    name = linear.hf_name(segment, layer, expert)
                    result[name] = HFLinear(name, linear.kind, segment, layer, expert)
    return result


def segment_features(linear: HFLinear, shapes: ModelSpec) -> tuple[int, int]:
    """(in features, out features) of one HF linear."""
    return features(linear.kind, shapes)[0], segment_rows(linear.kind, shapes, linear.segment).numel()


def segment_part(factor: Factor, module: ModuleLayout, segment: str, whole: Tensor, shapes: ModelSpec) -> Tensor:
    """The part of a fused factor that belongs to one HF linear, in memory of its own. A block serves the segment."""
    block = block_of(module, segment)
    assert block is not None
    part = whole
    for axis, along in enumerate(factor.axes):
        if along == "rank":
            part = part.narrow(axis, block.start, block.rank)
        elif along == "out":
            part = part.index_select(axis, segment_rows(module.kind, shapes, segment).to(whole.device))
    return part.clone(memory_format=torch.contiguous_format)


def put_segment_part(
    factor: Factor, module: ModuleLayout, segment: str, part: Tensor, whole: Tensor, shapes: ModelSpec
) -> None:
    """The inverse of `segment_part`: write one HF linear's part into the fused factor."""
    block = block_of(module, segment)
    assert block is not None
    index: list[Any] = [slice(None)] * whole.dim()
    for axis, along in enumerate(factor.axes):
        if along == "rank":
            index[axis] = slice(block.start, block.stop)
        elif along == "out":
            index[axis] = segment_rows(module.kind, shapes, segment)
    whole[tuple(index)] = part.to(whole.dtype)


def block_of(module: ModuleLayout, segment: str) -> Block | None:
    """The block that serves a segment, if one does."""
    return next((block for block in module.blocks if segment in block.segments), None)


def to_hf(
    spec: AdapterSpec,
    tensors: Mapping[str, Tensor],
    *,
    uniform_scale: bool = False,
    experts: ExpertLayout = "each",
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A fused adapter as (adapter_config.json's content, PEFT tensors).

    tensors: `<module>.<factor>` -> full tensor. An A that several HF linears share is written as a copy for each.
    uniform_scale: fold what differs in scale between linears into B, so that alpha / r is one number; for engines that
    read r and lora_alpha but no pattern (vLLM). Otherwise the tensors are the fused ones bit for bit. experts: a pair
    for each linear of each expert, or one for each tensor of all experts (`target_parameters`, as peft adapts
    transformers' models).
    Raises UserError for a tensor that is missing or has another shape, and where experts cannot be packed.
    """
    check_tensors(spec, tensors)
    packed = pack(spec, tensors) if experts == "packed" else []
    patterns: dict[str, tuple[int, float]] = {}
    scales: dict[str, float] = {}
    # Where the factors of each of `patterns` lie.
    holders: dict[str, str] = {}
    result: dict[str, Tensor] = {}
    for module, expert, segment, block in _adapted_linears(spec):
        if packed and is_on_experts(module, spec.shapes):
            continue
        name = hf_name(module, segment, spec.shapes, expert)
        adapted = f"{name}.weight" if is_on_router(module) else name
        holders[adapted] = name
        patterns[adapted], scales[adapted] = (block.rank, block.alpha), block.scale
        for factor in spec.factors:
            whole = tensors[f"{module.name}.{factor.name}"]
            result[peft_name(name, factor)] = segment_part(factor, module, segment, whole, spec.shapes)
    for entry in packed:
        holders[entry.name] = entry.holder
        patterns[entry.name], scales[entry.name] = (entry.rank, entry.alpha), entry.scale
        result |= {peft_name(entry.holder, FACTORS["A"]): entry.a, peft_name(entry.holder, FACTORS["B"]): entry.b}
    result |= {f"{PREFIX}{name}": tensors[name] for name in spec.saved}
    use_rslora = any(block.use_rslora for module in spec.modules for block in module.blocks)
    if uniform_scale:
        patterns = _fold_scales(patterns, scales, holders, result)
        use_rslora = False
    linear_names = hf_linears(spec.shapes)
    linears = linear_names.values()
    config = build_config(
        spec,
        patterns,
        use_rslora,
        all_names=[
            linear.name for linear in linears if linear.kind != ROUTER and (not packed or linear.expert is None)
        ],
        parameters=[name for name in patterns if name not in linear_names],
        all_parameters=[*(_packed_names(spec.shapes) if packed else ()), *_router_parameters(spec.shapes)],
    )
    return config, result


def _adapted_linears(spec: AdapterSpec) -> Iterator[tuple[ModuleLayout, int | None, str, Block]]:
    """Every HF linear that is adapted: (module, expert, segment, the block that serves it)."""
    for module in spec.modules:
        for expert in module.experts(spec.shapes):
            for segment in segments_of(module.kind, spec.shapes):
                block = block_of(module, segment)
                if block is not None:
                    yield module, expert, segment, block


def _packed_names(shapes: ModelSpec) -> list[str]:
    return [
        packed_name(linear, layer)
        for layer in range(shapes.num_layers)
        for linear in shapes.adaptable(layer)
        if linear.experts
    ]


def _router_parameters(shapes: ModelSpec) -> list[str]:
    return [
        router_parameter(linear, layer)
        for layer in range(shapes.num_layers)
        for linear in shapes.adaptable(layer)
        if linear.kind == ROUTER
    ]


def check_tensors(spec: AdapterSpec, tensors: Mapping[str, Tensor]) -> None:
    """Raise UserError unless `tensors` are exactly the factors that `spec` names, in its shapes."""
    wanted = spec.factor_shapes()
    missing = sorted(set(wanted) - set(tensors))
    unexpected = sorted(set(tensors) - set(wanted))
    if missing or unexpected:
        raise UserError(
            f"the adapter's tensors are not those that adapter.json names: missing {some_of(missing)}, "
            f"unexpected {some_of(unexpected)}; the checkpoint is incomplete or of another adapter"
        )
    for name, shape in wanted.items():
        if tuple(tensors[name].shape) != shape:
            raise UserError(f"{name} has shape {tuple(tensors[name].shape)}, adapter.json says {shape}")


def fuse(tensors: Mapping[str, Tensor], spec: AdapterSpec) -> dict[str, Tensor]:
    """PEFT tensors as the fused factors of `spec`, whose linears share one A where a block serves several: the first
    one's is read. Raises KeyError for one that is missing."""
    fused: dict[str, Tensor] = {}
    for module in spec.modules:
        for factor in spec.factors:
            parts = {
                segment: tensors[peft_name(hf_name(module, segment, spec.shapes), factor)]
                for segment in _written(factor, module)
            }
            fused[f"{module.name}.{factor.name}"] = fuse_factor(factor, module, parts, spec.shapes)
    return fused | {name: tensors[f"{PREFIX}{name}"] for name in spec.saved}


def peft_name(linear: str, factor: Factor) -> str:
    """The name in a PEFT file of one HF linear's factor."""
    return f"{PREFIX}{linear}.{factor.peft_name}"


def _written(factor: Factor, module: ModuleLayout) -> list[str]:
    """The segments whose parts make up a fused factor: all that a block serves, or one of each block that share it."""
    shared = "out" not in factor.axes
    return [segment for block in module.blocks for segment in (block.segments[:1] if shared else block.segments)]


def fuse_factor(factor: Factor, module: ModuleLayout, parts: Mapping[str, Tensor], shapes: ModelSpec) -> Tensor:
    """One fused factor from its segments' parts; rows that no block serves are zero."""
    whole = torch.zeros(module.factor_shape(factor, shapes), dtype=widest(parts.values()))
    for segment in _written(factor, module):
        put_segment_part(factor, module, segment, parts[segment], whole, shapes)
    return whole


def widest(tensors: Iterable[Tensor]) -> torch.dtype:
    """The dtype that holds the values of all."""
    return functools.reduce(torch.promote_types, (tensor.dtype for tensor in tensors))


def _fold_scales(
    patterns: Mapping[str, tuple[int, float]],
    scales: Mapping[str, float],
    holders: Mapping[str, str],
    tensors: dict[str, Tensor],
) -> dict[str, tuple[int, float]]:
    """Multiply each B by its scale over the commonest one; returns the (rank, alpha) that then hold, without rsLoRA."""
    values = list(scales.values())
    common = max(values, key=values.count)
    result: dict[str, tuple[int, float]] = {}
    for name, (rank, _) in patterns.items():
        # Every kind has a B, and its update is linear in it.
        key = peft_name(holders[name], FACTORS["B"])
        if scales[name] != common:
            tensors[key] = (tensors[key].double() * (scales[name] / common)).to(tensors[key].dtype)
        result[name] = (rank, common * rank)
    return result


def some_of(names: list[str]) -> str:
    """The first three of a list, and how many more."""
    if not names:
        return "none"
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
