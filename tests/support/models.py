"""Small random models of each supported family, as Hugging Face folders."""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    DeepseekV2Config,
    DeepseekV3Config,
    Ernie4_5_MoeConfig,
    Exaone4Config,
    ExaoneMoeConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    Glm4MoeConfig,
    Glm4MoeLiteConfig,
    GptOssConfig,
    HYV3Config,
    LlamaConfig,
    MiniMaxM2Config,
    MistralConfig,
    NemotronConfig,
    NemotronHConfig,
    OlmoeConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3_5MoeTextConfig,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3NextConfig,
)

from tools.small_sizes import LINEAR_ATTENTION as DELTA
from tools.small_sizes import MAMBA
from tools.towers import tower_config

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    # Not divisible by TP=2, so that vocabulary padding is exercised.
    "vocab_size": 101,
    "max_position_embeddings": 256,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def family_config(family: str, **changes: object) -> PretrainedConfig:
    """The configuration of a small model of one family."""
    sizes = SIZES | changes
    if family == "llama2":
        return LlamaConfig(**sizes | {"num_key_value_heads": 4}, tie_word_embeddings=False)
    if family == "llama3":
        return LlamaConfig(**sizes, head_dim=32, rope_parameters=dict(LLAMA3_ROPE), tie_word_embeddings=False)
    if family == "qwen2":
        return Qwen2Config(**sizes, tie_word_embeddings=True)
    if family == "qwen3":
        return Qwen3Config(**sizes, head_dim=32, tie_word_embeddings=False)
    if family == "qwen3_moe":
        experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "norm_topk_prob": True}
        return Qwen3MoeConfig(**SIZES | {"head_dim": 32, "tie_word_embeddings": False} | experts | changes)
    if family in EXPERTS | RARE:
        kind, own = (EXPERTS | RARE)[family]
        return kind(**sizes | own | changes)
    if family == "mistral":
        return MistralConfig(**{"sliding_window": None} | sizes, head_dim=32)
    if family == "gemma":
        return GemmaConfig(**sizes, head_dim=32)
    if family == "gemma2":
        caps = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}
        return Gemma2Config(**sizes, head_dim=32, sliding_window=8, query_pre_attn_scalar=24, **caps)
    if family == "gemma3":
        return Gemma3TextConfig(
            **sizes, head_dim=32, sliding_window=8, query_pre_attn_scalar=32, layer_types=gemma_layers(sizes)
        )
    if family == "nemotron":
        return NemotronConfig(**sizes, head_dim=32)
    if family == "nemotron_h":
        kinds = ["mamba", "attention", "mlp", "mamba", "moe", "attention"]
        own = NEMOTRON_H | {"layers_block_type": kinds}
        values: dict[str, Any] = {name: value for name, value in sizes.items() if name != "num_hidden_layers"}
        return NemotronHConfig(**values | own | changes)
    if family in LINEAR:
        kind, own = LINEAR[family]
        mixture = family == "qwen3_5_moe"  # has experts in every layer
        values: dict[str, Any] = {name: v for name, v in sizes.items() if not (mixture and name == "intermediate_size")}
        return kind(**values | own | changes)
    if family.endswith("_tower"):
        seeing = family.removesuffix("_tower")
        return tower_config(seeing, sizes | TOWERS.get(seeing, {}), tied=seeing == "gemma3")
    if family in UNUSUAL:
        kind, changes = UNUSUAL[family]
        return kind(**sizes | changes)
    raise KeyError(family)


def gemma_layers(sizes: dict) -> list[str]:
    """Gemma 3's pattern: every sixth layer sees the whole sequence."""
    return [
        "full_attention" if (index + 1) % 6 == 0 else "sliding_attention" for index in range(sizes["num_hidden_layers"])
    ]


# Latent attention: yarn with a factor on scores and another on the rotated features, groups of experts.
DEEPSEEK_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 40.0,
    "mscale": 1.0,
    "mscale_all_dim": 0.8,
    "original_max_position_embeddings": 16,
}
LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 24,
    "qk_rope_head_dim": 16,
    "v_head_dim": 40,
    "moe_intermediate_size": 48,
    "n_routed_experts": 8,
}
EXPERTS: dict[str, tuple[type[PretrainedConfig], dict[str, Any]]] = {
    "olmoe": (OlmoeConfig, {"num_experts": 4, "num_experts_per_tok": 2}),
    "gpt_oss": (
        GptOssConfig,
        {
            "head_dim": 32,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 6,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1000.0,
                "factor": 4.0,
                "truncate": False,
                "original_max_position_embeddings": 16,
            },
        },
    ),
    # Whole blocks of 64 values in every row, at ETP=2 too.
    "qwen3_moe_even": (
        Qwen3MoeConfig,
        {
            "head_dim": 32,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 128,
            "norm_topk_prob": True,
            "tie_word_embeddings": False,
        },
    ),
    "glm4_moe": (
        Glm4MoeConfig,
        {
            "head_dim": 32,
            "attention_bias": True,
            "use_qk_norm": True,
            "moe_intermediate_size": 48,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "routed_scaling_factor": 2.5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        },
    ),
    "deepseek_v3": (
        DeepseekV3Config,
        LATENT
        | {
            "q_lora_rank": 20,
            "n_group": 4,
            "topk_group": 2,
            "num_experts_per_tok": 4,
            "first_k_dense_replace": 1,
            "rope_parameters": DEEPSEEK_YARN,
        },
    ),
    "deepseek_v2": (
        DeepseekV2Config,
        LATENT | {"q_lora_rank": None, "num_experts_per_tok": 2, "first_k_dense_replace": 1, "n_shared_experts": 1},
    ),
    "glm4_moe_lite": (
        Glm4MoeLiteConfig,
        LATENT | {"q_lora_rank": 20, "num_experts_per_tok": 2, "rms_norm_eps": 1e-3, "n_shared_experts": 1},
    ),
}
# Families of which every layout but one is a long test.
RARE: dict[str, tuple[type[PretrainedConfig], dict[str, Any]]] = {
    "exaone4": (Exaone4Config, {"head_dim": 32, "sliding_window": 6, "sliding_window_pattern": 2}),
    "exaone_moe": (
        ExaoneMoeConfig,
        {
            "head_dim": 32,
            "sliding_window": 6,
            "sliding_window_pattern": 2,
            "num_experts": 8,
            "num_experts_per_tok": 4,
            "n_group": 4,
            "topk_group": 2,
            "num_shared_experts": 2,
            "moe_intermediate_size": 48,
        },
    ),
    "ernie4_5_moe": (
        Ernie4_5_MoeConfig,
        {
            "head_dim": 32,
            "moe_num_experts": 4,
            "moe_k": 2,
            "moe_intermediate_size": 48,
            "moe_layer_interval": 2,
            "tie_word_embeddings": False,
        },
    ),
    "hy_v3": (
        HYV3Config,
        {
            "head_dim": 32,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "num_shared_experts": 2,
            "moe_intermediate_size": 48,
        },
    ),
    "minimax_m2": (
        MiniMaxM2Config,
        {
            "head_dim": 32,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        },
    ),
}

