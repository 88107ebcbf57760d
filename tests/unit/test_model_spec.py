"""The one description of a model: what it says of each family, and what older files that lack it are read as."""

from dataclasses import asdict

import pytest

from megatron_lora.conversion.model_names import model_parameters
from megatron_lora.errors import UserError
from megatron_lora.lora.describe import describe_config
from megatron_lora.lora.families import families, known_families
from megatron_lora.lora.layout import AdapterSpec, build_layout
from megatron_lora.lora.model_spec import ModelSpec

SIZES = {
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 13,
}
EXPERTS = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 6}

LATENT = {"kv_lora_rank": 4, "q_lora_rank": 2, "qk_nope_head_dim": 2, "qk_rope_head_dim": 2, "v_head_dim": 2}


LINEAR = {
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 3,
    "linear_value_head_dim": 2,
    "linear_conv_kernel_dim": 4,
}
MAMBA = {
    "layers_block_type": ["mamba", "attention", "mlp", "moe"],
    "n_groups": 2,
    "mamba_num_heads": 4,
    "mamba_head_dim": 3,
    "ssm_state_size": 2,
    "conv_kernel": 4,
    "moe_shared_expert_intermediate_size": 2,
}


def described(family: str, **changes: object) -> ModelSpec:
    return describe_config({"model_type": family, **SIZES, **changes})


def test_an_adapter_of_an_older_release_still_loads():
    """Version 1 files held the sizes alone, and no biases for Qwen2, which always has them."""
    for family in ("llama", "qwen2", "gemma3_text"):
        now = described(family)
        spec = AdapterSpec("base", now, [build_layout("decoder.layers.1.mlp.linear_fc1", 2, 4, now)])
        content = spec.to_json()
        content["shapes"] = {
            key: value
            for key, value in asdict(now).items()
            if key not in ("linears", "others", "num_experts", "num_experts_per_token")
            and key not in ("moe_ffn_hidden_size", "dense_layers")
        } | {"attention_bias": False}
        assert AdapterSpec.from_json(content) == spec


def test_the_description_in_a_file_counts_not_this_releases_table():
    """What a newer release calls otherwise is exported under the names that the file has."""
    now = described("llama")
    content = AdapterSpec("base", now, []).to_json()
    assert content["shapes"]["linears"][0]["parts"][0]["name"] == "model.layers.*.self_attn.q_proj"
    content["shapes"]["linears"][0]["parts"][0]["name"] = "model.layers.*.attention.wq"
    read = AdapterSpec.from_json(content).shapes
    assert read.linear("linear_qkv").hf_name("q", 2) == "model.layers.2.attention.wq"
    assert now.differences(read) == ["linears of other names"]


def test_every_expert_is_a_tensor_of_its_own():
    spec = described("qwen3_moe", **EXPERTS)
    names = {parameter.name: parameter for parameter in model_parameters(spec)}
    expert = names["decoder.layers.2.mlp.experts.linear_fc1.1.weight"]
    assert expert.hf_names == tuple(f"model.layers.2.mlp.experts.1.{end}_proj.weight" for end in ("gate", "up"))
    assert expert.shape == (12, 8) and names["decoder.layers.2.mlp.router.weight"].shape == (3, 8)
    kinds = ["linear_qkv", "linear_proj", "experts.linear_fc1", "experts.linear_fc2", "router"]
    assert [linear.kind for linear in spec.adaptable(2)] == kinds


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "qwen3_moe", **SIZES, **EXPERTS, "mlp_only_layers": [1]}, "layers 1 of the model have no"),
        ({"model_type": "phi3"}, "model_type='phi3' .* maps no such family"),
        ({"model_type": "falcon_h1"}, "attention and Mamba side by side"),
        ({"model_type": "gemma4_text"}, "heads of two sizes"),
        ({"model_type": "glm_moe_dsa"}, "an indexer picks"),
        ({"model_type": "deepseek_v4"}, "several residual streams"),
        ({"model_type": "llama", "num_attention_heads": 2, "hidden_size": 4}, "no 'num_hidden_layers'"),
    ],
)
def test_what_cannot_be_described_is_refused(config: dict, message: str):
    with pytest.raises(UserError, match=message):
        describe_config(config)


def test_every_known_family_has_the_linears_of_attention():
    assert set(known_families()) < set(families())
    for family in known_families():
        kinds = described(family, **EXPERTS, **LATENT, **LINEAR, **MAMBA).kinds
        assert {"linear_proj", "output_layer"} <= set(kinds)
        assert ("linear_qkv" in kinds) != ("linear_kv_down_proj" in kinds), (family, kinds)


def test_latent_attention_of_deepseek():
    """DeepSeek-V3's table 1 (arXiv 2412.19437, section 4.2), but for the vocabulary."""
    sizes = {"hidden_size": 7168, "num_hidden_layers": 61, "num_attention_heads": 128, "intermediate_size": 18432}
    latent = {"q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64}
    experts = {"n_routed_experts": 256, "num_experts_per_tok": 8, "moe_intermediate_size": 2048, "n_shared_experts": 1}
    spec = described("deepseek_v3", **sizes, **latent, **experts, v_head_dim=128, first_k_dense_replace=3)
    shapes = {linear.kind: (linear.out_features, linear.in_features) for linear in spec.linears}
    assert shapes["linear_q_down_proj"] == (1536, 7168) and shapes["linear_q_up_proj"] == (128 * 192, 1536)
    assert shapes["linear_kv_down_proj"] == (576, 7168) and shapes["linear_kv_up_proj"] == (128 * 256, 512)
    assert shapes["linear_proj"] == (7168, 128 * 128) and "linear_q_proj" not in shapes
    assert shapes["shared_experts.linear_fc1"] == (4096, 7168)
    assert spec.linear("linear_fc1").layers == (0, 1, 2)
    dense = [linear.kind for linear in spec.adaptable(0)]
    assert (
        dense[-3:] == ["linear_proj", "linear_fc1", "linear_fc2"] and spec.linear("experts.linear_fc2").experts == 256
    )
    experts = [f"{where}experts.linear_fc{number}" for where in ("", "shared_") for number in (1, 2)]
    assert [linear.kind for linear in spec.adaptable(3)] == [*dense[:-2], *experts, "router"]
