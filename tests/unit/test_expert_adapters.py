"""Adapters on experts: PEFT's form for tensors of all experts in and out bit for bit, peft itself as the judge; which
linears patterns choose, and what is refused."""

import json
import re
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from megatron_lora.config.schema_adapters import LoraConfig as LoraSection
from megatron_lora.config.schema_adapters import PeftConfig
from megatron_lora.config.schema_policy import PolicyConfig
from megatron_lora.conversion.experts import expert_views
from megatron_lora.conversion.export import (
    export_lora_adapter_to_hf,
    import_hf_adapter,
    merge_lora_to_hf,
    write_peft_folder,
)
from megatron_lora.conversion.model_names import model_parameters
from megatron_lora.conversion.safetensors_io import read_header
from megatron_lora.errors import UserError
from megatron_lora.lora.describe import describe, describe_config, describe_json
from megatron_lora.lora.layout import AdapterSpec
from megatron_lora.lora.merge import merge_targets
from megatron_lora.lora.model_spec import ModelSizes
from megatron_lora.lora.peft_format import ExpertLayout, to_hf
from megatron_lora.lora.peft_reading import from_hf
from megatron_lora.lora.targets import select_linears
from megatron_lora.policy.adapter_start import describe_modules, starting_adapter
from megatron_lora.policy.expert_adapters import check_with_recipe
from megatron_lora.rollout.engines import _check_adapter
from megatron_lora.rollout.vllm_engine import hands_over_adapter, merge_only_reason
from tests.support.models import family_config, random_model, save_model

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "vocab_size": 40, "head_dim": 6}
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
CONFIGS: dict[str, dict[str, Any]] = {
    "both": dict(r=3, lora_alpha=6, target_modules=["q_proj", "o_proj"], target_parameters=EXPERTS),
    "down": dict(r=2, lora_alpha=6, target_modules=[], target_parameters=EXPERTS[1:], use_rslora=True),
    "gate_up_of_one_layer": dict(
        r=3, lora_alpha=6, target_modules=["v_proj"], target_parameters=["model.layers.1.mlp.experts.gate_up_proj"]
    ),
    "router": dict(r=3, lora_alpha=6, target_modules=["q_proj"], target_parameters=["mlp.gate.weight"]),
    "router_and_experts": dict(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj"],
        target_parameters=[*EXPERTS, "model.layers.1.mlp.gate.weight"],
        rank_pattern={"gate.weight": 2},
    ),
    "patterns": dict(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj"],
        target_parameters=EXPERTS,
        rank_pattern={"gate_up_proj": 2, r"layers\.1\.mlp\.experts\.down_proj": 3},
        alpha_pattern={"mlp.experts.down_proj": 5},
    ),
}
SHAPES = describe(
    ModelSizes(
        "qwen3_moe", 16, 24, 3, 4, 2, 4, 10, False, num_experts=4, num_experts_per_token=2, moe_ffn_hidden_size=6
    )
)
LAYOUTS: tuple[ExpertLayout, ...] = ("packed", "each")


def tiny_mixture() -> Any:
    return random_model(family_config("qwen3_moe", **SMALL))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.arange(12)[None]).logits


@pytest.fixture(scope="module", params=CONFIGS)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    """A random adapter that peft wrote, and the logits with it."""
    folder = tmp_path_factory.mktemp("peft")
    model = get_peft_model(tiny_mixture(), LoraConfig(task_type="CAUSAL_LM", **CONFIGS[request.param]))
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(str(folder))
    return folder, logits(model)


