"""Which fields of a model's config are taken, before any weight is loaded.

Every field of the family's transformers class is in one of these tables: what the model is built from (`BUILT_FROM`,
carried into both backends), what does not change the numbers of training (`WITHOUT_EFFECT`), what must be off
(`MUST_BE`). A field in none of them (a newer transformers) must be at its class's default. Fields that the class does
not know are named, unless they are off.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import torch

from megatron_lora.conversion.hf_model import PARTIAL_ROTARY, QUANTIZATION, SIZES, HFModel, activation
from megatron_lora.conversion.routing_gate import check_routing
from megatron_lora.errors import UserError
from megatron_lora.lora.model_spec import HYBRID
from megatron_lora.lora.model_tables import GATED_ATTENTION, PACKED_EXPERTS

BUILT_FROM = frozenset(
    {
        *SIZES,
        "attention_bias",
        "attn_logit_softcapping",
        "decoder_sparse_step",
        "final_logit_softcapping",
        "first_k_dense_replace",
        "hidden_act",
        "hidden_activation",
        "kv_lora_rank",
        "layer_types",
        "linear_conv_kernel_dim",
        "linear_key_head_dim",
        "linear_num_key_heads",
        "linear_num_value_heads",
        "linear_value_head_dim",
        # Of hybrids.
        "conv_kernel",
        "layer_norm_epsilon",
        "layers_block_type",
        "mamba_head_dim",
        "mamba_num_heads",
        "mlp_hidden_act",
        "moe_shared_expert_intermediate_size",
        "n_groups",
        "ssm_state_size",
        "max_position_embeddings",
        "max_window_layers",
        "mlp_bias",
        "mlp_layer_types",
        "mlp_only_layers",
        "moe_intermediate_size",
        "moe_k",
        "moe_layer_end_index",
        "moe_layer_interval",
        "moe_layer_start_index",
        "moe_num_experts",
        "moe_num_shared_experts",
        "n_group",
        "n_routed_experts",
        "n_shared_experts",
        "norm_eps",
        "norm_topk_prob",
        "num_experts",
        "num_experts_per_tok",
        "num_local_experts",
        "num_shared_experts",
        "q_lora_rank",
        "qk_nope_head_dim",
        "qk_rope_head_dim",
        "query_pre_attn_scalar",
        "rms_norm_eps",
        "rope_parameters",
        "routed_scaling_factor",
        "router_scaling_factor",
        "shared_expert_intermediate_size",
        "sliding_window",
        "sliding_window_pattern",  # makes layer_types
        "tie_word_embeddings",
        "topk_group",
        "topk_method",
        "use_qk_norm",
        "use_sliding_window",
        "v_head_dim",
    }
)
WITHOUT_EFFECT = frozenset(
    {
        "architectures",
        "attention_dropout",  # named in a notice
        "bos_token_id",
        "chunk_size_feed_forward",
        "dtype",  # policy.precision says it
        "enable_moe_fp32_combine",  # rounds the sum of shared and chosen experts otherwise
        "eos_token_id",
        "id2label",
        "initializer_range",
        "label2id",
        "moe_norm_min",  # of the weights' sum, which is far from it
        "output_hidden_states",
        "pad_token_id",
        "pretraining_tp",
        "problem_type",
        "return_dict",
        "router_aux_loss_coef",  # policy.megatron_cfg.moe_aux_loss_coeff's default
        "router_jitter_noise",  # of transformers' own training
        "transformers_version",
        "use_cache",
        # Of hybrids: how transformers' own model starts, and computes the same.
        "chunk_size",
        "expand",
        "mamba_ssm_cache_dtype",
        "moe_shared_expert_overlap",
        "mtp_layers_block_type",
        "num_logits_to_keep",
        "rescale_prenorm_residual",
        "time_step_floor",
        "time_step_max",
        "time_step_min",
        "use_mamba_kernels",
    }
)
# Field -> the values that are taken, and why no other is.
MUST_BE: dict[str, tuple[tuple[Any, ...], str]] = {
    "use_bidirectional_attention": ((None, False), "attention is causal here"),
    "output_router_logits": (
        (False, None),
        "policy.megatron_cfg.moe_router_load_balancing_type adds an auxiliary loss",
    ),
    "use_bias": ((False, None), "linears of this family have no biases here"),
    "clip_qkv": ((None,), "queries, keys and values are not clipped here"),
    "rope_interleave": ((True, None), "latent attention turns features in pairs here"),
    "moe_latent_size": ((None,), "experts work on the model's features here"),
    "use_conv_bias": ((True, None), "Mamba's convolution has a bias here"),
    "mamba_hidden_act": (("silu", "swish", None), "Mamba layers are computed with silu alone"),
    "time_step_limit": (((0.0, math.inf), [0.0, math.inf], None), "Mamba's step sizes have no limits here"),
    "is_encoder_decoder": ((False, None), "the model is a decoder"),
    # Not of any class; transformers looks for them all the same.
    "is_causal": ((None, True), "attention is causal here"),
    "transformers_weights": ((None,), "weights are read from model.safetensors or its index"),
    QUANTIZATION: ((None,), "of quantized weights only bitsandbytes' 4-bit form is read; give the model in bfloat16"),
    "compression_config": ((None,), "quantized weights are not trained on; give the model in bfloat16 or float32"),
}
# Per family: what its class has and transformers' model does not apply.
NOT_APPLIED = {"gemma3_text": ("attn_logit_softcapping",)}
# Names of older configs, and of fields that transformers looks for without declaring them.
LEGACY = frozenset(
    {
        "attn_implementation",
        "auto_map",
        "experts_implementation",
        "head_dim",
        "model_type",
        "name_or_path",
        "num_labels",
        "num_nextn_predict_layers",  # `inventory.kept_tensors`
        "original_max_position_embeddings",
        "output_attentions",
        "partial_rotary_factor",
        "rope_local_base_freq",
        "rope_scaling",
        "rope_theta",
        "sliding_window_pattern",
        "torch_dtype",
    }
)
# Families whose class in transformers computes attention itself.
OWN_ATTENTION = ("nemotron",)
_LAYER_TYPES = ("full_attention", "sliding_attention")
_LINEAR_TYPES = ("full_attention", "linear_attention")


def check_config(model: HFModel, *, megatron: bool, max_length: int) -> list[str]:
    """Notices for the user. megatron: whether Megatron-Core computes; else transformers does. max_length: tokens of the
    run's longest sequence. Raises UserError that names every field that cannot be honoured, with its value."""
    problems = [*_switches(model), *_sizes(model), *_attention(model), *_activation(model)]
    if not problems and model.shapes.num_experts:
        problems += check_routing(model, megatron=megatron)
    if not problems:
        problems += _linear_attention(model)
    if not megatron and model.family in OWN_ATTENTION:
        problems.append(
            f"model_type={model.family!r}: the attention of transformers' class takes no packed rows; set "
            "policy.megatron_cfg.enabled=true"
        )
    problems += _rope_kinds(model, max_length)
    if not problems:
        problems += _rotary(model, megatron)
    if problems:
        raise UserError(f"{model.config_name} cannot be honoured: {'; '.join(problems)}")
    return list(_notices(model))


