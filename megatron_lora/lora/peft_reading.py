"""Any HF PEFT LoRA adapter as a fused one, its names and shapes held against its config and the model. Pure."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from megatron_lora.errors import UserError
from megatron_lora.lora.layout import (
    FACTORS_OF_TYPE,
    AdapterSpec,
    Block,
    Factor,
    FactorKey,
    LinearSpec,
    ModelSpec,
    ModuleLayout,
    module_name,
)
from megatron_lora.lora.model_spec import ROUTER
from megatron_lora.lora.packed_experts import same_bits, shared_by_all, unpack
from megatron_lora.lora.peft_config import MERGE_WITH_PEFT, PeftPatterns, read_patterns
from megatron_lora.lora.peft_format import (
    PREFIX,
    HFLinear,
    fuse_factor,
    hf_linears,
    peft_name,
    segment_features,
    some_of,
    widest,
)

Values = Mapping[FactorKey, Tensor]
# peft adds this copy of the frozen base where lm_head is a target. It is no part of the adapter.
BASE_HEAD = f"{PREFIX}lm_head.base_layer.weight"


def from_hf(
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    shapes: ModelSpec,
    base_model_name: str | None = None,
    base_fingerprint: str | None = None,
    share_experts: bool | None = None,
) -> tuple[AdapterSpec, dict[str, Tensor]]:
    """Any HF PEFT LoRA adapter as (spec, `<module>.<factor>` -> full fused tensor).

    HF linears of one fused linear share a block where their A, rank and scale are bitwise equal; otherwise each has its
    own. Experts have a pair each, or one for all of a layer: as share_experts says, by default one where all have the
    same bits. `to_hf` of the result returns the same factors bit for bit (a module that mixes dtypes is held in the
    wider).
    Whether the model has what is trained whole (`spec.saved`) is for the caller to check
    (`conversion.saved_modules.check_saved`). Raises UserError for what is not supported (named), for tensors that
    config and shapes do not agree with.
    """
    patterns, tensors = unpack(read_patterns(config), tensors, shapes, PREFIX)
    table = FACTORS_OF_TYPE[patterns.type]
    saved = {
        key.removeprefix(PREFIX): tensor for key, tensor in tensors.items() if patterns.saves(key.removeprefix(PREFIX))
    }
    factors = {key: tensor for key, tensor in tensors.items() if key.removeprefix(PREFIX) not in saved}
    found = _collect_factors(factors, table, patterns, shapes)
    fused: dict[str, Tensor] = {}
    modules: list[ModuleLayout] = []
    for layer in [*range(shapes.num_layers), None]:
        for linear in shapes.adaptable(layer):
            for expert, names, present in _of_experts(linear, layer, found, share_experts):
                name = module_name(linear.kind, layer, expert)
                module = ModuleLayout(name, linear.kind, _group_segments(present, names, patterns))
                modules.append(module)
                dtype = widest(part for parts in present.values() for part in parts.values())
                for factor in table:
                    parts = {segment: own[factor.key].to(dtype) for segment, own in present.items()}
                    fused[f"{name}.{factor.name}"] = fuse_factor(factor, module, parts, shapes)
    settings = {"dim": patterns.rank, "alpha": patterns.alpha, "dropout": patterns.dropout, "dropout_position": "pre"}
    name = base_model_name or config.get("base_model_name_or_path") or ""
    whole = {key: tuple(tensor.shape) for key, tensor in saved.items()}
    spec = AdapterSpec(name, shapes, modules, base_fingerprint, settings, patterns.type, saved=whole)
    return spec, fused | saved


def _of_experts(
    linear: LinearSpec, layer: int | None, found: Mapping[str, Values], share: bool | None
) -> list[tuple[int | None, dict[str, str], dict[str, Values]]]:
    """What becomes a module each: (expert, segment -> HF linear, segment -> factors), for each expert that has an
    adapter, or once for all."""
    names: dict[int | None, dict[str, str]] = {}
    present: dict[int | None, dict[str, Values]] = {}
    for expert in linear.expert_numbers:
        names[expert] = {segment: linear.hf_name(segment, layer, expert) for segment in linear.segments}
        own = {segment: found[hf] for segment, hf in names[expert].items() if hf in found}
        if own:
            present[expert] = own
    if shared_by_all(linear, present, share):
        first = next(iter(present))
        return [(None, names[first], present[first])]
    return [(expert, names[expert], own) for expert, own in present.items()]


def _group_segments(
    factors: Mapping[str, Values], hf_names: Mapping[str, str], patterns: PeftPatterns
) -> tuple[Block, ...]:
    """The blocks of one fused linear: segments with the same A, rank and alpha go together."""
    groups: list[tuple[list[str], Tensor, int, float]] = []
    for segment, own in factors.items():
        a = own["A"]
        rank, alpha = patterns.rank_and_alpha(hf_names[segment])
        for names, other, other_rank, other_alpha in groups:
            if (rank, alpha) == (other_rank, other_alpha) and same_bits(a, other):
                names.append(segment)
                break
        else:
            groups.append(([segment], a, rank, alpha))
    blocks: list[Block] = []
    start = 0
    for names, _, rank, alpha in groups:
        blocks.append(Block.build(names, start, rank, alpha, patterns.use_rslora))
        start += rank
    return tuple(blocks)


def _collect_factors(
    tensors: Mapping[str, Tensor], table: Sequence[Factor], patterns: PeftPatterns, shapes: ModelSpec
) -> dict[str, Values]:
    """HF linear -> its factors, after every name and shape was checked against config and model."""
    linears = hf_linears(shapes)
    if shapes.tied_embeddings and patterns.matches("lm_head"):
        raise UserError(
            "the adapter targets lm_head, but this model ties it to the input embeddings: an update of the head alone "
            "cannot be expressed; train without lm_head"
        )
    keys = {peft_name(name, factor) for name in linears for factor in table}
    unexpected = sorted(set(tensors) - keys - {BASE_HEAD})
    if on_embeddings := [name for name in unexpected if ".lora_embedding_" in name]:
        raise UserError(
            f"adapters on embeddings are not supported: the adapter holds {some_of(on_embeddings)}; {MERGE_WITH_PEFT}, "
            "or train the embeddings whole (modules_to_save)"
        )
    if unexpected:
        raise UserError(
            f"the adapter holds tensors for no linear of this {shapes.model_type} model ({shapes.num_layers} layers): "
            f"{some_of(unexpected)}; is it an adapter for another base?"
        )
    result: dict[str, Values] = {}
    with_adapters = {
        (linear.kind, linear.layer)
        for name, linear in linears.items()
        if any(peft_name(name, factor) in tensors for factor in table)
    }
    for name, linear in linears.items():
        no_linear = (linear.expert is not None or linear.kind == ROUTER) and name not in patterns.sizes
        if no_linear and (linear.kind, linear.layer) not in with_adapters:
            # Experts and routers are no linears of transformers' model: names that fit them may mean others alone.
            continue
        own: dict[FactorKey, str] = {factor.key: peft_name(name, factor) for factor in table}
        targeted = patterns.matches(name)
        present = [key for key in own.values() if key in tensors]
        if targeted and len(present) < len(own):
            missing = some_of(sorted(set(own.values()) - set(present)))
            raise UserError(f"adapter_config.json targets {name}, but the weights lack {missing}")
        if present and not targeted:
            raise UserError(f"the weights hold {present[0]}, which adapter_config.json does not target")
        if targeted:
            rank = patterns.rank_and_alpha(name)[0]
            for factor in table:
                _check_shape(own[factor.key], tensors[own[factor.key]], factor, linear, rank, shapes)
            result[name] = {key: tensors[tensor_name] for key, tensor_name in own.items()}
    if not result:
        raise UserError(f"the adapter adapts no linear of this model: target_modules={patterns.target_modules!r}")
    return result


def _check_shape(key: str, tensor: Tensor, factor: Factor, linear: HFLinear, rank: int, shapes: ModelSpec) -> None:
    inputs, outputs = segment_features(linear, shapes)
    sizes = {"in": inputs, "out": outputs, "rank": rank}
    wanted = tuple(sizes[axis] for axis in factor.axes)
    if tuple(tensor.shape) != wanted:
        raise UserError(
            f"{key} has shape {tuple(tensor.shape)}, wanted {wanted} (rank {rank} on this base); "
            "the adapter is for another base, or its adapter_config.json for another adapter"
        )