def read(folder: Path) -> tuple[AdapterSpec, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    spec, fused = from_hf(config, tensors, describe_config(tiny_mixture().config.to_dict()), "base")
    return AdapterSpec.from_json(json.loads(json.dumps(spec.to_json()))), fused, tensors


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pefts_own_adapters_on_experts_come_back_and_load(saved, layout, tmp_path, recwarn):
    folder, expected = saved
    spec, fused, tensors = read(folder)
    config, written = to_hf(spec, fused, experts=layout)
    if layout == "packed":
        assert_same(written, tensors)
    write_peft_folder(tmp_path / "out", config, written)
    on_experts = any(".experts." in name for name in written)
    assert read_header(tmp_path / "out" / "adapter_model.safetensors")[1].get("expert_layout") == (
        layout if on_experts else None
    )
    again, fused_again, _ = read(tmp_path / "out")
    assert again.modules == spec.modules
    assert_same(fused_again, fused)
    recwarn.clear()
    if (
        on_experts
        and layout == "each"
        and (len({module.kind for module in spec.modules}) < 4 or config["rank_pattern"])
    ):
        return  # peft reads the form of older models for whole experts alone, of one rank
    loaded = PeftModel.from_pretrained(tiny_mixture(), str(tmp_path / "out"))
    assert not [w for w in recwarn if re.search("missing|unexpected", str(w.message))]
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-5, atol=1e-5)


def test_merged_is_what_peft_computes(saved):
    folder, expected = saved
    spec, fused, _ = read(folder)
    model = tiny_mixture()
    modules, experts = dict(model.named_modules()), expert_views(model, spec.shapes)
    for name, target in merge_targets(spec).items():
        weight = experts[name] if name in experts else modules[name].weight.data
        weight += target.weight_update(fused).of_rows(weight)
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "targets", [["*.shared_experts.*"], ["linear_proj", "experts.linear_fc1", "experts.linear_fc2"]], ids=str
)
def test_a_notice_says_where_peft_misreads_the_files(targets, tmp_path):
    """The judge is peft: it takes shared experts' names for the routed ones'."""

    def base() -> Any:
        return random_model(family_config("glm4_moe"))

    shapes = describe_config(base().config.to_dict())
    start = starting_adapter(PeftConfig(target_modules=targets, dim=2), shapes, "base")
    torch.manual_seed(0)
    fused = {name: torch.randn(shape) * 0.2 for name, shape in start.spec.factor_shapes().items()}
    merged = base()
    modules, experts = dict(merged.named_modules()), expert_views(merged, shapes)
    for name, target in merge_targets(start.spec).items():
        weight = experts[name] if name in experts else modules[name].weight.data
        weight += target.weight_update(fused).of_rows(weight)
    write_peft_folder(tmp_path / "out", *to_hf(start.spec, fused, experts="packed"))
    difference = logits(PeftModel.from_pretrained(base(), str(tmp_path / "out"))) - logits(merged)
    misread = any("peft 0.21" in notice for notice in start.notices)
    assert misread == ("*.shared_experts.*" in targets), start.notices
    assert misread == bool(difference.abs().max() > 1e-3), difference.abs().max()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_adapter_for_all_experts_is_written_for_each_and_found_again(layout):
    config = PeftConfig(target_modules=["linear_fc1", "linear_fc2"], dim=2, share_expert_adapters=True)
    spec = starting_adapter(config, SHAPES, "base").spec
    assert [module.name for module in spec.modules[:2]] == [
        f"decoder.layers.0.mlp.experts.linear_fc{number}" for number in (1, 2)
    ]
    torch.manual_seed(0)
    fused = {name: torch.randn(shape) for name, shape in spec.factor_shapes().items()}
    written = to_hf(spec, fused, experts=layout)
    again, found = from_hf(*written, SHAPES, "base")
    assert again.modules == spec.modules
    assert_same(found, fused)
    own, copies = from_hf(*written, SHAPES, "base", share_experts=False)
    assert len(own.modules) == 3 * 2 * 4
    assert torch.equal(
        copies["decoder.layers.1.mlp.experts.linear_fc1.3.lora_A"], fused[spec.modules[2].name + ".lora_A"]
    )
    other = {name: value.clone() for name, value in written[1].items()}
    next(iter(other.values()))[0, 0] += 1
    assert len(from_hf(written[0], other, SHAPES, "base")[0].modules) > len(spec.modules)
    with pytest.raises(UserError, match="share_expert_adapters=false"):
        from_hf(written[0], other, SHAPES, "base", share_experts=True)