def _switches(model: HFModel) -> Iterator[str]:
    config = model.config
    known = {field.name: field for field in dataclasses.fields(config)}
    if model.tower and model.final_softcap is not None:
        yield (
            f"final_logit_softcapping={_shown(model.final_softcap)}: transformers' vision-language class does not "
            "apply it; set it to null"
        )
    for name, (values, reason) in MUST_BE.items():
        value = getattr(config, name, None) if name in known else model.content.get(name)
        if value not in values and not (name == QUANTIZATION and model.stored_four_bit):
            yield f"{name}={_shown(value)}: {reason}"
    for name, field in known.items():
        value = getattr(config, name)
        if name in NOT_APPLIED.get(model.family, ()):
            if value is not None:
                yield f"{name}={_shown(value)}: transformers reads it and does not apply it; set it to null"
        elif name not in BUILT_FROM | WITHOUT_EFFECT | MUST_BE.keys():
            default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
            if value != default:
                yield f"{name}={_shown(value)}: this release does not know the field; the default is {default!r}"


def _sizes(model: HFModel) -> Iterator[str]:
    config = model.config
    for name in SIZES:
        value = getattr(config, name, None)
        if value is not None and (not isinstance(value, int) or value < 1):
            yield f"{name}={_shown(value)}: wanted a positive number"
            return
    shapes = model.shapes
    if shapes.num_attention_heads % shapes.num_query_groups:
        yield (
            f"num_key_value_heads={shapes.num_query_groups} does not divide "
            f"num_attention_heads={shapes.num_attention_heads}"
        )
    if shapes.is_latent and config.num_key_value_heads != shapes.num_attention_heads:
        yield (
            f"num_key_value_heads={config.num_key_value_heads}: latent attention makes keys and values for each of the "
            f"num_attention_heads={shapes.num_attention_heads}"
        )
    if shapes.is_latent and shapes.attention_bias:
        yield "attention_bias=true: Megatron-Core's latent attention has no biases"
    if model.family in PACKED_EXPERTS and not shapes.attention_bias:
        yield "attention_bias=false: Megatron-Core has biases in all linears of this family or in none"
    if model.family == "olmoe" and shapes.num_attention_heads * shapes.head_dim != shapes.hidden_size:
        yield f"head_dim={shapes.head_dim}: the norm of the queries is of hidden_size={shapes.hidden_size} features"
    if shapes.num_experts and not 1 <= shapes.num_experts_per_token <= shapes.num_experts:
        yield f"num_experts_per_tok={shapes.num_experts_per_token} of num_experts={shapes.num_experts}"
    name, rotated = ("qk_rope_head_dim", shapes.rope_head_dim) if shapes.is_latent else ("head_dim", shapes.head_dim)
    if rotated % 2:
        yield f"{name}={rotated}: rotary embeddings need an even one"
    pad = config.pad_token_id
    if isinstance(pad, int) and not -config.vocab_size <= pad < config.vocab_size:
        yield f"pad_token_id={pad} is beyond the embedding of vocab_size={config.vocab_size} rows"
    scalar = getattr(config, "query_pre_attn_scalar", 1)
    if not scalar > 0:
        yield f"query_pre_attn_scalar={_shown(scalar)}: wanted a positive number"
    if not model.norm_eps >= 0:
        yield f"{model.norm_eps_field}={_shown(model.norm_eps)}: wanted 0 or more"
    if model.final_softcap is not None and not model.final_softcap > 0:
        yield f"final_logit_softcapping={_shown(model.final_softcap)}: wanted a positive number or null"
    if model.attention_softcap is not None and not model.attention_softcap > 0:
        yield f"attn_logit_softcapping={_shown(model.attention_softcap)}: wanted a positive number or null"


