"""HF PEFT adapters in and out: bit-exact round trips, and peft itself as the judge of names, ranks and scales."""

import json
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import check_target_module_exists
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_lora.conversion.tower import TOWER
from megatron_lora.errors import UserError
from megatron_lora.lora.describe import describe, describe_config
from megatron_lora.lora.layout import AdapterSpec, ModelSpec, build_layout
from megatron_lora.lora.merge import merge_targets
from megatron_lora.lora.model_spec import ModelSizes
from megatron_lora.lora.peft_config import read_patterns, shortest_targets
from megatron_lora.lora.peft_format import hf_linears, segment_features, to_hf
from megatron_lora.lora.peft_reading import from_hf

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2")
LEAVES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def tiny_model(family: str, tied: bool = False, layers: int = 3) -> torch.nn.Module:
    config = AutoConfig.for_model(
        family,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=6,
        vocab_size=40,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
    )
    torch.manual_seed(1)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def random_adapter(config: dict, shapes: ModelSpec, shared_a: bool) -> dict[str, torch.Tensor]:
    """PEFT tensors for every linear that `config` targets; with shared_a, q, k, v and gate, up get one A."""
    patterns = read_patterns(config)
    tensors: dict[str, torch.Tensor] = {}
    shared: dict[tuple, torch.Tensor] = {}
    for name, linear in hf_linears(shapes).items():
        if not patterns.matches(name):
            continue
        inputs, outputs = segment_features(linear, shapes)
        rank = patterns.rank_and_alpha(name)[0]
        a = torch.randn(rank, inputs)
        if shared_a:
            a = shared.setdefault((linear.layer, linear.kind, rank), a)
        tensors[f"base_model.model.{name}.lora_A.weight"] = a.clone()
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(outputs, rank)
    return tensors


@st.composite
def adapters(draw) -> tuple[dict, ModelSpec, bool]:
    groups = draw(st.integers(1, 3))
    shapes = describe(
        ModelSizes(
            "llama",
            draw(st.integers(1, 6)),
            draw(st.integers(1, 6)),
            draw(st.integers(1, 12)),
            groups * draw(st.integers(1, 3)),
            groups,
            draw(st.integers(1, 3)),
            draw(st.integers(2, 9)),
            False,
        )
    )
    names = list(hf_linears(shapes))
    ends = sorted({name.rsplit(".", 1)[-1] for name in names})
    targets = draw(st.one_of(st.sets(st.sampled_from(names), min_size=1), st.sets(st.sampled_from(ends), min_size=1)))
    keys = st.sampled_from(names + ends)
    config = {
        "peft_type": "LORA",
        "r": draw(st.integers(1, 4)),
        "lora_alpha": draw(st.integers(1, 9)),
        "target_modules": sorted(targets),
        "rank_pattern": draw(st.dictionaries(keys, st.integers(1, 4), max_size=4)),
        "alpha_pattern": draw(st.dictionaries(keys, st.integers(1, 9), max_size=4)),
        "use_rslora": draw(st.booleans()),
    }
    return config, shapes, draw(st.booleans())


@settings(deadline=None, max_examples=150)
@given(drawn=adapters())
def test_unfuse_of_fuse_is_the_identity(drawn):
    config, shapes, shared_a = drawn
    tensors = random_adapter(config, shapes, shared_a)
    spec, fused = from_hf(config, tensors, shapes, "base")
    written, again = to_hf(AdapterSpec.from_json(json.loads(json.dumps(spec.to_json()))), fused)
    assert set(again) == set(tensors)
    assert all(torch.equal(again[key], tensors[key]) for key in tensors)
    # peft writes its JSON with sorted keys: the patterns must mean the same in any order.
    before, after = read_patterns(config), read_patterns(json.loads(json.dumps(written, sort_keys=True)))
    for name in hf_linears(shapes):
        assert bool(check_target_module_exists(LoraConfig(**written), name)) == before.matches(name)
        assert after.matches(name) == before.matches(name)
        if before.matches(name):
            assert after.rank_and_alpha(name) == before.rank_and_alpha(name)
    for module in spec.modules:
        mask = module.b_mask(shapes)
        if mask is not None:
            assert not fused[f"{module.name}.lora_B"][~mask].any()


CONFIGS = {
    "some_linears": dict(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "up_proj"]),
    "all_linear_rslora": dict(r=4, lora_alpha=6, target_modules="all-linear", use_rslora=True),
    "patterns": dict(
        r=4,
        lora_alpha=8,
        target_modules=LEAVES,
        rank_pattern={"k_proj": 2, r"layers\.1\.mlp\.up_proj": 3},
        alpha_pattern={"^model.layers.2.*v_proj": 5, "down_proj": 32},
    ),
    "layers": dict(r=2, lora_alpha=4, target_modules=["q_proj", "down_proj"], layers_to_transform=[0, 2]),
    "regex": dict(r=2, lora_alpha=4, target_modules=r".*\.layers\.1\..*(k|gate)_proj"),
    "excluded": dict(r=2, lora_alpha=4, target_modules=LEAVES, exclude_modules=r".*layers\.1\..*"),
    "head": dict(r=2, lora_alpha=4, target_modules=["lm_head", "o_proj"]),
    "dora": dict(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "o_proj", "up_proj", "lm_head"], use_dora=True),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("case", CONFIGS)