def test_what_the_weights_lack_is_named(saved):
    folder, _ = saved
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    key = next(name for name in tensors if ".experts." in name or ".gate." in name)
    shapes = describe_config(tiny_mixture().config.to_dict())
    with pytest.raises(UserError, match=re.escape(key)):
        from_hf(config, {name: value for name, value in tensors.items() if name != key}, shapes)
    with pytest.raises(UserError, match="has shape"):
        from_hf(config, tensors | {key: tensors[key][:-1]}, shapes)
    with pytest.raises(UserError, match="target_parameters mlp.norm.weight"):
        from_hf(config | {"target_parameters": [*config["target_parameters"], "mlp.norm.weight"]}, tensors, shapes)
    if "mlp.gate.weight" not in config["target_parameters"]:
        with pytest.raises(UserError, match=r"targets model.layers.0.mlp.gate, but the weights lack .*gate.lora_A"):
            from_hf(config | {"target_parameters": [*config["target_parameters"], "mlp.gate.weight"]}, tensors, shapes)
    each, pairs = to_hf(*from_hf(config, tensors, shapes))
    lost = next(name for name in pairs if ".experts.2." in name or ".gate.lora_B" in name)
    with pytest.raises(UserError, match=re.escape(lost)):
        from_hf(each, {name: value for name, value in pairs.items() if name != lost}, shapes)


def kinds(*targets: str, exclude: tuple[str, ...] = ()) -> set[str]:
    chosen = select_linears(SHAPES, targets, exclude, key="the.section", naming="megatron")
    return {f"{linear.kind}@{linear.layer}" for linear in chosen.linears}


def test_experts_are_adapted_where_they_are_named():
    every = range(3)
    attention = {f"linear_{end}@{layer}" for end in ("qkv", "proj") for layer in every}
    fc1, fc2 = ({f"experts.linear_{end}@{layer}" for layer in every} for end in ("fc1", "fc2"))
    assert kinds() == attention
    assert kinds("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2") == attention | fc1 | fc2
    for names in (("linear_fc1",), ("experts.linear_fc1",), ("gate_up_proj",), ("gate_proj", "up_proj")):
        assert kinds(*names) == fc1
    for names in (("down_proj",), ("mlp.experts.down_proj",), ("*.experts.linear_fc2",)):
        assert kinds(*names) == fc2
    assert kinds("*.layers.1.mlp.experts.*") == {"experts.linear_fc1@1", "experts.linear_fc2@1"}
    routers = {f"router@{layer}" for layer in every}
    for names in (("router",), ("gate",), ("mlp.router",), ("*.mlp.gate",)):
        assert kinds(*names) == routers
    assert kinds("*.layers.1.*") == {name for name in attention | fc1 | fc2 if name.endswith("@1")}
    assert kinds(exclude=("linear_proj", "*.experts.*")) == {f"linear_qkv@{layer}" for layer in every}


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["gate_proj"], "names 4 of the 8 linears that decoder.layers.0.mlp.experts.linear_fc1 is .*all of them"),
        (["model.layers.1.mlp.experts.2.down_proj"], "names 1 of the 4 linears"),
        (["linear_fc3"], "matches no linear of this model .*near names: .*linear_fc2"),
    ],
)
def test_parts_of_experts_are_refused(targets, message):
    with pytest.raises(UserError, match=message):
        select_linears(SHAPES, targets, [], key="the.section", naming="megatron")


@pytest.mark.parametrize("name", ["linear_fc1", "experts.linear_fc1", "gate_up_proj"])
def test_experts_of_one_tensor_are_named_alike(name):
    shapes = describe_config(family_config("gpt_oss", num_hidden_layers=2).to_dict())
    naming = "hf" if name == "gate_up_proj" else "megatron"
    found = select_linears(shapes, [name], [], key="a", naming=naming).linears
    assert {linear.kind for linear in found} == {"experts.linear_fc1"}
    assert len(found) == 2 * 4 * 2
    kept = select_linears(shapes, [], ["*.mlp.experts.*"], key="a", naming="megatron").linears
    assert {linear.kind for linear in kept} == {"linear_qkv", "linear_proj"}


def tiny_gpt_oss() -> Any:
    return random_model(family_config("gpt_oss", num_hidden_layers=2, intermediate_size=24))


