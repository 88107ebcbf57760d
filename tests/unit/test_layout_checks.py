"""Layouts against a model's shapes and the number of ranks."""

from pathlib import Path
from typing import Any

import pytest

from megatron_lora.config import load_recipe
from megatron_lora.config.schema_policy import PolicyConfig
from megatron_lora.errors import UserError
from megatron_lora.lora.describe import describe
from megatron_lora.lora.model_spec import ModelSizes, ModelSpec
from megatron_lora.policy.adapter_start import starting_adapter
from megatron_lora.policy.layout_checks import check_layout, check_recomputed, sequence_multiple

ROOT = Path(__file__).resolve().parents[2]
LLAMA_8B = describe(ModelSizes("llama", 4096, 14336, 32, 32, 8, 128, 128256, False))
LLAMA_1B = describe(ModelSizes("llama", 2048, 8192, 16, 32, 8, 64, 128256, True))
LLAMA_70B = describe(ModelSizes("llama", 8192, 28672, 80, 64, 8, 128, 128256, False))
MIXTURE = describe(
    ModelSizes("mixtral", 4096, 14336, 32, 32, 8, 128, 32000, False, num_experts=8, moe_ffn_hidden_size=14336)
)
QWEN3_30B = describe(
    ModelSizes(
        "qwen3_moe", 2048, 6144, 48, 32, 4, 128, 151936, False,
        num_experts=128, num_experts_per_token=8, moe_ffn_hidden_size=768,
    )
)  # fmt: skip
GPT_OSS_20B = describe(
    ModelSizes(
        "gpt_oss", 2880, 2880, 24, 64, 8, 64, 201088, False,
        attention_bias=True, num_experts=32, num_experts_per_token=4, moe_ffn_hidden_size=2880,
    )
)  # fmt: skip
DEEPSEEK_V3 = describe(
    ModelSizes(
        "deepseek_v3", 7168, 18432, 61, 128, 128, 192, 129280, False,
        num_experts=256, num_experts_per_token=8, moe_ffn_hidden_size=2048, dense_layers=(0, 1, 2),
        shared_ffn_hidden_size=2048, q_rank=1536, kv_rank=512, rope_head_dim=64, value_head_dim=128,
    )
)  # fmt: skip

TP, PP, VPP, CP, EP = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
    "context_parallel_size",
    "expert_model_parallel_size",
)
SELECTIVE = {"activation_checkpointing": True, "recompute_granularity": "selective"}
FIRST, LAST = "num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage"


def policy(max_length: int = 4096, **megatron: Any) -> PolicyConfig:
    return PolicyConfig.model_validate(
        {
            "model_name": "m",
            "max_total_sequence_length": max_length,
            "megatron_cfg": {"enabled": True, "peft": {"enabled": True}, **megatron},
        }
    )


def refusal(configured: PolicyConfig, shape: ModelSpec, world_size: int) -> str:
    with pytest.raises(UserError) as error:
        check_layout(configured, shape, world_size)
    return str(error.value)


@pytest.mark.parametrize(
    ("megatron", "shape", "world_size"),
    [
        ({}, LLAMA_8B, 1),
        ({}, LLAMA_8B, 3),
        ({TP: 8}, LLAMA_8B, 8),
        ({TP: 2, "sequence_parallel": True, PP: 2, VPP: 4, CP: 2}, LLAMA_8B, 16),
        ({PP: 4, FIRST: 7, LAST: 5}, LLAMA_8B, 4),
        ({PP: 2, FIRST: 20, LAST: 12}, LLAMA_8B, 2),
        ({PP: 3, FIRST: 8, VPP: 4}, LLAMA_8B, 3),
        ({TP: 8, PP: 4, VPP: 5, "sequence_parallel": True}, LLAMA_70B, 64),
        ({TP: 2, "sequence_parallel": True, EP: 4}, MIXTURE, 8),
        ({TP: 2, "sequence_parallel": True, "peft": {"enabled": True, "a2a_experimental": True}}, LLAMA_8B, 2),
        ({"peft": {"enabled": True, "target_modules": ["output_layer"]}}, LLAMA_8B, 1),
    ],
)
def test_layouts_that_fit(megatron: dict[str, Any], shape: ModelSpec, world_size: int):
    check_layout(policy(**megatron), shape, world_size)