def _attention(model: HFModel) -> Iterator[str]:
    kinds = getattr(model.config, "layer_types", None)
    if "layer_types" not in {field.name for field in dataclasses.fields(model.config)}:
        kinds = None  # not read
    if model.family == "mistral" and "layer_types" in model.content:
        yield (
            f"layer_types={_shown(model.content['layer_types'])}: with it transformers takes a Mistral for a Ministral "
            "model, whose layers see different windows and which is not supported; leave it out if all are alike"
        )
    window = getattr(model.config, "sliding_window", None)
    if kinds is not None:
        known = _LINEAR_TYPES if model.family in GATED_ATTENTION else _LAYER_TYPES
        unknown = sorted({str(kind) for kind in kinds} - set(known))
        if unknown:
            yield f"layer_types has {', '.join(unknown)}; wanted {' or '.join(known)}"
            return
        if len(kinds) != model.config.num_hidden_layers:
            yield f"layer_types has {len(kinds)} entries for num_hidden_layers={model.config.num_hidden_layers}"
            return
        if "sliding_attention" in kinds and window is None:
            yield "layer_types names sliding_attention, but sliding_window is off (sliding_window, use_sliding_window)"
    if any(size is not None and size < 1 for size in model.windows):
        yield f"sliding_window={window}: wanted a positive number or null"


def _linear_attention(model: HFModel) -> Iterator[str]:
    shapes, hybrid = model.shapes, bool(model.shapes.mixers)
    if hybrid and set(shapes.mixers) - set(HYBRID):
        yield f"layers_block_type has {', '.join(set(shapes.mixers) - set(HYBRID))}; wanted {' or '.join(HYBRID)}"
        return
    if hybrid and "attention" not in shapes.mixers:
        yield "layers_block_type has no attention; wanted it in one layer or more"
    if hybrid and (shapes.attention_bias or shapes.mlp_bias):
        yield "attention_bias or mlp_bias is true: linears of this family have no biases here"
    if not shapes.linear_layers:
        return
    if len(shapes.linear_layers) == shapes.num_layers:
        yield "layer_types has no full_attention; wanted it in one layer or more"
    if shapes.linear_value_heads % shapes.linear_key_heads:
        names = ("n_groups", "mamba_num_heads") if hybrid else ("linear_num_key_heads", "linear_num_value_heads")
        yield f"{names[0]}={shapes.linear_key_heads} does not divide {names[1]}={shapes.linear_value_heads}"
    if not shapes.mixers and model.activation_name not in ("silu", "swish"):
        yield f"hidden_act={_shown(model.activation_name)}: linear attention is computed with silu alone"


def _activation(model: HFModel) -> Iterator[str]:
    name = model.activation_name
    field = model.activation_field
    try:
        function = activation(name)
    except KeyError:
        yield f"{field}={_shown(name)}: transformers knows no such activation"
        return
    if isinstance(function, torch.nn.Module) and any(True for _ in function.parameters()):
        yield f"{field}={_shown(name)}: an activation with parameters of its own is not supported"


