"""Every field of a family's transformers config, at plausible values that are not its default."""

import dataclasses
from collections.abc import Iterator
from typing import Any

from transformers import CONFIG_MAPPING

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text")
# Beside those whose every flip is run.
GATED_FAMILIES = (*FAMILIES, "qwen3_moe", "gemma", "gemma2", "olmoe", "glm4_moe", "deepseek_v3", "gpt_oss")
# Of these the fields and names alone are looked at.
RARE_FAMILIES = ("exaone4", "exaone_moe", "ernie4_5_moe", "hy_v3", "minimax_m2")
SIZES: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}
DELTA: dict[str, Any] = {
    "head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 6,
    "linear_value_head_dim": 4,
}
BASE: dict[str, dict[str, Any]] = {
    "nemotron": {"head_dim": 8},
    "nemotron_h": {
        "layers_block_type": ["mamba", "attention", "mlp", "moe"],
        "head_dim": 8,
        "ssm_state_size": 3,
        "mamba_num_heads": 4,
        "mamba_head_dim": 6,
        "n_groups": 2,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "moe_shared_expert_intermediate_size": 20,
    },
    "qwen3_5_text": DELTA,
    "qwen3_next": DELTA
    | {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 24,
    },
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "qwen3_moe": {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "glm4_moe": {"head_dim": 8, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    "deepseek_v3": {
        "num_key_value_heads": 4,
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_nope_head_dim": 4,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
        "n_routed_experts": 8,
        "n_group": 4,
        "topk_group": 2,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 24,
        "first_k_dense_replace": 1,
    },
    "exaone4": {"head_dim": 8, "sliding_window": 8, "sliding_window_pattern": 2},
    "exaone_moe": {
        "head_dim": 8,
        "sliding_window": 8,
        "sliding_window_pattern": 2,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
    },
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 24},
    "hy_v3": {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    "minimax_m2": {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
    "gpt_oss": {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8},
    "gemma": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 8},
    "gemma3_text": {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 8, "num_hidden_layers": 6},
}
# In the rows of the tests every token sees more than a window.
WINDOWED = {"use_sliding_window": True, "sliding_window": 6}
ROPES: list[dict[str, Any]] = [
    {"rope_type": "default", "rope_theta": 500.0},
    {"rope_type": "linear", "factor": 4.0, "rope_theta": 1000.0},
    {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1000.0},
    {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1000.0, "original_max_position_embeddings": 16},
    {
        "rope_type": "llama3",
        "factor": 4.0,
        "rope_theta": 1000.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    {
        "rope_type": "longrope",
        "rope_theta": 1000.0,
        "short_factor": [1.0, 1.5, 2.0, 3.0],
        "long_factor": [2.0, 3.0, 4.0, 6.0],
        "original_max_position_embeddings": 64,
        "factor": 2.0,
    },
    {"rope_type": "default", "rope_theta": 1000.0, "partial_rotary_factor": 0.5},
    {"rope_type": "linear", "factor": 2.0, "rope_theta": 1000.0, "partial_rotary_factor": 0.5},
]
VALUES: dict[str, list[Any]] = {
    "hidden_size": [48],
    "intermediate_size": [40],
    "num_hidden_layers": [3],
    "num_attention_heads": [2, 3],
    "num_key_value_heads": [1, 4, 3],
    "head_dim": [16, 7],
    "hidden_act": ["gelu", "relu", "gelu_pytorch_tanh", "quick_gelu", "relu2", "no_such_activation"],
    "hidden_activation": ["gelu", "silu", "relu"],
    "pad_token_id": [5, 500, -1],
    "eos_token_id": [[1, 3], 500],
    "bos_token_id": [500],
    "query_pre_attn_scalar": [32],
    "final_logit_softcapping": [2.0],
    "attn_logit_softcapping": [2.0],
    "attention_dropout": [0.25],
    "initializer_range": [0.5],
    "rms_norm_eps": [0.05],
    "max_position_embeddings": [64],
    "dtype": ["bfloat16"],
    "id2label": [{"0": "a", "1": "b", "2": "c"}],
    "label2id": [{"a": 0, "b": 1}],
    "problem_type": ["regression"],
    "architectures": [["LlamaModel"], None],
    "transformers_version": ["4.0.0"],
    "sliding_window": [6, None],
    "chunk_size_feed_forward": [4],
    "max_window_layers": [1],
    "clip_qkv": [8.0],
}
# Fields that no class of these families declares: older names, other families' fields, what transformers looks for.
EXTRAS: list[dict[str, Any]] = [
    {"is_causal": False},
    {"head_dim": 16},
    {"attention_bias": True},
    {"mlp_bias": True},
    {"final_logit_softcapping": 2.0},
    {"sliding_window": 6},
    {"logit_scale": 0.5},
    {"embedding_multiplier": 3.0},
    {"layer_types": ["sliding_attention", "full_attention"]},
    {"rope_theta": 700.0},
    {"rope_scaling": {"type": "linear", "factor": 3.0}, "rope_theta": 700.0},
    {"partial_rotary_factor": 0.5},
    {"original_max_position_embeddings": 32},
    {"torch_dtype": "bfloat16"},
    {"num_labels": 5},
    {"output_attentions": True},
    {"temperature": 0.5},
    {"qk_norm": True},
    {"quantization_config": {"quant_method": "awq", "bits": 4}},
    {"auto_map": {"AutoConfig": "configuration_x.X", "AutoModelForCausalLM": "modeling_x.X"}},
]

# What is refused of all flips, and by which word; the others are taken. Of one family: under its own name.
REFUSED = {
    "num_attention_heads-1": "num_attention_heads=3",
    "num_key_value_heads-2": "num_key_value_heads=3",
    "head_dim-1": "head_dim=7",
    "hidden_act-5": "hidden_act='no_such_activation'",
    "pad_token_id-1": "pad_token_id=500",
    "layer_types-3": "sliding_window is off",
    "layer_types-4": "chunked_attention",
    "is_encoder_decoder-0": "is_encoder_decoder=True",
    "use_bidirectional_attention-0": "use_bidirectional_attention=True",
    "attn_logit_softcapping-0": "attn_logit_softcapping=2.0",
    "rope_parameters-7": "partial_rotary_factor",
    "extra-is_causal": "is_causal=False",
    "extra-quantization_config": "awq",
    "mistral-extra-layer_types": "takes a Mistral for a Ministral model",
    "gemma2-sliding_window-1": "sliding_window is off",
    "gemma3_text-sliding_window-1": "sliding_window is off",
    "qwen3_moe-mlp_only_layers-0": "mlp_only_layers",
    "qwen3_moe-decoder_sparse_step-0": "decoder_sparse_step",
    "qwen3_moe-num_experts_per_tok-0": "num_experts_per_tok=9 of num_experts=4",
    "qwen3_moe-output_router_logits-0": "output_router_logits=True",
    "olmoe-clip_qkv-0": "clip_qkv=8.0",
    "olmoe-num_experts_per_tok-0": "num_experts_per_tok=9 of num_experts=4",
    "olmoe-output_router_logits-0": "output_router_logits=True",
    "olmoe-extra-head_dim": "head_dim=16",
    "glm4_moe-rope_parameters-5": "cannot build",
    "glm4_moe-num_experts_per_tok-0": "num_experts_per_tok=9 of num_experts=4",
    "glm4_moe-topk_group-0": "topk_group=2 of n_group=1",
    "deepseek_v3-num_attention_heads-0": "num_key_value_heads=4",
    "deepseek_v3-num_key_value_heads-0": "num_key_value_heads=1",
    "deepseek_v3-n_routed_experts-0": "n_group=4 does not divide the 257 experts",
    "deepseek_v3-qk_rope_head_dim-0": "qk_rope_head_dim=65",
    "deepseek_v3-n_group-0": "n_group=9 does not divide the 8 experts",
    "deepseek_v3-topk_group-0": "topk_group=5 of n_group=4",
    "deepseek_v3-num_experts_per_tok-0": "num_experts_per_tok=9 of num_experts=8",
    "deepseek_v3-rope_interleave-0": "rope_interleave=False",
    "deepseek_v3-attention_bias-0": "attention_bias=true",
    "gpt_oss-num_experts_per_tok-0": "num_experts_per_tok=5 of num_experts=4",
    "gpt_oss-output_router_logits-0": "output_router_logits=True",
    "gpt_oss-attention_bias-0": "attention_bias=false",
    "gpt_oss-extra-partial_rotary_factor": "partial_rotary_factor",
    "gpt_oss-sliding_window-1": "sliding_window is off",
    "deepseek_v3-extra-head_dim": "rotary embeddings of 16 of 8 features",
}
# Refused in other families, applied in these.
TAKEN = {"gemma2-attn_logit_softcapping-0", "glm4_moe-rope_parameters-7"}
REFUSED_BY_MEGATRON = {
    "glm4_moe-norm_topk_prob-0": "norm_topk_prob=false",
    "deepseek_v3-norm_topk_prob-0": "norm_topk_prob=false",
    "gemma3_text-rope_parameters-3": "attention factor",
    "gemma3_text-rope_parameters-5": "attention factor",
}


def refused_word(flip: str, *, megatron: bool) -> str | None:
    """What the refusal of `<family>-<what is changed>` says; None where it is taken."""
    if flip in TAKEN:
        return None
    known = REFUSED | (REFUSED_BY_MEGATRON if megatron else {})
    return known.get(flip) or known.get(flip.partition("-")[2])


def flips(family: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(what is changed, the fields to set over `SIZES` and `BASE`), for every field of the family's class."""
    declared = {field.name: field for field in dataclasses.fields(CONFIG_MAPPING[family])}
    for name, field in declared.items():
        for number, changes in enumerate(_changes(family, name, field, declared)):
            yield f"{name}-{number}", changes
    for extra in EXTRAS:
        if not extra.keys() & declared.keys():
            yield "extra-" + "-".join(extra), extra


def _changes(family: str, name: str, field: Any, declared: dict[str, Any]) -> list[dict[str, Any]]:
    windowed = WINDOWED if "use_sliding_window" in declared else {}
    if name == "rope_parameters":
        return [{name: _rope(family, rope)} for rope in ROPES]
    if name == "layer_types":
        layers = BASE[family].get("num_hidden_layers", SIZES["num_hidden_layers"])
        mixed = [["sliding_attention", "full_attention"][index % 2] for index in range(layers)]
        return [
            windowed | {name: mixed},
            windowed | {name: ["sliding_attention"] * layers},
            {name: ["full_attention"] * layers},
            {name: mixed} | ({"sliding_window": None} if not windowed else {}),
            {name: ["chunked_attention"] * layers},
        ]
    if name in ("use_sliding_window", "max_window_layers"):
        return [WINDOWED | {"max_window_layers": number} for number in (0, 1)]
    if name in VALUES:
        return [{name: value} for value in VALUES[name]]
    if isinstance(field.default, bool) or field.default is None:
        return [{name: not field.default}]
    return [{name: field.default * 2 if isinstance(field.default, float) else field.default + 1}]


def _rope(family: str, rope: dict[str, Any]) -> dict[str, Any]:
    if family != "gemma3_text":
        return rope
    return {"full_attention": rope, "sliding_attention": {"rope_type": "default", "rope_theta": 100.0}}


def config_content(family: str, changes: dict[str, Any]) -> dict[str, Any]:
    """config.json's content."""
    return {"model_type": family} | SIZES | BASE[family] | changes
