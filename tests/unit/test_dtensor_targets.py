"""Which HF linears a `lora_cfg` adapts, and as which fused adapters they are saved."""

import pytest

from megatron_lora.config.schema_adapters import LoraConfig
from megatron_lora.errors import UserError
from megatron_lora.lora.layout import ModelShapes
from megatron_lora.policy.dtensor.targets import build_modules, select_linears

SHAPES = ModelShapes("llama", 64, 96, 12, 4, 2, 16, 101, tied_embeddings=False)
TIED = ModelShapes("qwen2", 64, 96, 12, 4, 2, 16, 101, tied_embeddings=True)


def selected(shapes: ModelShapes = SHAPES, **keys: object) -> tuple[list[str], list[str]]:
    linears, notices = select_linears(LoraConfig(**{"match_all_linear": False, **keys}), shapes)  # type: ignore[arg-type]
    return [linear.name for linear in linears], notices


def test_every_linear_of_every_layer_by_default() -> None:
    names, notices = selected()
    assert len(names) == 12 * 7 and not notices
    assert names[:4] == [f"model.layers.0.self_attn.{leaf}_proj" for leaf in "qkvo"]
    assert "lm_head" not in names


def test_fused_names_are_translated_and_said_so() -> None:
    names, notices = selected(target_modules=["linear_fc1", "o_proj"])
    assert names[:3] == [
        "model.layers.0.self_attn.o_proj",
        "model.layers.0.mlp.gate_proj",
        "model.layers.0.mlp.up_proj",
    ]
    assert len(names) == 12 * 3
    assert notices == ["'linear_fc1' is a fused Megatron name; here it is gate_proj, up_proj"]


def test_wildcards_mean_one_layer_alone() -> None:
    assert selected(target_modules=["*.layers.1.mlp.*"])[0] == [
        f"model.layers.1.mlp.{leaf}_proj" for leaf in ("gate", "up", "down")
    ]
    assert selected(target_modules=["decoder.layers.11.mlp.linear_fc2"])[0] == ["model.layers.11.mlp.down_proj"]


def test_exclusions() -> None:
    names, _ = selected(exclude_modules=["linear_qkv", "*.layers.0.*"])
    assert len(names) == 11 * 4
    with pytest.raises(UserError, match="leaves no linear"):
        selected(exclude_modules=["*.layers.*"])


def test_match_all_linear_takes_the_place_of_targets() -> None:
    names, notices = selected(match_all_linear=True, target_modules=["q_proj"])
    assert len(names) == 12 * 7
    assert "target_modules=['q_proj'] is not used" in notices[0]


def test_a_pattern_that_fits_nothing_names_near_ones() -> None:
    with pytest.raises(UserError, match="near names: q_proj"):
        selected(target_modules=["q_projj"])


def test_the_output_layer_is_adapted_by_name_only_and_not_if_tied() -> None:
    assert selected(target_modules=["lm_head"])[0] == ["lm_head"]
    assert selected(target_modules=["output_layer"])[0] == ["lm_head"]
    with pytest.raises(UserError, match="tied"):
        selected(TIED, target_modules=["lm_head"])


def test_one_a_for_the_linears_that_a_fused_linear_covers() -> None:
    linears, _ = select_linears(LoraConfig(match_all_linear=False, target_modules=["v_proj", "q_proj"]), SHAPES)
    modules = build_modules(linears, 4, 8.0, SHAPES)
    assert len(modules) == 12
    assert modules[0].name == "decoder.layers.0.self_attention.linear_qkv"
    [block] = modules[0].blocks
    assert block.segments == ("q", "v") and block.rank == 4 and block.scale == 2.0
    mask = modules[0].b_mask(SHAPES)
    assert mask is not None and int(mask.sum()) == 4 * (64 + 32)