def _rope_kinds(model: HFModel, max_length: int) -> Iterator[str]:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = model.config
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = parameters and all(isinstance(value, dict) for value in parameters.values())
    for rope in parameters.values() if nested else [parameters]:
        kind = rope.get("rope_type", "default")
        if kind != "default" and kind not in ROPE_INIT_FUNCTIONS:
            yield f"rope_parameters: rope_type={_shown(kind)} is not one that transformers computes"
        # These two depend on the length of what is in the batch: beyond the limit packed rows would change each other.
        limit = {
            "dynamic": config.max_position_embeddings,
            "longrope": rope.get("original_max_position_embeddings", config.max_position_embeddings),
        }.get(kind)
        if limit is not None and max_length > limit:
            yield (
                f"rope_parameters: rope_type={kind!r} depends on the batch beyond {limit} tokens; set "
                f"policy.max_total_sequence_length={max_length} to {limit} or less"
            )


def _rotary(model: HFModel, megatron: bool) -> Iterator[str]:
    half = (model.shapes.rope_head_dim or model.shapes.head_dim) // 2
    for frequencies, _ in model.rotary.values():
        if frequencies.numel() != half and model.family not in PARTIAL_ROTARY:
            yield (
                f"rope_parameters: rotary embeddings of {2 * frequencies.numel()} of {2 * half} features "
                "(partial_rotary_factor) are not supported for this family"
            )
        elif not bool(torch.isfinite(frequencies).all()):
            yield f"rope_parameters={_shown(model.config.rope_parameters)} gives frequencies that are not finite"
        named = model.content.get("rotary_dim")
        if model.family == "minimax_m2" and named not in (None, 2 * frequencies.numel()):
            yield (
                f"rotary_dim={_shown(named)}: transformers does not read it and rotates {2 * frequencies.numel()} of "
                f"{2 * half} features; set partial_rotary_factor, in config.json or with policy.hf_config_overrides"
            )
    factors = {kind: factor for kind, (_, factor) in model.rotary.items()}
    if not all(math.isfinite(factor) for factor in factors.values()):
        yield f"rope_parameters={_shown(model.config.rope_parameters)} gives an attention factor that is not finite"
    elif megatron and len(set(factors.values())) > 1:
        shown = ", ".join(f"{kind}: {factor:.4g}" for kind, factor in sorted(factors.items()))
        yield (
            f"rope_parameters: layer types with different attention factors ({shown}) are not supported by the "
            "Megatron backend; set policy.megatron_cfg.enabled=false"
        )


def _notices(model: HFModel) -> Iterator[str]:
    config = model.config
    if model.overrides:
        yield from _override_notices(model)
    dropout = getattr(config, "attention_dropout", 0.0)
    if dropout:
        yield f"config.json: attention_dropout={dropout} is not applied; the base trains without dropout"
    for name in ("bos_token_id", "eos_token_id"):
        value = getattr(config, name)
        ids = value if isinstance(value, list) else [value]
        beyond = [number for number in ids if isinstance(number, int) and not 0 <= number < config.vocab_size]
        if beyond:
            yield f"config.json: {name}={_shown(value)} is beyond the embedding (vocab_size={config.vocab_size})"
    unknown = [f"{name}={_shown(value)}" for name, value in sorted(_unknown_fields(model).items())]
    if unknown:
        yield (
            f"config.json has fields that {type(config).__name__} does not have; transformers ignores them, and so "
            f"does this run: {', '.join(unknown)}"
        )


def _override_notices(model: HFModel) -> Iterator[str]:
    unused = [name for name in model.overrides if name in WITHOUT_EFFECT]
    if unused:
        yield f"policy.hf_config_overrides: {', '.join(unused)} without effect on training"
    used = {name: value for name, value in model.overrides.items() if name not in unused}
    if used:
        yield (
            f"the base's config.json is read with {_shown(used)} (policy.hf_config_overrides): a merged export has it, "
            "and whoever loads hf_adapter/ sets it on the base"
        )


def _unknown_fields(model: HFModel) -> dict[str, Any]:
    from transformers import GenerationConfig

    known = {field.name for field in dataclasses.fields(model.config)}
    known |= LEGACY | MUST_BE.keys() | GenerationConfig().to_dict().keys()
    return {
        name: value
        for name, value in model.content.items()
        if name not in known and not name.startswith("_") and value not in (None, False, 0, "", [], {})
    }


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