EXPERTS["gpt_oss_even"] = (GptOssConfig, EXPERTS["gpt_oss"][1] | {"intermediate_size": 128})

SHARED_EXPERT: dict[str, Any] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "shared_expert_intermediate_size": 56,
}
LINEAR: dict[str, tuple[type[PretrainedConfig], dict[str, Any]]] = {
    "qwen3_5": (Qwen3_5TextConfig, DELTA),
    # Whole blocks of 64 values in every row.
    "qwen3_5_even": (
        Qwen3_5TextConfig,
        DELTA | {"intermediate_size": 128, "linear_num_value_heads": 4, "linear_value_head_dim": 32},
    ),
    "qwen3_next": (Qwen3NextConfig, DELTA | SHARED_EXPERT),
    "qwen3_5_moe": (Qwen3_5MoeTextConfig, DELTA | SHARED_EXPERT),
}

# An MLP has no gate.
NEMOTRON_H: dict[str, Any] = MAMBA | {
    "use_mamba_kernels": False,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "routed_scaling_factor": 1.5,
}
TOWERS: dict[str, dict[str, Any]] = {
    "gemma3": {"head_dim": 32, "sliding_window": 8, "query_pre_attn_scalar": 32},
    "qwen3_5": DELTA,
    "qwen3_5_moe": DELTA | SHARED_EXPERT,
}

FAMILIES = ("llama2", "llama3", "qwen2", "qwen3", "mistral", "gemma3")
YARN = {"rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0, "original_max_position_embeddings": 16}
# What configs may ask for beyond the published models of a family, several things in one.
UNUSUAL: dict[str, tuple[type[PretrainedConfig], dict[str, Any]]] = {
    "llama_biases": (
        LlamaConfig,
        {
            "attention_bias": True,
            "mlp_bias": True,
            "hidden_act": "gelu",
            "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1000.0},
        },
    ),
    "qwen2_windows": (
        Qwen2Config,
        {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2, "rms_norm_eps": 0.01},
    ),
    "qwen3_yarn": (
        Qwen3Config,
        {
            "head_dim": 16,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 6,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "rope_parameters": YARN,
        },
    ),
    # Whole blocks of 64 values in every row, at TP=2 too.
    "qwen3_even": (Qwen3Config, {"head_dim": 32, "intermediate_size": 128, "tie_word_embeddings": False}),
    "mistral_window": (MistralConfig, {"sliding_window": 6, "hidden_act": "relu", "tie_word_embeddings": True}),
    "gemma3_softcap": (
        Gemma3TextConfig,
        {
            "head_dim": 16,
            "query_pre_attn_scalar": 8,
            "sliding_window": 6,
            "layer_types": ["full_attention", "sliding_attention"] * 2,
            "final_logit_softcapping": 3.0,
            "attention_bias": True,
            "hidden_activation": "gelu",
            "tie_word_embeddings": False,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            },
        },
    ),
}


def save_model(folder: Path, family: str, seed: int = 0, **changes: object) -> Path:
    random_model(family_config(family, **changes), seed).save_pretrained(folder)
    return folder


def random_model(config: PretrainedConfig, seed: int = 0) -> PreTrainedModel:
    """In fp32, norms and biases away from their defaults so that losing one shows."""
    torch.manual_seed(seed)
    auto: Any = AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM
    model = auto.from_config(config).float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            else:
                parameter.copy_(torch.randn_like(parameter) * parameter.shape[-1] ** -0.5)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(std=0.1)
        for name, parameter in model.named_parameters():
            if name.endswith("A_log"):
                # States that last some tokens. With transformers' own start they are gone after one, and sums of decays
                # over a row lose digits: its fp32 gradients were 4e-5 to 6e-5 away from its fp64 ones.
                parameter.uniform_(-3.0, -1.0)
            elif name.endswith("mixer.dt_bias"):
                # Steps above transformers' smallest on a CPU, which its kernels and others do not have.
                parameter.uniform_(-1.0, 1.0)
    return model