@pytest.mark.parametrize(
    ("megatron", "shape", "world_size", "wanted"),
    [
        (
            {TP: 3},
            LLAMA_8B,
            3,
            "policy.megatron_cfg.tensor_model_parallel_size=3 does not divide the model's 32 attention heads; "
            "use 1, 2, 4 or 8",
        ),
        ({TP: 16}, LLAMA_8B, 16, "tensor_model_parallel_size=16 does not divide the model's 8 query groups; use 1, 2"),
        ({TP: 2, PP: 2}, LLAMA_8B, 6, "= 4 does not divide the 6 ranks; start a multiple of 4"),
        ({CP: 2}, LLAMA_8B, 3, "context_parallel_size=2 = 2 does not divide the 3 ranks"),
        ({PP: 17}, LLAMA_1B, 17, "pipeline_model_parallel_size=17 is above the model's 16 layers; use at most 16"),
        ({PP: 3}, LLAMA_1B, 3, "=3 does not divide the model's 16 layers; use 1, 2, 4, 8 or 16, or set num_layers_in"),
        ({PP: 3, FIRST: 3}, LLAMA_1B, 3, "leaves 13 of the model's 16 layers for 2 stages"),
        ({PP: 2, FIRST: 3, LAST: 3}, LLAMA_1B, 2, "leaves 10 of the model's 16 layers for 0 stages"),
        ({PP: 2, FIRST: 16}, LLAMA_1B, 2, "leaves 0 of the model's 16 layers for 1 stages"),
        ({FIRST: 3}, LLAMA_1B, 1, "need pipeline_model_parallel_size above 1"),
        ({VPP: 2}, LLAMA_1B, 1, "virtual_pipeline_model_parallel_size=2 needs pipeline_model_parallel_size above 1"),
        ({PP: 2, VPP: 3}, LLAMA_1B, 2, "=3 does not divide the 8 layers of a pipeline stage; use 1, 2, 4 or 8"),
        (
            {PP: 2, VPP: 4, FIRST: 6},
            LLAMA_1B,
            2,
            "=4 does not divide the 6 and 10 layers of a pipeline stage; use 1 or 2",
        ),
        ({EP: 2}, LLAMA_1B, 2, "expert_model_parallel_size=2, but the model (llama) has no experts; use 1"),
        ({EP: 3}, MIXTURE, 3, "=3 does not divide the 8 experts of the model; use 1, 2, 4 or 8"),
        ({TP: 2}, MIXTURE, 2, "needs policy.megatron_cfg.sequence_parallel=true: each token is routed once"),
        ({"peft": {"enabled": False}}, MIXTURE, 1, "has experts, which are not trained in full"),
        ({"expert_tensor_parallel_size": 3}, MIXTURE, 3, "=3 does not divide the 14336 features of an expert"),
        ({"expert_tensor_parallel_size": 2}, GPT_OSS_20B, 2, "the experts of a gpt_oss model have biases"),
        ({EP: 12}, GPT_OSS_20B, 12, "=12 does not divide the 32 experts of the model; use 1, 2, 4, 8, 16 or 32"),
        ({TP: 2}, QWEN3_30B, 2, "needs policy.megatron_cfg.sequence_parallel=true"),
        ({TP: 3, "sequence_parallel": True}, DEEPSEEK_V3, 3, "=3 does not divide the model's 128 attention heads"),
        ({EP: 8, PP: 8}, DEEPSEEK_V3, 64, "or set num_layers_in_first_pipeline_stage"),
        ({EP: 8}, MIXTURE, 4, "expert_model_parallel_size=8 x expert_tensor_parallel_size=1"),
        (
            {EP: 8},
            MIXTURE,
            4,
            "does not divide the 4 ranks; start a multiple of 8, or use expert_model_parallel_size=1, 2",
        ),
        ({EP: 2, PP: 4}, MIXTURE, 2, "does not divide the 2 ranks; start a multiple of 8, or lower one of the sizes"),
        (
            {TP: 2, "peft": {"enabled": True, "a2a_experimental": True}},
            LLAMA_8B,
            2,
            "a2a_experimental=true needs sequence_parallel=true",
        ),
        (
            {"peft": {"enabled": True, "target_modules": ["linear_qkv", "output_layer"]}},
            LLAMA_1B,
            1,
            "names output_layer, but the model ties it",
        ),
        ({**SELECTIVE, "recompute_modules": ["mlp", "moe"]}, LLAMA_8B, 1, "use some of core_attn, layernorm, mlp"),
        ({**SELECTIVE, "recompute_modules": ["mla_up_proj"]}, MIXTURE, 1, "'mla_up_proj', which a mixtral model"),
    ],
)
def test_layouts_that_do_not(megatron: dict[str, Any], shape: ModelSpec, world_size: int, wanted: str):
    assert wanted in refusal(policy(**megatron), shape, world_size)


@pytest.mark.parametrize(("module", "shape"), [("moe_act", MIXTURE), ("layernorm", MIXTURE), ("layernorm", LLAMA_8B)])
def test_what_megatron_recomputes_by_transformer_engine_is_refused_without_it(module: str, shape: ModelSpec) -> None:
    configured = policy(**SELECTIVE, recompute_modules=["core_attn", module])
    check_recomputed(configured, shape, transformer_engine=True)
    check_recomputed(policy(recompute_modules=[module]), shape, transformer_engine=False)
    if shape is LLAMA_8B:  # its norms are part of linears
        check_recomputed(configured, shape, transformer_engine=False)
        return
    with pytest.raises(UserError, match=f"recompute_modules has '{module}', .* Transformer Engine .* use core_attn"):
        check_recomputed(configured, shape, transformer_engine=False)