def test_any_peft_adapter_comes_back_and_loads(family, case, tmp_path, recwarn):
    model = get_peft_model(tiny_model(family), LoraConfig(task_type="CAUSAL_LM", **CONFIGS[case]))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter)
    tokens = torch.arange(12)[None]
    expected = model(tokens).logits
    model.save_pretrained(tmp_path / "before")
    config = json.loads((tmp_path / "before" / "adapter_config.json").read_text())
    tensors = load_file(tmp_path / "before" / "adapter_model.safetensors")
    shapes = describe_config(model.base_model.model.config.to_dict())

    spec, fused = from_hf(config, tensors, shapes, "base")
    written, again = to_hf(spec, fused)

    assert set(again) == {key for key in tensors if ".lora_" in key}
    assert all(torch.equal(again[key], tensors[key]) for key in again)
    (tmp_path / "after").mkdir()
    (tmp_path / "after" / "adapter_config.json").write_text(json.dumps(written))
    save_file(again, tmp_path / "after" / "adapter_model.safetensors")
    recwarn.clear()
    loaded = PeftModel.from_pretrained(tiny_model(family), tmp_path / "after")
    assert not [w for w in recwarn if re.search("missing|unexpected", str(w.message))]
    held = {name for name, _ in loaded.named_parameters() if "lora_" in name}
    named = {key.replace("magnitude_vector", "magnitude_vector.weight") for key in again}
    assert held == {key.replace(".weight", ".default.weight") for key in named}
    assert torch.equal(loaded(tokens).logits, expected)

    merged = tiny_model(family)
    linears = dict(merged.named_modules())
    for name, target in merge_targets(spec).items():
        weight = linears[name].weight.data
        weight += target.weight_update(fused).of_rows(weight)
    assert torch.allclose(merged(tokens).logits, expected, atol=1e-4, rtol=1e-4)


SHAPES = describe(ModelSizes("qwen3", 16, 24, 40, 4, 2, 4, 10, False))


@pytest.mark.parametrize(
    "adapted, wanted",
    [
        (lambda name: "q_proj" in name, ["q_proj"]),
        (lambda name: name == "model.layers.7.mlp.up_proj", ["layers.7.mlp.up_proj"]),
        (lambda name: re.search(r"layers\.[0-4]\..*(q|v)_proj", name), r".*\.layers\.(0|1|2|3|4)\..*\.(q_proj|v_proj)"),
    ],
)
def test_targets_take_the_shortest_exact_form(adapted, wanted):
    names = list(hf_linears(SHAPES))
    assert shortest_targets([name for name in names if adapted(name)], names) == wanted


@pytest.mark.parametrize(
    "adapted, wanted",
    [
        (r"q_proj", r"model\.language_model\..*\.(q_proj)"),
        (r"q_proj|lm_head", r"lm_head|model\.language_model\..*\.(q_proj)"),
        (r"layers\.(3|12)\..*v_proj", r"model\.language_model\.layers\.(3|12)\..*\.(v_proj)"),
    ],
)
def test_targets_leave_out_what_sees(adapted: str, wanted: str) -> None:
    names = list(hf_linears(describe(ModelSizes("qwen3", 16, 24, 40, 4, 2, 4, 10, False, tower=TOWER))))
    chosen = [name for name in names if re.search(adapted, name)]
    pattern = shortest_targets(chosen, names, TOWER)
    assert pattern == wanted
    others = ["model.vision_tower.encoder.layers.3.self_attn.v_proj", "model.vision_tower.layers.0.q_proj"]
    assert {name for name in [*names, *others] if re.fullmatch(pattern, name)} == set(chosen)


def test_a_shared_a_is_written_as_copies_and_alpha_stays():
    module = build_layout("decoder.layers.0.self_attention.linear_qkv", 2, 3, SHAPES)
    a, b = torch.randn(2, 16), torch.randn(32, 2)
    spec = AdapterSpec("base", SHAPES, [module], settings={"dropout": 0.1})
    config, tensors = to_hf(spec, {f"{module.name}.lora_A": a, f"{module.name}.lora_B": b})
    for leaf in "qkv":
        assert torch.equal(tensors[f"base_model.model.model.layers.0.self_attn.{leaf}_proj.lora_A.weight"], a)
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (2, 3, 0.1)
    # peft has no dropout behind B: the file does not claim one before A.
    spec.settings["dropout_position"] = "post"
    assert to_hf(spec, {f"{module.name}.lora_A": a, f"{module.name}.lora_B": b})[0]["lora_dropout"] == 0.0
    assert torch.equal(tensors["base_model.model.model.layers.0.self_attn.k_proj.lora_B.weight"][:4], b[8:12])