@pytest.mark.parametrize("parameters", [EXPERTS, EXPERTS[:1], EXPERTS[1:]], ids=str)
def test_experts_of_one_tensor_go_there_and_back(parameters, tmp_path):
    """GPT-OSS: [experts, in, out], rows of gate and up alternate. peft is the judge of files, import and merge."""
    tiny_gpt_oss().save_pretrained(tmp_path / "base")
    settings = {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj"], "target_parameters": parameters}
    model = get_peft_model(tiny_gpt_oss(), LoraConfig(task_type="CAUSAL_LM", **settings))
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(str(tmp_path / "peft"))
    expected, without = logits(model), logits(tiny_gpt_oss())
    assert (expected - without).abs().max() > 0.1
    checkpoint, base = str(tmp_path / "checkpoint"), str(tmp_path / "base")
    import_hf_adapter(hf_adapter=str(tmp_path / "peft"), hf_model_name=base, adapter_ckpt_path=checkpoint)
    export_lora_adapter_to_hf(
        adapter_ckpt=checkpoint, hf_ckpt_path=str(tmp_path / "adapter"), hf_model_name=base, check_logits=True
    )
    wanted, found = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("peft", "adapter"))
    assert_same(found, wanted)
    loaded = PeftModel.from_pretrained(tiny_gpt_oss(), str(tmp_path / "adapter"))
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-5, atol=1e-5)
    merge_lora_to_hf(
        adapter_ckpt=checkpoint, hf_ckpt_path=str(tmp_path / "merged"), hf_model_name=base, check_logits=True
    )
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(UserError, match="expert_layout=each: the experts of a gpt_oss model"):
        export_lora_adapter_to_hf(adapter_ckpt=checkpoint, hf_ckpt_path=str(tmp_path / "each"), expert_layout="each")


def started(**changes: Any) -> AdapterSpec:
    return starting_adapter(PeftConfig(target_modules=["linear_qkv", "linear_fc1"], **changes), SHAPES, "base").spec


def test_ranks_of_experts_are_divided_by_those_of_a_token():
    ranks = {module.kind: module.rank for module in started(dim=6, normalize_moe_lora=True).modules}
    assert ranks == {"linear_qkv": 6, "experts.linear_fc1": 3}
    scales = {
        module.kind: module.blocks[0].scale for module in started(dim=6, alpha=12, normalize_moe_lora=True).modules
    }
    assert scales == {"linear_qkv": 2.0, "experts.linear_fc1": 4.0}
    with pytest.raises(UserError, match="dim=7 among the 2 experts .*such as 8"):
        started(dim=7, normalize_moe_lora=True)


def test_what_a_run_adapts_is_told_in_one_row_a_kind():
    rows = describe_modules(started(dim=2))
    assert [row[:3] for row in rows] == [("linear_qkv", "0-2", "2"), ("experts.linear_fc1 (each of 4)", "0-2", "2")]
    # A [2, 16], B [12, 2] of 4 experts in 3 layers.
    assert rows[1][-1] == f"{(2 * 16 + 12 * 2) * 12:,}"
    assert describe_modules(started(dim=2, share_expert_adapters=True))[1][0] == "experts.linear_fc1 (one for 4)"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"type": "dora"}, "type='dora': adapters on the experts of a qwen3_moe model are of type 'lora'"),
        ({"type": "canonical_lora"}, "type='canonical_lora'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights=pissa"),
        ({"rank_pattern": {"*.experts.2.*": 4}}, "have adapters of different rank or alpha"),
    ],
)
def test_other_kinds_on_experts_are_refused_by_name(changes, message):
    with pytest.raises(UserError, match=message):
        started(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"type": "dora"}, "type='dora': adapters on the router of a qwen3_moe model are of type 'lora'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights=pissa"),
        ({"dropout": 0.1}, "dropout=0.1: an adapter on a router has none"),
    ],
)
def test_other_kinds_on_a_router_are_refused_by_name(changes, message):
    with pytest.raises(UserError, match=message):
        starting_adapter(PeftConfig(target_modules=["linear_qkv", "router"], **changes), SHAPES, "base")


