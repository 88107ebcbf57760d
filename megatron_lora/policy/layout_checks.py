"""Whether a parallel layout fits a model's shapes and the number of ranks, before any weight is loaded."""

from math import lcm
from typing import get_args

from megatron_lora.config.schema_megatron import MegatronConfig, RecomputeModule
from megatron_lora.config.schema_policy import PolicyConfig
from megatron_lora.errors import UserError
from megatron_lora.lora.model_spec import ModelSpec
from megatron_lora.policy.cuda_graphs import ungraphed_reason
from megatron_lora.policy.router_checks import check_replay, check_router

_MEGATRON, _DTENSOR = "policy.megatron_cfg", "policy.dtensor_cfg"


def check_layout(policy: PolicyConfig, shape: ModelSpec, world_size: int) -> None:
    """Refuse a layout of the active backend that the model or `world_size` ranks do not allow. Raises UserError."""
    _check_frozen_experts(policy, shape)
    check_replay(policy, shape)
    if policy.backend == "megatron":
        megatron = policy.megatron_cfg
        _check_tensor_parallel(f"{_MEGATRON}.tensor_model_parallel_size", megatron.tensor_model_parallel_size, shape)
        _check_pipeline(megatron, shape.num_layers)
        _check_experts(megatron, shape, world_size)
        _check_linear_attention(megatron, shape)
        _check_world(megatron, world_size)
        _check_shared_prefix(policy)
        _check_adapters(megatron, shape)
        _check_recompute(megatron, shape)
    else:
        size = policy.dtensor_cfg.tensor_parallel_size
        key = f"{_DTENSOR}.tensor_parallel_size"
        _check_tensor_parallel(key, size, shape)
        _check_divides(key, size, world_size, "ranks")
        if size > 1 and shape.linear_layers:
            raise UserError(
                f"{key}={size}: transformers has no tensor-parallel plan for {shape.recurrence} ({shape.model_type}); "
                f"use 1, or set {_MEGATRON}.enabled=true"
            )
        if policy.dtensor_cfg.lora_cfg.enabled and policy.dtensor_cfg.lora_cfg.use_triton and size > 1:
            raise UserError(
                f"{_DTENSOR}.lora_cfg.use_triton=true works on whole matrices only, and {key}={size}; "
                f"set use_triton=false or tensor_parallel_size=1"
            )
    ungraphed_reason(policy, shape)
    _check_sequence_length(policy)


def _check_linear_attention(megatron: MegatronConfig, shape: ModelSpec) -> None:
    if not shape.linear_layers:
        return
    key = f"{_MEGATRON}.tensor_model_parallel_size"
    what = f"{'groups' if shape.mixers else 'key heads'} of {shape.recurrence}"
    _check_divides(key, megatron.tensor_model_parallel_size, shape.linear_key_heads, what)
    # Each of the ranks that share a sequence computes some of the heads for all of it.
    own = shape.linear_key_heads // megatron.tensor_model_parallel_size
    _check_divides(f"{_MEGATRON}.context_parallel_size", megatron.context_parallel_size, own, f"{what} of a rank")


def _check_divides(key: str, size: int, number: int, what: str) -> None:
    if number % size:
        raise UserError(f"{key}={size} does not divide the {number} {what}; use {_choices(_divisors(number))}")


def sequence_multiple(policy: PolicyConfig) -> int:
    """The number of tokens that a micro-batch's length must be a multiple of: the recipe's own wish, TP under
    sequence parallelism, and two chunks a rank under context parallelism."""
    multiple = policy.make_sequence_length_divisible_by
    if policy.backend == "dtensor":
        sequence_parallel = policy.dtensor_cfg.sequence_parallel
        return lcm(multiple, policy.dtensor_cfg.tensor_parallel_size if sequence_parallel else 1)
    megatron = policy.megatron_cfg
    tensor = megatron.tensor_model_parallel_size if megatron.sequence_parallel else 1
    context = megatron.context_parallel_size
    return lcm(multiple, tensor * (2 * context if context > 1 else 1))


def _check_tensor_parallel(key: str, size: int, shape: ModelSpec) -> None:
    # Each rank holds whole query groups with their query heads, and an equal part of the MLP.
    # Experts are split by a size of their own.
    widths = [
        number
        for kind, number in (
            ("linear_fc1", shape.ffn_hidden_size),
            ("shared_experts.linear_fc1", shape.shared_ffn_hidden_size),
        )
        if kind in shape.kinds
    ]
    fits = [
        candidate
        for candidate in _divisors(shape.num_query_groups)
        if shape.num_attention_heads % candidate == 0 and all(width % candidate == 0 for width in widths)
    ]
    if size in fits:
        return
    if shape.num_attention_heads % size:
        what = f"{shape.num_attention_heads} attention heads"
    elif shape.num_query_groups % size:
        what = f"{shape.num_query_groups} query groups"
    else:
        what = f"MLP width of {next(width for width in widths if width % size)}"
    raise UserError(f"{key}={size} does not divide the model's {what}; use {_choices(fits)}")


