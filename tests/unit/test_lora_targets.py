"""Which linears a recipe's patterns choose."""

from dataclasses import replace

import pytest

from megatron_lora.errors import UserError
from megatron_lora.lora.layout import ModelShapes
from megatron_lora.lora.targets import all_linears, select_targets

SHAPES = ModelShapes("llama", 64, 96, 12, 4, 2, 16, 101, tied_embeddings=False)
PARTS = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")


def layer(number: int) -> list[str]:
    return [f"decoder.layers.{number}.{part}" for part in PARTS]


def every(part: str, layers: range = range(12)) -> list[str]:
    return [f"decoder.layers.{number}.{part}" for number in layers]


def test_without_targets_the_four_linears_of_every_layer():
    assert select_targets(SHAPES, [], []) == [name for number in range(12) for name in layer(number)]


@pytest.mark.parametrize(
    ("patterns", "wanted"),
    [
        (["linear_qkv"], every(PARTS[0])),
        (["decoder.layers.3.mlp.linear_fc1"], ["decoder.layers.3.mlp.linear_fc1"]),
        (["*.layers.1.*"], layer(1)),
        (["*.layers.1?.*"], layer(10) + layer(11)),
        (["*.layers.[02].mlp.*"], layer(0)[2:] + layer(2)[2:]),
        (["*.linear_fc2"], every(PARTS[3])),
        (["output_layer", "*.layers.11.*"], [*layer(11), "output_layer"]),
        (["*.layers.2.*", "linear_qkv"], sorted({*layer(2), *every(PARTS[0])}, key=all_linears(SHAPES).index)),
    ],
)
def test_names_paths_and_wildcards(patterns, wanted):
    assert select_targets(SHAPES, patterns, []) == wanted


def test_a_wildcard_does_not_reach_the_output_layer():
    assert select_targets(SHAPES, ["*"], []) == select_targets(SHAPES, [], [])


def test_exclusions_leave_the_rest():
    chosen = select_targets(SHAPES, [], ["*.layers.1.*", "linear_proj"])
    assert set(chosen) == set(select_targets(SHAPES, [], [])) - {*layer(1), *every(PARTS[1])}


def test_exclusions_beside_targets_are_refused():
    message = r"exclude_modules=\['linear_fc2'\] needs empty peft.target_modules, got \['linear_qkv'\]"
    with pytest.raises(UserError, match=message):
        select_targets(SHAPES, ["linear_qkv"], ["linear_fc2"])


@pytest.mark.parametrize(
    ("pattern", "near"),
    [
        ("linear_qvk", "linear_qkv"),
        ("decoder.layers.12.mlp.linear_fc1", "decoder.layers.2.mlp.linear_fc1"),
        ("*.layers.12.*", "decoder.layers."),
        ("layers.1", "near names: "),
    ],
)
def test_a_pattern_that_matches_nothing_is_refused_with_near_names(pattern, near):
    for targets, exclusions in (([pattern], []), ([], [pattern])):
        with pytest.raises(UserError) as refusal:
            select_targets(SHAPES, targets, exclusions)
        message = str(refusal.value)
        assert repr(pattern) in message and "12 layers" in message
        assert near in message.split("near names")[1] or near == "near names: "


def test_a_hugging_face_name_is_answered_with_megatrons():
    with pytest.raises(UserError, match="'gate_proj' is a Hugging Face name; in Megatron it is part of 'linear_fc1'"):
        select_targets(SHAPES, ["gate_proj"], [])


def test_nothing_left_to_adapt_is_refused():
    with pytest.raises(UserError, match="leaves no linear to adapt"):
        select_targets(SHAPES, [], ["*"])


def test_an_output_layer_tied_to_the_embedding_is_refused_with_the_reason():
    with pytest.raises(UserError, match="output layer is its embedding"):
        select_targets(replace(SHAPES, tied_embeddings=True), ["linear_qkv", "output_layer"], [])
