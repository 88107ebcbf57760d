"""Put adapters into a Megatron model: replace each targeted linear by its adapted one."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.moe.moe_layer import BaseMoELayer
from torch import Tensor, nn

from megatron_lora.config.schema_megatron import AdapterInput
from megatron_lora.lora.arithmetic import TensorParallel
from megatron_lora.lora.base_weight import BaseWeight, DenseWeight
from megatron_lora.lora.expert_linear import AdaptedExpert, ExpertAdapter, ExpertLinear
from megatron_lora.lora.frozen_linear import FrozenLinear
from megatron_lora.lora.init import Factors
from megatron_lora.lora.layout import AdapterSpec, FactorKey, ModuleLayout
from megatron_lora.lora.linear import LoRAColumnParallelLinear, LoRALinear, LoRAReplicatedLinear, LoRARowParallelLinear
from megatron_lora.lora.methods import method_of
from megatron_lora.lora.model_spec import ROUTER, Parallel
from megatron_lora.lora.model_tables import LINEARS
from megatron_lora.lora.router_adapter import RouterAdapter, routers
from megatron_lora.lora.sharding import shard

# Where the linears of a layer are that are replaced one by one: path of their module -> their names in it.
_KINDS_OF_PARENT: dict[str, list[str]] = {}
for _kind, _row in LINEARS.items():
    if not _row.expert and _kind != ROUTER:
        _KINDS_OF_PARENT.setdefault(_row.path.rpartition(".")[0], []).append(_row.path.rpartition(".")[2])
_KINDS: dict[Parallel, type[LoRALinear]] = {
    "column": LoRAColumnParallelLinear,
    "row": LoRARowParallelLinear,
    "replicated": LoRAReplicatedLinear,
}

Adapted = LoRALinear | AdaptedExpert | RouterAdapter


@dataclass(frozen=True)
class AdapterOptions:
    """How every adapter of a run computes. dtype: of the factors, None for the base weight's. keeps_derived:
    `LoRALinear`'s. recomputed: which inputs of adapted linears are not kept."""

    dropout: float
    dropout_before: bool
    all_to_all: bool
    dtype: torch.dtype | None
    keeps_derived: bool
    recomputed: Collection[AdapterInput] = ()


def inject(
    chunks: Sequence[GPTModel],
    spec: AdapterSpec,
    factors: Factors,
    options: AdapterOptions,
    tp: TensorParallel,
    expert_tp: TensorParallel,
) -> list[Adapted]:
    """Freeze the model and adapt the spec's linears that this rank holds. Returns the adapted modules, of experts one
    for each.

    chunks: this rank's (virtual) pipeline stages, base weights loaded or not. tp, expert_tp: the ranks that share a
    linear's weight, and those that share an expert's.
    """
    layouts = {module.name: module for module in spec.modules}
    adapted: list[Adapted] = []
    for chunk in chunks:
        chunk.requires_grad_(False)
        for name, parent, attribute in list(global_linears(chunk)):
            if name in layouts:
                linear = _adapt(getattr(parent, attribute), layouts[name], spec, factors, options, tp)
                linear.keeps_derived = options.keeps_derived
                linear.recomputes_input = _made_by(linear) in options.recomputed
                setattr(parent, attribute, linear)
                adapted.append(linear)
        for name, numbers, linear in expert_linears(chunk):
            adapted += _adapt_experts(name, numbers, linear, layouts, spec, factors, options, expert_tp)
        for name, router in routers(chunk):
            if name in layouts:
                router.adapter = _router_adapter(router, layouts[name], spec, factors, options, tp)
                adapted.append(router.adapter)
    return adapted


def _made_by(linear: LoRALinear) -> AdapterInput:
    """What makes the input of a linear, where something does that its module tells it of."""
    return "activation" if linear.parallel_kind == "row" else "layernorm"


@torch.no_grad()
def put_factors(adapted: Sequence[Adapted], spec: AdapterSpec, tensors: Mapping[str, Tensor]) -> None:
    """Copy this rank's part of whole factors, `<module>.<factor>` where they are given, into the modules."""
    for linear in adapted:
        kind, tp = linear.layout.kind, linear.split
        for held in linear.held_factors:
            whole = tensors.get(f"{linear.layout.name}.{held.factor.name}")
            if whole is None:
                continue
            padded = None
            if kind == "output_layer" and isinstance(linear, LoRALinear):
                padded = linear.base_weight().shape[0] * tp.size
            piece = shard(
                whole,
                held.factor.key,
                kind,
                tp.rank,
                tp.size,
                spec.shapes,
                a2a=linear.all_to_all,
                padded_vocab_size=padded,
            )
            held.value.copy_(piece)
    for linear in adapted:
        linear.factors_changed()


def global_linears(chunk: GPTModel) -> Iterator[tuple[str, nn.Module, str]]:
    """(full name with the global layer number, parent module, attribute) of each linear that can be adapted and is of
    no single expert, and no router."""
    for layer in chunk.decoder.layers:
        number: Any = layer.layer_number
        prefix = f"decoder.layers.{number - 1}"
        for path, kinds in _KINDS_OF_PARENT.items():
            parent = _submodule(layer, path)
            for kind in kinds:
                if hasattr(parent, kind):
                    yield f"{prefix}.{path}.{kind}", parent, kind
    if chunk.post_process:
        yield "output_layer", chunk, "output_layer"


