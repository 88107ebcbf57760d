"""Which linears a recipe's patterns choose, on either backend, by either kind of names."""

from dataclasses import replace

import pytest

from megatron_lora.config.schema_adapters import LoraConfig, PeftConfig
from megatron_lora.errors import UserError
from megatron_lora.lora.describe import describe
from megatron_lora.lora.init import initial_factors
from megatron_lora.lora.layout import AdapterSpec, ModelSpec
from megatron_lora.lora.model_spec import ModelSizes
from megatron_lora.lora.targets import Naming, Selection, build_modules, select_linears
from megatron_lora.policy.adapter_start import describe_modules, starting_adapter

SHAPES = describe(ModelSizes("llama", 64, 96, 12, 4, 2, 16, 101, tied_embeddings=False))
QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
LEAVES = (*QKV, "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
NAMINGS: tuple[Naming, ...] = ("megatron", "hf")


def select(targets=(), exclusions=(), naming: Naming = "megatron", shapes: ModelSpec = SHAPES) -> Selection:
    return select_linears(shapes, targets, exclusions, key="the.section", naming=naming)


def names(selection: Selection) -> list[str]:
    return [linear.name for linear in selection.linears]


def layers(*numbers: int, leaves=LEAVES) -> list[str]:
    return [f"model.layers.{number}.{leaf}" for number in numbers for leaf in leaves]


@pytest.mark.parametrize("naming", NAMINGS)
def test_without_targets_every_linear_of_every_layer(naming):
    chosen = select(naming=naming)
    assert names(chosen) == layers(*range(12)) and not chosen.notices


@pytest.mark.parametrize("naming", NAMINGS)
@pytest.mark.parametrize(
    ("patterns", "wanted"),
    [
        (["linear_qkv"], layers(*range(12), leaves=QKV)),
        (["q_proj"], layers(*range(12), leaves=QKV[:1])),
        (["decoder.layers.3.mlp.linear_fc1"], layers(3, leaves=LEAVES[4:6])),
        (["model.layers.3.mlp.up_proj"], layers(3, leaves=LEAVES[5:6])),
        (["*.layers.1.*"], layers(1)),
        (["*.layers.1?.*"], layers(10, 11)),
        (["*.layers.[02].mlp.*"], layers(0, 2, leaves=LEAVES[4:])),
        (["*.linear_fc2"], layers(*range(12), leaves=LEAVES[6:])),
        (["*.down_proj"], layers(*range(12), leaves=LEAVES[6:])),
        (["output_layer", "*.layers.11.*"], [*layers(11), "lm_head"]),
        (["lm_head"], ["lm_head"]),
        (["o_proj", "linear_fc2"], layers(*range(12), leaves=(LEAVES[3], LEAVES[6]))),
    ],
)
def test_names_paths_and_wildcards_of_both_kinds(patterns, wanted, naming):
    assert names(select(patterns, naming=naming)) == wanted


def test_each_backend_says_how_it_understood_the_others_names():
    targets = ["linear_fc1", "o_proj", "linear_fc1"]
    assert select(targets, naming="hf").notices == [
        "'linear_fc1' is a fused Megatron name; here it is gate_proj, up_proj"
    ]
    assert select(targets, naming="megatron").notices == [
        "'o_proj' is a Hugging Face name; here it is linear_proj (o)",
    ]
    assert select(["*.self_attn.*"], naming="megatron").notices == [
        "'*.self_attn.*' is a Hugging Face name; here it is linear_qkv (q, k, v), linear_proj (o)"
    ]


def test_a_wildcard_does_not_reach_the_output_layer():
    assert names(select(["*"])) == names(select())


@pytest.mark.parametrize("naming", NAMINGS)
def test_exclusions_leave_the_rest(naming):
    chosen = names(select([], ["*.layers.1.*", "linear_proj", "v_proj"], naming))
    gone = {*layers(1), *layers(*range(12), leaves=(QKV[2], LEAVES[3]))}
    assert set(chosen) == set(layers(*range(12))) - gone


def test_exclusions_beside_targets_are_refused():
    message = r"exclude_modules=\['linear_fc2'\] needs empty the.section.target_modules, got \['linear_qkv'\]"
    with pytest.raises(UserError, match=message):
        select(["linear_qkv"], ["linear_fc2"])


@pytest.mark.parametrize(
    ("pattern", "naming", "near"),
    [
        ("linear_qvk", "megatron", "linear_qkv"),
        ("q_projj", "hf", "q_proj"),
        ("decoder.layers.12.mlp.linear_fc1", "megatron", "decoder.layers.2.mlp.linear_fc1"),
        ("*.layers.12.*", "megatron", "layers."),
        ("#", "hf", "q_proj, k_proj"),
    ],
)
def test_a_pattern_that_matches_nothing_is_refused_with_near_names(pattern, naming, near):
    for targets, exclusions in (([pattern], []), ([], [pattern])):
        with pytest.raises(UserError) as refusal:
            select(targets, exclusions, naming)
        message = str(refusal.value)
        assert f"{pattern!r} in the.section" in message and "12 layers" in message
        assert near in message.split("near names: ")[1]


def test_nothing_left_to_adapt_is_refused():
    with pytest.raises(UserError, match="leaves no linear to adapt"):
        select([], ["*"])


@pytest.mark.parametrize("name", ["output_layer", "lm_head"])
def test_an_output_layer_tied_to_the_embedding_is_refused_with_the_reason(name):
    with pytest.raises(UserError, match="output layer is its embedding"):
        select(["linear_qkv", name], shapes=replace(SHAPES, tied_embeddings=True))


def test_one_a_for_the_linears_that_a_fused_linear_covers():
    modules = build_modules(select(["v_proj", "q_proj"]).linears, 4, 8.0, SHAPES)
    assert len(modules) == 12
    assert modules[0].name == "decoder.layers.0.self_attention.linear_qkv"
    [block] = modules[0].blocks
    assert block.segments == ("q", "v") and block.rank == 4 and block.scale == 2.0
    mask = modules[0].b_mask(SHAPES)
    assert mask is not None and int(mask.sum()) == 4 * (64 + 32)


def test_a_drawn_b_is_zero_where_no_target_is():
    modules = build_modules(select(["v_proj"]).linears, 4, 8.0, SHAPES)
    draw = initial_factors(AdapterSpec("base", SHAPES, modules), "xavier", "normal", seed=1)
    mask = modules[0].b_mask(SHAPES)
    b = draw(modules[0])["lora_B"]
    assert mask is not None and (b[mask] != 0).all() and (b[~mask] == 0).all()


def test_both_backends_plan_the_same_adapter_from_the_same_names():
    for targets in (["q_proj", "linear_fc2"], [], ["*.layers.2.*"]):
        ours = PeftConfig(enabled=True, target_modules=targets, dim=4, alpha=8)
        theirs = LoraConfig(enabled=True, target_modules=targets, dim=4, alpha=8, match_all_linear=False)
        plans = [starting_adapter(config, SHAPES, "no/such-folder") for config in (ours, theirs)]
        assert plans[0].spec.modules == plans[1].spec.modules


def test_match_all_linear_takes_the_place_of_targets():
    config = LoraConfig(enabled=True, match_all_linear=True, target_modules=["q_proj"], dim=4, alpha=8)
    plan = starting_adapter(config, SHAPES, "no/such-folder")
    assert plan.spec.modules == build_modules(select().linears, 4, 8.0, SHAPES)
    assert "target_modules=['q_proj'] is not used" in plan.notices[0]


def test_the_table_names_the_parts_that_are_adapted():
    modules = build_modules(select(["v_proj", "q_proj", "linear_fc2"]).linears, 4, 8.0, SHAPES)
    rows = describe_modules(AdapterSpec("base", SHAPES, modules))
    assert [row[:2] for row in rows] == [("linear_qkv (q, v)", "0-11"), ("linear_fc2", "0-11")]
    # A and the rows of q (64) and v (32), not those of k.
    assert rows[0][-1] == f"{12 * 4 * (64 + 64 + 32):,}"