def test_sequence_length_has_to_fit_the_split():
    configured = policy(max_length=100, **{TP: 4, CP: 2, "sequence_parallel": True})
    assert sequence_multiple(configured) == 16
    assert "max_total_sequence_length=100 is no multiple of 16" in refusal(configured, LLAMA_8B, 8)
    assert "use 96 or 112" in refusal(configured, LLAMA_8B, 8)


def test_sequence_parallel_is_off_without_tensor_parallel():
    assert policy(sequence_parallel=True).megatron_cfg.sequence_parallel is False
    assert policy(sequence_parallel=True, **{TP: 2}).megatron_cfg.sequence_parallel is True


def test_dtensor_layouts():
    configured = policy(enabled=False)
    configured.dtensor_cfg.tensor_parallel_size = 2
    check_layout(configured, LLAMA_8B, 4)
    assert "tensor_parallel_size=2 does not divide the 3 ranks; use 1 or 3" in refusal(configured, LLAMA_8B, 3)
    configured.dtensor_cfg.lora_cfg.enabled = True
    assert "set use_triton=false" in refusal(configured, LLAMA_8B, 4)


def test_shared_prefixes_and_context_parallelism():
    configured = policy(context_parallel_size=2)
    check_layout(configured, LLAMA_8B, 2)
    configured.shared_prefix = True
    assert "set it to auto" in refusal(configured, LLAMA_8B, 2)


@pytest.mark.parametrize(
    ("recipe", "shape", "world_size"),
    [
        ("sft-llama3.2-1b-megatron.yaml", LLAMA_1B, 8),
        ("sft-llama3.1-8b-megatron.yaml", LLAMA_8B, 8),
        ("dpo-llama3.1-8b-megatron.yaml", LLAMA_8B, 8),
        ("sft-llama3.1-70b-megatron.yaml", LLAMA_70B, 64),
        ("sft-qwen3-30ba3b-megatron.yaml", QWEN3_30B, 8),
        ("grpo-gsm8k-qwen3-30ba3b-megatron.yaml", QWEN3_30B, 8),
        ("sft-gpt-oss-20b-megatron.yaml", GPT_OSS_20B, 8),
        ("sft-deepseek-v3-megatron.yaml", DEEPSEEK_V3, 64),
    ],
)
def test_recipes_fit_the_models_they_name(recipe: str, shape: ModelSpec, world_size: int):
    for enabled in ("true", "false"):
        loaded = load_recipe(ROOT / "recipes" / recipe, [f"policy.megatron_cfg.enabled={enabled}"])
        check_layout(loaded.recipe.policy, shape, world_size)
        adapted = starting_adapter(loaded.recipe.policy.adapter, shape, "model").spec.modules
        assert adapted and not [module for module in adapted if shape.linear(module.kind).experts]


@pytest.mark.parametrize(
    ("keys", "why"),
    [
        ({TP: 2}, "tensor_model_parallel_size=2"),
        ({PP: 2}, "pipeline_model_parallel_size=2"),
        ({"activation_checkpointing": True}, "activation_checkpointing=true"),
        ({"use_fused_linear_logprobs": False}, "use_fused_linear_logprobs=false"),
        ({"peft": {"enabled": False}}, "all weights train"),
        ({"peft": {"enabled": True, "type": "dora"}}, "peft.type=dora"),
        ({"peft": {"enabled": True, "dropout": 0.1}}, "peft.dropout=0.1"),
        ({"peft": {"enabled": True, "quantization": "nf4", "lora_dtype": "float32"}}, "peft.quantization=nf4"),
        ({"peft": {"enabled": True, "modules_to_save": ["norm"]}}, "peft.modules_to_save"),
    ],
)
def test_graphs_that_cannot_be_are_refused_only_where_they_were_asked_for(keys: dict[str, Any], why: str) -> None:
    head = {"use_fused_linear_logprobs": True}
    message = refusal(policy(**head | keys | {"cuda_graph_impl": "local"}), LLAMA_8B, 2)
    assert "cuda_graph_impl=local" in message and why in message and "null" in message
    for allowed in (None, "none"):
        check_layout(policy(**head | keys | {"cuda_graph_impl": allowed}), LLAMA_8B, 2)
    check_layout(policy(**head | {"cuda_graph_impl": "local"}), LLAMA_8B, 1)
    assert "expert" in refusal(policy(**head | {"cuda_graph_impl": "local"}), MIXTURE, 1)


def test_graphs_leave_room_for_an_engine_on_the_same_gpu() -> None:
    def impl(recipe: str, *overrides: str) -> str | None:
        return load_recipe(ROOT / "recipes" / recipe, overrides).recipe.policy.megatron_cfg.cuda_graph_impl

    grpo, key = "grpo-gsm8k-smollm2-135m-megatron.yaml", "policy.megatron_cfg.cuda_graph_impl"
    assert impl("sft-gsm8k-smollm2-135m-megatron.yaml") is None
    assert impl(grpo) == "none" and impl(grpo, f"{key}=local") == "local"
    assert impl(grpo, "policy.generation.backend=megatron") is None
    assert impl(grpo, "policy.generation.colocated.enabled=false") is None
