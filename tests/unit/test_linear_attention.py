"""Linear attention (Qwen3-Next, Qwen3.5): the order of its projections' rows, and what is refused before loading."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_lora.config.schema import PolicyConfig
from megatron_lora.conversion.config_gate import check_config
from megatron_lora.conversion.hf_model import HFModel
from megatron_lora.errors import UserError
from megatron_lora.lora.describe import describe_config, describe_json
from megatron_lora.lora.layout import rows_of_part
from megatron_lora.lora.model_spec import ModelSpec
from megatron_lora.policy.layout_checks import check_layout
from megatron_lora.rollout.vllm_engine import check_request
from megatron_lora.runtime.world import World
from tests.support.models import family_config

FAMILIES = ("qwen3_next", "qwen3_5", "qwen3_5_moe")


def shapes(family: str, **changes: Any) -> ModelSpec:
    return describe_config(family_config(family, **changes).to_dict())


def policy(**megatron: Any) -> PolicyConfig:
    section = {"enabled": True, "peft": {"enabled": True}} | megatron
    return PolicyConfig.model_validate({"model_name": "somewhere", "megatron_cfg": section})


def gate(family: str, **changes: Any) -> list[str]:
    return check_config(HFModel("folder", {}, family_config(family, **changes)), megatron=True, max_length=32)


def test_both_families_have_their_rows_in_one_order() -> None:
    """Numbers that stand for what a row is: the same in Megatron's order, whichever HF linears they come from."""
    heads, ratio, key, value = 2, 3, 12, 10
    head = torch.arange(heads)[:, None] * 10_000
    # Of each key head: query, key, values, gates, strengths, decays.
    sizes = {"q": key, "k": key, "v": ratio * value, "z": ratio * value, "b": ratio, "a": ratio}
    rows = {name: head + 1000 * n + torch.arange(size) for n, (name, size) in enumerate(sizes.items())}
    hf = {name: torch.cat([rows[part] for part in name], 1).reshape(-1) for name in ("qkvz", "ba", "z", "b", "a")}
    hf |= {"qkv": torch.cat([rows[name].reshape(-1) for name in "qkv"])}
    wanted = torch.cat([rows[name] for name in sizes], 1).reshape(-1)
    for family in FAMILIES:
        linear = shapes(family).linear("in_proj")
        fused = torch.full((linear.out_features,), -1)
        for part in linear.parts:
            fused[rows_of_part(linear, part.segment)] = hf[part.segment]
        assert torch.equal(fused, wanted)
        # Of two ranks the first has the first key head, in the same order.
        half = linear.on_rank(2)
        fused = torch.full((half.out_features,), -1)
        for part in half.parts:
            own = hf[part.segment][hf[part.segment] < 10_000]
            fused[rows_of_part(half, part.segment)] = own
        assert torch.equal(fused, wanted[wanted < 10_000])


def test_a_gated_query_is_followed_by_its_gate() -> None:
    linear = shapes("qwen3_5").linear("linear_qkv")
    found = rows_of_part(linear, "q").view(2, 2, 2, 32)  # group, head, query or gate, feature
    group = linear.out_features // 2
    assert found[0, 0, 0, 0] == 0 and found[0, 1, 0, 0] == 32
    assert found[0, 0, 1, 0] == 64 and found[1, 1, 1, 5] == group + 64 + 32 + 5


@pytest.mark.parametrize("family", FAMILIES)
def test_the_description_is_read_as_it_was_written(family: str) -> None:
    found = shapes(family)
    assert describe_json(json.loads(json.dumps(dataclasses.asdict(found)))) == found


@pytest.mark.parametrize("family", FAMILIES)
def test_taken(family: str) -> None:
    assert gate(family) == []
    check_layout(policy(tensor_model_parallel_size=2, sequence_parallel=True), shapes(family), 2)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"layer_types": ["linear_attention"] * 4}, "layer_types has no full_attention"),
        ({"layer_types": ["linear_attention", "sliding_attention"] * 2}, "layer_types has sliding_attention; wanted"),
        ({"linear_num_value_heads": 5}, "linear_num_key_heads=2 does not divide linear_num_value_heads=5"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu': linear attention is computed with silu alone"),
    ],
)
def test_configs_that_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        gate("qwen3_5", **changes)


@pytest.mark.parametrize(
    ("megatron", "ranks", "words"),
    [
        (
            {"context_parallel_size": 4},
            4,
            "=4 does not divide the 2 key heads of linear attention of a rank",
        ),
        ({"tensor_model_parallel_size": 2}, 2, "=2 does not divide the 3 key heads of linear attention"),
    ],
)
def test_layouts_that_are_refused(megatron: dict[str, Any], ranks: int, words: str) -> None:
    heads = {"linear_num_key_heads": 3} if "tensor_model_parallel_size" in megatron else {}
    with pytest.raises(UserError, match=words):
        check_layout(policy(**megatron), shapes("qwen3_5", **heads), ranks)


def test_vllm_on_a_cpu_takes_bfloat16(tmp_path: Path) -> None:
    config = family_config("qwen3_next")
    config.save_pretrained(tmp_path)
    for precision, refused in (("float32", True), ("bfloat16", False)):
        section = {"enabled": True, "peft": {"enabled": True}}
        values = {"model_name": str(tmp_path), "precision": precision, "megatron_cfg": section}
        recipe = PolicyConfig.model_validate(values)
        if refused:
            with pytest.raises(UserError, match="linear attention .* in bfloat16 alone, and its precision is float32"):
                check_request(recipe, World.alone(), config, None)
        else:
            check_request(recipe, World.alone(), config, None)