def test_an_adapted_router_is_not_to_be_frozen():
    for value in (True, None, False):
        peft = {"enabled": True, "target_modules": ["router"]}
        policy = PolicyConfig.model_validate(
            {"model_name": "base", "megatron_cfg": {"enabled": True, "freeze_moe_router": value, "peft": peft}}
        )
        spec = starting_adapter(policy.adapter, SHAPES, "base").spec
        if value:
            with pytest.raises(UserError, match="freeze_moe_router=true, and the adapter is on the router"):
                check_with_recipe(policy, spec)
        else:
            check_with_recipe(policy, spec)


def test_a_description_of_an_older_release_has_its_router_among_the_linears():
    content = json.loads(json.dumps(asdict(SHAPES)))
    [router] = [linear for linear in content["linears"] if linear["kind"] == "router"]
    content["linears"].remove(router)
    content["others"].append({"name": "decoder.layers.*.mlp.router.weight", "hf_name": "model.layers.*.mlp.gate.weight",
                              "shape": [4, 16], "layers": None, "tp_axis": None})  # fmt: skip
    read_again = describe_json(content)
    assert read_again == SHAPES and read_again.others == SHAPES.others
    names = [parameter.name for parameter in model_parameters(read_again)]
    assert names.count("decoder.layers.0.mlp.router.weight") == 1 and len(names) == len(set(names))


def test_what_the_other_backend_or_a_layout_lacks_is_refused():
    with pytest.raises(UserError, match="the router of a qwen3_moe model are trained by the Megatron backend alone"):
        starting_adapter(LoraSection(target_modules=["gate"], match_all_linear=False), SHAPES, "base")
    with pytest.raises(UserError, match="trained by the Megatron backend alone"):
        starting_adapter(LoraSection(target_modules=["down_proj"], match_all_linear=False), SHAPES, "base")
    peft = {"enabled": True, "target_modules": ["linear_fc1"], "dropout": 0.1}
    policy = PolicyConfig.model_validate(
        {"model_name": "base", "megatron_cfg": {"enabled": True, "expert_tensor_parallel_size": 2, "peft": peft}}
    )
    with pytest.raises(UserError, match=r"dropout=0.1 .* expert_tensor_parallel_size=2"):
        check_with_recipe(policy, started())


@pytest.mark.parametrize("targets", [["linear_qkv", "linear_fc2"], ["router"]])
def test_an_engine_is_given_what_is_on_experts_and_routers_merged(targets, tmp_path):
    base = save_model(tmp_path / "base", "qwen3_moe")

    def policy(*names: str, refit: str) -> PolicyConfig:
        peft = {"enabled": True, "target_modules": list(names)}
        keys = {"megatron_cfg": {"enabled": True, "peft": peft}, "generation": {"refit": refit}}
        return PolicyConfig.model_validate({"model_name": str(base), "precision": "float32", **keys})

    world: Any = SimpleNamespace(device=torch.device("cpu"))
    assert not hands_over_adapter(policy(*targets, refit="auto"), world)
    assert "on experts and routers are handed over merged" in str(
        merge_only_reason(policy(*targets, refit="auto"), world)
    )
    with pytest.raises(UserError, match="refit=adapter, but adapters on experts and routers .*set it to merge"):
        hands_over_adapter(policy(*targets, refit="adapter"), world)
    assert hands_over_adapter(policy("linear_qkv", refit="adapter"), world)


def test_vllm_is_no_engine_for_adapters_on_experts_of_one_tensor(tmp_path):
    base = save_model(tmp_path / "base", "gpt_oss")

    def policy(*names: str) -> PolicyConfig:
        peft = {"enabled": True, "target_modules": list(names)}
        return PolicyConfig.model_validate({"model_name": str(base), "megatron_cfg": {"enabled": True, "peft": peft}})

    _check_adapter(policy("linear_qkv", "router"))
    with pytest.raises(UserError, match="the experts of a gpt_oss model, .*set policy.generation.backend=megatron"):
        _check_adapter(policy("linear_qkv", "linear_fc2"))
