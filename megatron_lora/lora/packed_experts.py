"""Adapters on experts as PEFT holds them for one tensor of all experts (`target_parameters`), and a pair for each HF
linear.

transformers' model has one tensor of a layer's experts where its files have a matrix of each. peft 0.21
(`lora.ParamWrapper`) gives such a tensor A [experts * r, in], expert after expert, and B [out, r * experts], where the
first columns are the first rank's of every expert. Where several tensors of one module are adapted its wrappers are
nested, the last tensor's outermost.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_lora.errors import UserError
from megatron_lora.lora.layout import A, AdapterSpec, B, FactorKey, ModuleLayout
from megatron_lora.lora.model_spec import ROUTER, LinearSpec, ModelSpec, resolve
from megatron_lora.lora.peft_config import PeftPatterns

# transformers' names of the tensors of all experts, by the segments in them.
PACKED_NAMES = {("gate", "up"): "gate_up_proj", ("up",): "up_proj", ("down",): "down_proj"}


@dataclass(frozen=True)
class PackedFactors:
    """The adapter on one tensor of all experts. name: of the tensor in transformers' model. holder: the module that has
    the factors there. rank, alpha, scale: of each expert."""

    name: str
    holder: str
    a: Tensor
    b: Tensor
    rank: int
    alpha: float
    scale: float


def packed_name(linear: LinearSpec, layer: int) -> str:
    """transformers' name of the tensor of all experts that a linear is a part of, in one layer."""
    if linear.packed:
        return resolve(linear.parts[0].name, layer)
    before = linear.parts[0].name.rpartition(".*.")[0]
    return f"{resolve(before, layer)}.{PACKED_NAMES[linear.segments]}"


def router_parameter(linear: LinearSpec, layer: int) -> str:
    """transformers' name of a router's weight, which is no linear's there."""
    return f"{linear.hf_name(linear.segments[0], layer)}.weight"


def is_on_router(module: ModuleLayout) -> bool:
    return module.kind == ROUTER


def is_on_experts(module: ModuleLayout, shapes: ModelSpec) -> bool:
    return shapes.linear(module.kind).experts > 0


def adapts_parameters(spec: AdapterSpec) -> bool:
    """Whether it is on tensors that are no linears' in transformers' model: experts' or routers'."""
    return adapts_experts(spec) or any(map(is_on_router, spec.modules))


def adapts_experts(spec: AdapterSpec) -> bool:
    return any(is_on_experts(module, spec.shapes) for module in spec.modules)


def pack(spec: AdapterSpec, tensors: Mapping[str, Tensor]) -> list[PackedFactors]:
    """The adapters on experts, layer by layer. tensors: `<module>.<factor>` -> whole factor. Raises UserError where
    experts of a layer have adapters of different form, or some have none: one tensor has no place for that."""
    groups: dict[int, dict[str, list[ModuleLayout]]] = {}
    for module in spec.modules:
        if is_on_experts(module, spec.shapes):
            assert module.layer is not None
            groups.setdefault(module.layer, {}).setdefault(module.kind, []).append(module)
    return [
        _pack(name, holder, spec.shapes.linear(kind), kinds[kind], spec, tensors)
        for layer, kinds in groups.items()
        for kind, (name, holder) in _holders({kind: spec.shapes.linear(kind) for kind in kinds}, layer).items()
    ]


def _holders(linears: Mapping[str, LinearSpec], layer: int) -> dict[str, tuple[str, str]]:
    """Kind -> (tensor, module that has its factors), of the adapted linears of a layer, in the model's order."""
    result = {}
    for number, (kind, linear) in enumerate(linears.items()):
        name = packed_name(linear, layer)
        result[kind] = (name, name.rpartition(".")[0] + ".base_layer" * (len(linears) - 1 - number))
    return result


def _pack(
    name: str,
    holder: str,
    linear: LinearSpec,
    modules: Sequence[ModuleLayout],
    spec: AdapterSpec,
    tensors: Mapping[str, Tensor],
) -> PackedFactors:
    by_expert = {expert: module for module in modules for expert in module.experts(spec.shapes)}
    forms = {module.blocks for module in modules}
    scales = {block.scale for blocks in forms for block in blocks}
    if len(by_expert) < linear.experts or len(forms) > 1 or len(scales) > 1:
        raise UserError(
            f"the adapters on the experts of {modules[0].name} do not have one form ({len(by_expert)} of "
            f"{linear.experts} experts, {len(forms)} layouts, {len(scales)} scales), which a tensor of all experts in "
            "PEFT needs; write a pair for each expert instead (--expert-layout each)"
        )
    [blocks] = forms
    own = [spec.of_module(by_expert[expert], tensors) for expert in range(linear.experts)]
    b = _rows_in_file(linear, torch.stack([factors[B.name] for factors in own], 2))
    block = blocks[0]
    rank = modules[0].rank
    # Several blocks have a scale in common, and so an alpha.
    alpha = block.alpha if len(blocks) == 1 else block.scale * (rank**0.5 if block.use_rslora else rank)
    return PackedFactors(
        name, holder, torch.cat([factors[A.name] for factors in own]), b.flatten(1), rank, alpha, block.scale
    )