def _submodule(layer: Any, path: str) -> Any:
    for name in path.split("."):
        layer = getattr(layer, name, None)
    return layer


def expert_linears(chunk: GPTModel) -> Iterator[tuple[str, Sequence[int], ExpertLinear]]:
    """(full name with the global layer number, numbers of this rank's experts in the layer, their linear)."""
    for layer in chunk.decoder.layers:
        if isinstance(layer.mlp, BaseMoELayer):
            experts: Any = layer.mlp.experts
            number: Any = layer.layer_number
            for attribute in ("linear_fc1", "linear_fc2"):
                name = f"decoder.layers.{number - 1}.mlp.experts.{attribute}"
                yield name, layer.mlp.local_expert_indices, getattr(experts, attribute)


def base_weight_of(linear: nn.Module) -> BaseWeight:
    """The weight of Megatron's own linear, or of one of ours."""
    if isinstance(linear, FrozenLinear):
        return linear.base_weight()
    assert isinstance(linear.weight, Tensor)
    return DenseWeight(linear.weight)


def _adapt(
    base: nn.Module,
    layout: ModuleLayout,
    spec: AdapterSpec,
    factors: Factors,
    options: AdapterOptions,
    tp: TensorParallel,
) -> LoRALinear:
    weight = base_weight_of(base)
    parallel = spec.shapes.linear(layout.kind).parallel
    all_to_all = options.all_to_all and parallel == "row" and tp.sequence_parallel
    padded = weight.shape[0] * tp.size if layout.kind == "output_layer" else None

    def local(tensor: Tensor, factor: FactorKey) -> Tensor:
        piece = shard(
            tensor, factor, layout.kind, tp.rank, tp.size, spec.shapes, a2a=all_to_all, padded_vocab_size=padded
        )
        return piece.to(weight.device)

    whole = factors(layout)
    dtype = options.dtype or weight.dtype
    mask = layout.b_mask(spec.shapes)
    return _KINDS[parallel](
        base,
        layout,
        spec.shapes,
        base.config,  # type: ignore[arg-type]
        tp,
        method=method_of(spec.type),
        factors={f.key: local(whole[f.name], f.key).to(f.dtype or dtype) for f in spec.factors},
        b_mask=None if mask is None else local(mask, "B"),
        dropout=options.dropout,
        dropout_before=options.dropout_before,
        all_to_all=all_to_all,
    )


def _router_adapter(
    router: Any,
    layout: ModuleLayout,
    spec: AdapterSpec,
    factors: Factors,
    options: AdapterOptions,
    tp: TensorParallel,
) -> RouterAdapter:
    weight: Tensor = router.weight
    drawn = factors(layout)
    dtype = options.dtype or weight.dtype
    own: dict[FactorKey, Tensor] = {f.key: drawn[f.name].to(weight.device, dtype) for f in spec.factors}
    return RouterAdapter(layout, spec.shapes, tp, method=method_of(spec.type), factors=own)


def _adapt_experts(
    name: str,
    numbers: Sequence[int],
    linear: ExpertLinear,
    layouts: Mapping[str, ModuleLayout],
    spec: AdapterSpec,
    factors: Factors,
    options: AdapterOptions,
    tp: TensorParallel,
) -> list[AdaptedExpert]:
    """Put the adapters of a rank's experts into their linear. numbers: of those experts in the layer."""
    shared = name in layouts
    mine = [layouts[name]] if shared else [layouts[f"{name}.{n}"] for n in numbers if f"{name}.{n}" in layouts]
    if not mine:
        return []
    assert shared or len(mine) == len(numbers), f"of {name} some experts have adapters and some have none"
    weight, kind = linear.expert_weight(), mine[0].kind

    def local(tensor: Tensor, factor: FactorKey) -> Tensor:
        return shard(tensor, factor, kind, tp.rank, tp.size, spec.shapes).to(weight.device)

    def held(key: FactorKey, wholes: Sequence[Tensor]) -> Tensor:
        pieces = [local(whole, key).to(options.dtype or weight.dtype) for whole in wholes]
        return pieces[0] if shared else torch.stack(pieces)

    drawn = [factors(layout) for layout in mine]
    mask = mine[0].b_mask(spec.shapes)
    linear.adapter = ExpertAdapter(
        mine,
        linear.parallel_kind,
        tp,
        method=method_of(spec.type),
        factors={f.key: held(f.key, [one[f.name] for one in drawn]) for f in spec.factors},
        b_mask=None if mask is None else local(mask, "B"),
        dropout=options.dropout,
        dropout_before=options.dropout_before,
    )
    return [
        AdaptedExpert(linear.adapter, mine[0 if shared else place], spec.shapes, number, None if shared else place)
        for place, number in enumerate(numbers)
    ]