def _check_pipeline(megatron: MegatronConfig, num_layers: int) -> None:
    stages = megatron.pipeline_model_parallel_size
    key = f"{_MEGATRON}.pipeline_model_parallel_size={stages}"
    if stages > num_layers:
        raise UserError(f"{key} is above the model's {num_layers} layers; use at most {num_layers}")
    first, last = megatron.num_layers_in_first_pipeline_stage, megatron.num_layers_in_last_pipeline_stage
    fixed = [size for size in (first, last) if size is not None]
    if fixed and stages == 1:
        raise UserError(
            f"{_MEGATRON}.num_layers_in_first_pipeline_stage and num_layers_in_last_pipeline_stage need "
            f"pipeline_model_parallel_size above 1; set them to null"
        )
    rest, middle = num_layers - sum(fixed), stages - len(fixed)
    if fixed and (rest < middle or (middle == 0 and rest) or (middle and rest % middle)):
        raise UserError(
            f"{key} with num_layers_in_first_pipeline_stage={_or_null(first)} and num_layers_in_last_pipeline_stage="
            f"{_or_null(last)} leaves {rest} of the model's {num_layers} layers for {middle} stages; each of "
            "those must get the same number, at least one"
        )
    if not fixed and num_layers % stages:
        raise UserError(
            f"{key} does not divide the model's {num_layers} layers; use {_choices(_divisors(num_layers))}, or set "
            "num_layers_in_first_pipeline_stage or num_layers_in_last_pipeline_stage"
        )
    _check_virtual_stages(megatron, [size for size in (*fixed, rest // middle if middle else None) if size])


def _check_virtual_stages(megatron: MegatronConfig, layers_of_stages: list[int]) -> None:
    pieces = megatron.virtual_pipeline_model_parallel_size
    if pieces is None or pieces == 1:
        return
    key = f"{_MEGATRON}.virtual_pipeline_model_parallel_size={pieces}"
    if megatron.pipeline_model_parallel_size == 1:
        raise UserError(f"{key} needs pipeline_model_parallel_size above 1; set it to null or raise the other")
    fits = [size for size in _divisors(min(layers_of_stages)) if all(layers % size == 0 for layers in layers_of_stages)]
    if pieces not in fits:
        counts = " and ".join(str(layers) for layers in sorted(set(layers_of_stages)))
        raise UserError(f"{key} does not divide the {counts} layers of a pipeline stage; use {_choices(fits)}")


def _check_recompute(megatron: MegatronConfig, shape: ModelSpec) -> None:
    if not megatron.activation_checkpointing or megatron.recompute_granularity != "selective":
        return
    needed = {
        "moe": "experts.linear_fc1",
        "moe_act": "experts.linear_fc1",
        "shared_experts": "shared_experts.linear_fc1",
        "mla_up_proj": "linear_kv_up_proj",
        "gdn_norm_out": "in_proj",
    }
    for module in megatron.recompute_modules or []:
        if module in needed and needed[module] not in shape.kinds:
            fits = [name for name in get_args(RecomputeModule) if name not in needed or needed[name] in shape.kinds]
            raise UserError(
                f"{_MEGATRON}.recompute_modules has {module!r}, which a {shape.model_type} model does not have; use "
                f"some of {', '.join(fits)}"
            )


def check_recomputed(policy: PolicyConfig, shapes: ModelSpec, *, transformer_engine: bool) -> None:
    """Raises UserError where Megatron-Core recomputes a module by means of Transformer Engine, which is not there."""
    megatron = policy.megatron_cfg
    if transformer_engine or not megatron.activation_checkpointing or megatron.recompute_granularity != "selective":
        return
    needing = {"moe_act", "mla_up_proj", "gdn_norm_out"}
    if shapes.num_experts or shapes.is_latent:
        # Elsewhere norms are part of the linear behind them (`recompute_adapter_inputs`).
        needing.add("layernorm")
    for module in megatron.recompute_modules or []:
        if module in needing:
            raise UserError(
                f"{_MEGATRON}.recompute_modules has {module!r}, which Megatron-Core recomputes with Transformer "
                "Engine alone, and it is not installed here (it needs a GPU); use core_attn, mlp or moe, or "
                "recompute_granularity=full"
            )


def _check_frozen_experts(policy: PolicyConfig, shape: ModelSpec) -> None:
    if not shape.num_experts:
        return
    key = f"{_MEGATRON}.peft" if policy.backend == "megatron" else f"{_DTENSOR}.lora_cfg"
    if not policy.adapter.enabled:
        raise UserError(
            f"{key}.enabled=false: a {shape.model_type} model has experts, which are not trained in full; set it to "
            "true, and they stay frozen"
        )


def _check_experts(megatron: MegatronConfig, shape: ModelSpec, world_size: int) -> None:
    experts, tensor = megatron.expert_model_parallel_size, megatron.expert_tensor_parallel_size
    if not shape.num_experts:
        for name, size in (("expert_model_parallel_size", experts), ("expert_tensor_parallel_size", tensor)):
            if size > 1:
                raise UserError(f"{_MEGATRON}.{name}={size}, but the model ({shape.model_type}) has no experts; use 1")
        return
    check_router(megatron, shape)
    _check_divides(f"{_MEGATRON}.expert_model_parallel_size", experts, shape.num_experts, "experts of the model")
    _check_divides(
        f"{_MEGATRON}.expert_tensor_parallel_size", tensor, shape.moe_ffn_hidden_size, "features of an expert"
    )
    if tensor > 1 and shape.linear("experts.linear_fc2").bias:
        raise UserError(
            f"{_MEGATRON}.expert_tensor_parallel_size={tensor}: the experts of a {shape.model_type} model have biases, "
            "which each rank of an expert would add; use 1"
        )
    if megatron.tensor_model_parallel_size > 1 and not megatron.sequence_parallel:
        raise UserError(
            f"{_MEGATRON}.tensor_model_parallel_size={megatron.tensor_model_parallel_size} of a model with experts "
            f"({shape.model_type}) needs {_MEGATRON}.sequence_parallel=true: each token is routed once"
        )
    ranks = experts * tensor * megatron.pipeline_model_parallel_size
    if world_size % ranks:
        raise UserError(
            f"{_MEGATRON}: expert_model_parallel_size={experts} x expert_tensor_parallel_size={tensor} x "
            f"pipeline_model_parallel_size={megatron.pipeline_model_parallel_size} = {ranks} does not divide the "
            f"{world_size} ranks; start a multiple of {ranks}{_experts_that_fit(shape, ranks // experts, world_size)}"
        )


def _experts_that_fit(shape: ModelSpec, others: int, world_size: int) -> str:
    """The sizes of EP for as many ranks, where the other sizes (their product is `others`) leave any."""
    fits = [size for size in _divisors(shape.num_experts) if world_size % (size * others) == 0]
    return f", or use expert_model_parallel_size={_choices(fits)}" if fits else ", or lower one of the sizes"


def _check_world(megatron: MegatronConfig, world_size: int) -> None:
    needed = megatron.model_parallel_size
    if world_size % needed:
        raise UserError(
            f"{_MEGATRON}: tensor_model_parallel_size={megatron.tensor_model_parallel_size} x "
            f"pipeline_model_parallel_size={megatron.pipeline_model_parallel_size} x "
            f"context_parallel_size={megatron.context_parallel_size} = {needed} does not divide the {world_size} "
            f"ranks; start a multiple of {needed} ranks (--nproc; torchrun: --nproc-per-node) or lower one of the sizes"
        )


def _check_shared_prefix(policy: PolicyConfig) -> None:
    size = policy.megatron_cfg.context_parallel_size
    if policy.shared_prefix is True and size > 1:
        raise UserError(
            f"policy.shared_prefix=true does not go with {_MEGATRON}.context_parallel_size={size}, which splits rows "
            "over ranks one by one; set it to auto, which leaves it off there"
        )


def _check_adapters(megatron: MegatronConfig, shape: ModelSpec) -> None:
    peft = megatron.peft
    if not peft.enabled:
        return
    if peft.a2a_experimental and megatron.tensor_model_parallel_size > 1 and not megatron.sequence_parallel:
        raise UserError(
            f"{_MEGATRON}.peft.a2a_experimental=true needs sequence_parallel=true at tensor_model_parallel_size="
            f"{megatron.tensor_model_parallel_size}; turn one on or the other off"
        )
    adapted_head = [name for name in peft.target_modules if name.rpartition(".")[2] in ("output_layer", "lm_head")]
    if adapted_head and shape.tied_embeddings:
        raise UserError(
            f"{_MEGATRON}.peft.target_modules names {adapted_head[0]}, but the model ties it to its embeddings: a "
            "trained adapter on it could not be exported; leave it out"
        )


def _check_sequence_length(policy: PolicyConfig) -> None:
    limit, multiple = policy.max_total_sequence_length, sequence_multiple(policy)
    if limit % multiple:
        below, above = limit // multiple * multiple, -(-limit // multiple) * multiple
        raise UserError(
            f"policy.max_total_sequence_length={limit} is no multiple of {multiple}, which "
            "policy.make_sequence_length_divisible_by and the sequence and context parallel sizes ask for; use "
            f"{above if not below else f'{below} or {above}'}"
        )


def _divisors(number: int) -> list[int]:
    return [candidate for candidate in range(1, number + 1) if number % candidate == 0]


def _choices(sizes: list[int]) -> str:
    """`[1, 2, 4, 8]` -> `1, 2, 4 or 8`."""
    if len(sizes) == 1:
        return str(sizes[0])
    return f"{', '.join(str(size) for size in sizes[:-1])} or {sizes[-1]}"


def _or_null(value: int | None) -> str:
    return "null" if value is None else str(value)