def unpack(
    patterns: PeftPatterns, tensors: Mapping[str, Tensor], shapes: ModelSpec, prefix: str
) -> tuple[PeftPatterns, dict[str, Tensor]]:
    """A PEFT adapter with a pair for each HF linear instead of `target_parameters`: patterns that know their ranks, and
    tensors under the linears' names. prefix: before every name. Raises UserError for parameters that are no experts',
    and for factors that are missing or have another shape."""
    result = dict(tensors)
    sizes: dict[str, tuple[int, float]] = {}
    found: set[str] = set()
    for layer in range(shapes.num_layers):
        adapted = {}
        for linear in shapes.adaptable(layer):
            wanted = [] if not linear.experts else patterns.parameters_named(packed_name(linear, layer))
            found.update(wanted)
            if wanted:
                adapted[linear.kind] = linear
            if linear.kind == ROUTER and (named := patterns.parameters_named(router_parameter(linear, layer))):
                found.update(named)
                hf = linear.hf_name(linear.segments[0], layer)
                sizes[hf] = patterns.rank_and_alpha(router_parameter(linear, layer))
        for kind, (name, holder) in _holders(adapted, layer).items():
            rank, alpha = patterns.rank_and_alpha(name)
            keys = [f"{prefix}{holder}.{factor.peft_name}" for factor in (A, B)]
            a, b = (_take(result, key, name) for key in keys)
            linear = adapted[kind]
            _check(keys[0], a, (linear.experts * rank, linear.in_features))
            _check(keys[1], b, (linear.out_features, rank * linear.experts))
            for hf, own_a, own_b in _each(linear, layer, a, b, rank):
                result[f"{prefix}{hf}.{A.peft_name}"], result[f"{prefix}{hf}.{B.peft_name}"] = own_a, own_b
                sizes[hf] = (rank, alpha)
    strange = sorted(set(patterns.parameters) - found)
    if strange:
        raise UserError(
            f"adapter_config.json has target_parameters {', '.join(strange[:3])}: adapters on bare parameters are read "
            "where they are the experts' (gate_up_proj, down_proj) or the router's (weight) of this model"
        )
    return replace(patterns, parameters=(), sizes=sizes), result


def _each(linear: LinearSpec, layer: int, a: Tensor, b: Tensor, rank: int) -> list[tuple[str, Tensor, Tensor]]:
    """(HF linear, A, B) of every expert's linears."""
    columns = _rows_in_parts(linear, b.view(linear.out_features, rank, linear.experts))
    result = []
    for expert in range(linear.experts):
        own_a = a[expert * rank : (expert + 1) * rank]
        rows = columns[:, :, expert].split([part.rows for part in linear.parts])
        for part, own_b in zip(linear.parts, rows, strict=True):
            result.append((linear.hf_name(part.segment, layer, expert), own_a, own_b.contiguous()))
    return result


def _rows_in_file(linear: LinearSpec, rows: Tensor) -> Tensor:
    """Rows that lie part after part in the order of transformers' tensor: GPT-OSS' gate and up alternate."""
    return rows.unflatten(0, (len(linear.parts), -1)).transpose(0, 1).flatten(0, 1) if linear.packed else rows


def _rows_in_parts(linear: LinearSpec, rows: Tensor) -> Tensor:
    """The inverse of `_rows_in_file`."""
    return rows.unflatten(0, (-1, len(linear.parts))).transpose(0, 1).flatten(0, 1) if linear.packed else rows


def _take(tensors: dict[str, Tensor], key: str, name: str) -> Tensor:
    if key not in tensors:
        raise UserError(f"adapter_config.json targets the parameter {name}, but the weights lack {key}")
    return tensors.pop(key)


def _check(key: str, tensor: Tensor, wanted: tuple[int, int]) -> None:
    if tuple(tensor.shape) != wanted:
        raise UserError(
            f"{key} has shape {tuple(tensor.shape)}, wanted {wanted}; the adapter is for another base, or its "
            "adapter_config.json for another adapter"
        )


def same_bits(left: Tensor, right: Tensor) -> bool:
    if left.shape != right.shape or left.dtype != right.dtype:
        return False
    return torch.equal(left.contiguous().view(torch.uint8), right.contiguous().view(torch.uint8))


def shared_by_all(
    linear: LinearSpec, by_expert: Mapping[int | None, Mapping[str, Mapping[FactorKey, Tensor]]], shared: bool | None
) -> bool:
    """Whether the experts of a layer have one adapter: `shared` where it is said, else whether they all have the same
    bits. by_expert: expert -> segment -> factors. Raises UserError where one is wanted of different ones."""
    if not linear.experts or not by_expert or shared is False:
        return False
    first = next(iter(by_expert.values()))
    same = len(by_expert) == linear.experts and all(
        own.keys() == first.keys()
        and all(same_bits(value, first[segment][key]) for segment in own for key, value in own[segment].items())
        for own in by_expert.values()
    )
    if shared and not same:
        raise UserError(
            f"the adapter has a pair of factors for each expert of {linear.name}, and share_expert_adapters=true wants "
            "one for all; set share_expert_adapters=false"
        )
    return same