def test_uniform_scale_keeps_the_product():
    config = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "k_proj", "down_proj"],
        "rank_pattern": {"k_proj": 2},
        "alpha_pattern": {"down_proj": 6},
    }
    tensors = random_adapter(config, SHAPES, False)
    spec, fused = from_hf(config, tensors, SHAPES, "base")
    uniform, folded = to_hf(spec, fused, uniform_scale=True)
    before, after = read_patterns(config), read_patterns(uniform)
    for name in (name for name in hf_linears(SHAPES) if before.matches(name)):
        a, b = (f"base_model.model.{name}.lora_{factor}.weight" for factor in "AB")
        rank, alpha = before.rank_and_alpha(name)
        new_rank, new_alpha = after.rank_and_alpha(name)
        assert new_alpha / new_rank == uniform["lora_alpha"] / uniform["r"]
        product = new_alpha / new_rank * folded[b] @ folded[a]
        torch.testing.assert_close(product, alpha / rank * tensors[b] @ tensors[a])


def config_with(**changes) -> dict:
    return {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], **changes}


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(use_dora=True), "the weights lack .*lora_magnitude_vector"),
        (dict(lora_bias=True), r"lora_bias=True; merge it with peft \(merge_and_unload"),
        (dict(bias="all"), r"bias='all': trained biases are not supported; merge it with peft"),
        (dict(peft_type="LOHA"), "peft_type='LOHA', a kind that is not there: LoRA is read"),
        (dict(peft_type="IA3"), r"merge it with peft \(merge_and_unload"),
        (dict(peft_type="ADALORA"), "policy.model_name, or train a LoRA instead"),
        (dict(peft_type="VERA"), "peft_type='VERA'"),
        (dict(peft_type="PREFIX_TUNING"), "it cannot be merged either: train a LoRA instead"),
        (dict(init_lora_weights="pissa"), "path_initial_model_for_weight_conversion"),
        (dict(init_lora_weights="pissa_niter_4"), "pissa_niter_4"),
        (dict(r=None), "number in r"),
        (dict(lora_alpha=0), "alpha must be finite and not 0"),
        (dict(target_modules=None), "no target_modules"),
        (dict(target_modules=["embed_tokens"]), "adapts no linear|does not target"),
        (dict(r=3), r"has shape \(2, 16\), wanted \(3, 16\)"),
        (dict(target_modules=["q_proj", "v_proj"]), "targets model.layers.0.self_attn.v_proj, but the weights lack"),
        (dict(layers_to_transform=[1]), "does not target"),
    ],
)
def test_what_is_not_a_plain_matching_lora_is_refused_by_name(changes, message):
    tensors = random_adapter(config_with(), SHAPES, False)
    with pytest.raises(UserError, match=message):
        from_hf(config_with(**changes), tensors, SHAPES, "base")


def test_an_adapter_on_embeddings_is_refused_by_name():
    config = config_with(target_modules=["q_proj", "embed_tokens"])
    tensors = random_adapter(config_with(), SHAPES, False)
    tensors["base_model.model.model.embed_tokens.lora_embedding_A"] = torch.zeros(2, 20)
    with pytest.raises(UserError, match="adapters on embeddings are not supported: .*lora_embedding_A; merge it with"):
        from_hf(config, tensors, SHAPES, "base")


def test_an_adapter_of_a_deeper_model_or_on_a_tied_head_is_refused():
    tensors = random_adapter(config_with(), SHAPES, False)
    shallow = describe(ModelSizes("qwen3", 16, 24, 2, 4, 2, 4, 10, True))
    with pytest.raises(UserError, match="no linear of this qwen3 model .2 layers.: .* and 73 more"):
        from_hf(config_with(), tensors, shallow, "base")
    with pytest.raises(UserError, match="ties it to the input embeddings"):
        from_hf(config_with(target_modules=["lm_head"]), {}, shallow, "base")


def test_tensors_that_do_not_fit_the_spec_are_refused():
    module = build_layout("output_layer", 2, 3, SHAPES)
    spec = AdapterSpec("base", SHAPES, [module])
    with pytest.raises(UserError, match="missing output_layer.lora_B"):
        to_hf(spec, {"output_layer.lora_A": torch.zeros(2, 16)})
    with pytest.raises(UserError, match=r"output_layer.lora_B has shape \(12, 2\)"):
        to_hf(spec, {"output_layer.lora_A": torch.zeros(2, 16), "output_layer.lora_B": torch.zeros(12, 2)})
