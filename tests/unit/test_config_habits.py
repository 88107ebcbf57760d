"""What people type who come from Hydra, peft, TRL, verl or ms-swift: understood, or answered with the key to write."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_lora.config import load_recipe
from megatron_lora.config.other_names import _NAMES, key_here
from megatron_lora.config.schema import Recipe
from megatron_lora.config.schema_tree import walk_fields
from megatron_lora.config.yaml_reader import read_yaml
from megatron_lora.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
PPO = ROOT / "recipes/ppo-quickstart-megatron.yaml"
SFT, DPO, GRPO = (ROOT / f"configs/{name}.yaml" for name in ("sft", "dpo", "grpo"))
PEFT = "policy.megatron_cfg.peft"


def message(path: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as error:
        load_recipe(path, overrides)
    return str(error.value)


def test_hydras_plus_signs_and_tilde():
    recipe = load_recipe(
        SFT, [f"++{PEFT}.dim=4", f"+{PEFT}.alpha=8", f"~{PEFT}.dropout", "~sft.val_at_end=true", "~sft.seed"]
    ).recipe
    assert (recipe.policy.megatron_cfg.peft.dim, recipe.policy.megatron_cfg.peft.alpha) == (4, 8)
    assert recipe.sft is not None and recipe.sft.val_at_end is False  # the default again
    assert recipe.policy.dtensor_cfg.lora_cfg.dropout == 0.0  # which refers to the other


@pytest.mark.parametrize(
    ("override", "wanted"),
    [
        ("~sft.no_such_key", "the recipe has no key sft.no_such_key to take out"),
        ("~sft.sead", "to take out; did you mean ~sft.seed?"),
        ("~sft.seed=1", "the recipe has sft.seed=42"),  # by default
        ("~sft.val_at_end=false", "the recipe has sft.val_at_end=true"),
        ("+sft.sead=1", "did you mean sft.seed?"),
        ("+++sft.seed=1", "wanted dotted.key=value"),
        ("~", "no key (none given)"),
    ],
)
def test_hydras_forms_gone_wrong(override: str, wanted: str):
    assert wanted in message(SFT, override)


def test_a_number_leads_into_a_list():
    rewards = ["env.reward_functions=[{kind: exact}, {kind: math}]", "env.reward_functions.1.weight=0.5"]
    assert [item.weight for item in load_recipe(GRPO, rewards).recipe.env.reward_functions] == [1.0, 0.5]
    assert "2 is no place in a list of 2" in message(GRPO, rewards[0], "env.reward_functions.2.weight=1")
    assert "there is no list with entries to change" in message(SFT, "policy.scheduler.0.name=x")  # null there
    schedulers = ["policy.optimizer={}", "policy.scheduler=[{name: a.B}]", "policy.scheduler.0.nam=x"]
    assert "unknown key policy.scheduler.0.nam; did you mean policy.scheduler.0.name?" in message(SFT, *schedulers)


def test_a_mapping_without_the_space():
    recipe = load_recipe(GRPO, ["env.reward_functions=[{kind:exact,weight:2},{kind:format,pattern:'a:b'}]"]).recipe
    first, second = recipe.env.reward_functions
    assert (first.kind, first.weight, second.kind, second.pattern) == ("exact", 2.0, "format", "a:b")


@pytest.mark.parametrize("value", ["all-linear", "[all-linear]", "null", "[]"])
def test_all_linear_is_every_linear(value: str):
    recipe = load_recipe(SFT, [f"{PEFT}.target_modules={value}"]).recipe
    assert recipe.policy.megatron_cfg.peft.target_modules == recipe.policy.dtensor_cfg.lora_cfg.target_modules == []


def test_targets_that_are_no_list():
    assert "wanted a list: [q_proj, v_proj]" in message(SFT, f"{PEFT}.target_modules='q_proj,v_proj'")
    assert "leave out the rest" in message(SFT, f"{PEFT}.target_modules=[all-linear, lm_head]")


def test_a_star_stands_in_quotes():
    assert "a text that begins with * stands in quotes: '*_proj'" in message(SFT, f"{PEFT}.target_modules=[*_proj]")
    assert "stands in quotes" in message(SFT, f"{PEFT}.target_modules=*")
    assert "wanted a list: ['*_proj', q_proj]" in message(SFT, f"{PEFT}.target_modules='*_proj,q_proj'")


@pytest.mark.parametrize(
    ("override", "wanted"),
    [
        ("policy.generation.colocated=false", "did you mean policy.generation.colocated.enabled=false?"),
        ("policy.sequence_packing=true", "did you mean policy.sequence_packing.enabled=true?"),
        ("logger.mlflow=true", "did you mean logger.mlflow_enabled=true?"),
        ("logger.wandb.enabled=true", "unknown key logger.wandb.enabled; did you mean logger.wandb_enabled?"),
        ("data.train=rows.jsonl", "data.train='rows.jsonl': did you mean data.train.data_path=rows.jsonl?"),
        ("checkpointing=out", "did you mean checkpointing.checkpoint_dir=out?"),
        ("logger=wandb", "logger='wandb': wanted a section"),
        ("policy.model_name=no", "policy.model_name=false: wanted text; a text that reads as another value stands in"),
        ("policy.tokenizer=true", "policy.tokenizer=true: wanted a section"),
    ],
)
def test_a_section_that_is_turned_on_or_off(override: str, wanted: str):
    assert wanted in message(GRPO, override)


def test_a_mistake_is_told_once_at_the_key_where_it_stands():
    """The base recipe hands these keys to policy.dtensor_cfg as well."""
    for override in (f"{PEFT}.target_modules=q_proj", f"{PEFT}.dim=x", f"{PEFT}.target_modules=[1]"):
        text = message(SFT, override)
        assert text.count("wanted") == 1 and text.startswith(f"{PEFT}.") and "dtensor_cfg" not in text, text
    assert "dtensor_cfg.lora_cfg.dim='x': " in message(SFT, "policy.dtensor_cfg.lora_cfg.dim=x")


def test_a_bad_value_behind_an_interpolation_says_where_it_comes_from():
    text = message(SFT, "policy.megatron_cfg.tensor_model_parallel_size='${policy.precision}'")
    assert "tensor_model_parallel_size='bfloat16' (from policy.precision): wanted an integer" in text


@pytest.mark.parametrize(
    ("path", "override", "wanted"),
    [
        (SFT, "lora_rank=8", f"did you mean {PEFT}.dim?"),
        (SFT, "r=8", f"did you mean {PEFT}.dim?"),
        (SFT, "policy.lora_alpha=8", f"did you mean {PEFT}.alpha?"),
        (SFT, "learning_rate=1e-4", "did you mean policy.megatron_cfg.optimizer.lr?"),
        (SFT, "policy.learning_rate=1e-4", "did you mean policy.megatron_cfg.optimizer.lr?"),
        (SFT, "policy.lr=1e-4", "did you mean policy.megatron_cfg.optimizer.lr?"),
        (SFT, "policy.seed=1", "did you mean sft.seed?"),
        (DPO, "policy.seed=1", "did you mean dpo.seed?"),
        (GRPO, "seed=1", "did you mean grpo.seed?"),
        (DPO, "beta=0.1", "did you mean dpo.reference_policy_kl_penalty?"),
        (GRPO, "loss_fn.beta=0.1", "did you mean loss_fn.reference_policy_kl_penalty?"),
        (GRPO, "num_generations=8", "did you mean grpo.num_generations_per_prompt?"),
        (SFT, "output_dir=x", "did you mean checkpointing.checkpoint_dir?"),
        (SFT, "policy.megatron_cfg.tensor_parallel_size=2", "megatron_cfg.tensor_model_parallel_size?"),
        (SFT, "actor_rollout_ref.model={path: x, lora_rank: 8}", f"model.lora_rank; did you mean {PEFT}.dim?"),
        (SFT, "load_in_4bit=true", f"did you mean {PEFT}.quantization?"),
        (GRPO, "algorithm.adv_estimator=rloo", "key algorithm.adv_estimator; did you mean grpo.adv_estimator.name?"),
        (SFT, "push_to_hub=true", "unknown key push_to_hub: a finished run is uploaded by `megatron-lora export"),
        (SFT, "checkpointing.push_to_hub=true", "push_to_hub: a finished run is uploaded by `megatron-lora export"),
        (
            SFT,
            "report_to=mlflow",
            "each tracker has a key of its own: logger.wandb_enabled, tensorboard_enabled",
        ),
        (PPO, "critic.model_name=x", "unknown key critic.model_name: the critic is a second adapter and a value head"),
        (PPO, "critic={optim: {lr: 1.0e-4}, model: {path: x}}", "critic.model.path: the critic is a second adapter"),
        (SFT, "optim=adamw_torch", "did you mean policy.megatron_cfg.optimizer?"),
        (SFT, f"{PEFT}.betas=[0.9, 0.95]", "there are two keys: policy.megatron_cfg.optimizer.adam_beta1 and"),
        (DPO, "ref_model=x", "unknown key ref_model: the reference is what the run starts from"),
        (SFT, "use_shm=true", "did you mean policy.preload_to_shm?"),
        (SFT, "hub_private_repo=true", "a finished run is uploaded by `megatron-lora export"),
    ],
)
def test_other_projects_names(path: Path, override: str, wanted: str):
    assert wanted in message(path, override)


def test_a_dtensor_recipe_is_answered_with_dtensors_keys():
    assert "did you mean policy.dtensor_cfg.lora_cfg.dim?" in message(
        SFT, "policy.megatron_cfg.enabled=false", "lora_rank=8"
    )


@pytest.mark.parametrize("algorithm", ["sft", "dpo", "grpo"])
@pytest.mark.parametrize("enabled", [True, False])
def test_every_suggested_key_exists(algorithm: str, enabled: bool):
    known = {path for path, _ in walk_fields(Recipe)}
    recipe: dict[str, Any] = {algorithm: {}, "policy": {"megatron_cfg": {"enabled": enabled}}}
    answers = [key_here(name, recipe) for name in _NAMES]
    assert {answer for answer in answers if answer} <= known and len([answer for answer in answers if answer]) > 70


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("010", 10),
        ("0o10", 8),
        ("0x1f", 31),
        ("-0b11", -3),
        ("1_000", 1000),
        ("1:30", "1:30"),
        ("1:30.5", "1:30.5"),
        ("2024-01-01", "2024-01-01"),
        ("1e-5", 1e-5),
        ("-1.5E+3", -1500.0),
        ("5.", 5.0),
        (".5", 0.5),
        ("-.inf", float("-inf")),
        ("=", "="),
        ("null", None),
        ("", None),
        ("~", None),
        ("yes", True),
        ("Off", False),
        ("1.2.3", "1.2.3"),
        ("1e", "1e"),
        ("'010'", "010"),
        ("{a:1, b: 2}", {"a": 1, "b": 2}),
        ("{'a:1'}", {"a:1": None}),
        ("{http://x: 1}", {"http://x": 1}),
    ],
)
def test_yaml_scalars(text: str, value: Any):
    found = read_yaml(text, "here")
    assert found == value and type(found) is type(value)


def test_merge_keys(tmp_path: Path):
    text = """
sft: {}
policy: {model_name: m}
data:
  train: &rows {data_path: a.jsonl, input_key: q, output_key: a}
  validation:
    <<: *rows
    data_path: b.jsonl
"""
    (tmp_path / "r.yaml").write_text(text)
    validation = load_recipe(tmp_path / "r.yaml").recipe.data.validation
    assert validation is not None and (validation.data_path, validation.input_key) == ("b.jsonl", "q")
    (tmp_path / "r.yaml").write_text(text + "    data_path: c.jsonl\n")
    assert "the key data_path stands twice" in message(tmp_path / "r.yaml")


def test_a_section_set_to_null_that_others_refer_to():
    text = message(SFT, "policy.megatron_cfg.peft=null")
    assert "policy.megatron_cfg.peft is null, but policy.dtensor_cfg.lora_cfg.enabled is ${policy.megatron_cfg" in text


@pytest.mark.parametrize(
    ("override", "wanted"),
    [
        ("policy.megatron_cfg=true", "policy.megatron_cfg is true, but policy.dtensor_cfg.tensor_parallel_size is"),
        ("policy.model_name=${policy.modl_name}", "no key policy.modl_name; did you mean ${policy.model_name}?"),
        ("data.train.seed=${grpo.seed}", "the recipe has no key grpo.seed; give it"),
        ("policy.model_name=${nothing.at_all}", "the recipe has no key nothing.at_all; give it"),
        ("policy.model_name=${", "not an interpolation"),
        ("policy.model_name=${foo:3}", "${foo:...} is not known; known are add, mul, div, max"),
        ("sft.seed=${mul:a,2}", "${mul:...} takes numbers, and has 'a', 2"),
        ("sft.seed=${div:1,0}", "${div:1,0} divides by 0"),
    ],
)
def test_interpolations_gone_wrong(override: str, wanted: str):
    assert wanted in message(SFT, override) and "raised while" not in message(SFT, override)


def test_an_interpolation_reaches_a_key_that_is_at_its_default():
    recipe = load_recipe(SFT, ["data.train.seed=${sft.seed}", "sft.max_num_steps=${timeouts.training_seconds}"]).recipe
    assert (recipe.data.train.seed, recipe.section.max_num_steps) == (42, 300)
    assert load_recipe(SFT, ["data.train.seed=${sft.seed}", "sft.seed=7"]).recipe.data.train.seed == 7


@pytest.mark.parametrize(
    ("override", "wanted"),
    [
        ("env.reward_functions=exact", "wanted a list: [{kind: exact}]"),
        ("env.reward_functions=[exact]", "env.reward_functions.0='exact': wanted a section"),
        ("env.reward_functions=[exact]", ": {kind: exact}"),
        ("env.reward_functions={kind: exact}", "wanted a list: [{kind: 'exact'}]"),
    ],
)
def test_an_entry_that_stands_for_itself_is_shown_as_one(override: str, wanted: str):
    assert wanted in message(GRPO, override)


@pytest.mark.parametrize("seed", ["-1", "4294967296"])
def test_a_seed_that_a_generator_would_refuse(seed: str):
    assert f"sft.seed={seed}: wanted a number " in message(SFT, f"sft.seed={seed}")


def test_starting_values_that_are_not_there():
    assert "'olora': wanted pissa, pissa_niter_N" in message(SFT, f"{PEFT}.init_lora_weights=olora")


def test_two_algorithms_are_told_before_a_key_of_one_of_them():
    assert "the recipe has the sections sft and dpo; keep one" in message(SFT, "dpo.beta=0.1")


@pytest.mark.parametrize(
    "name", ["configs/sft", "configs/sftt.yaml", "configs/stf.yaml", "config/sft.yaml", "sft.yaml"]
)
def test_a_recipe_that_is_not_there_is_answered_with_one_that_is(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(SFT.parents[1])
    assert "; did you mean configs/sft.yaml?" in message(Path(name))


def test_nemo_rls_markers(tmp_path: Path):
    base = {"sft": {"seed": 1, "max_num_steps": 2}, "policy": {"model_name": "m"}, "data": {"train": "???"}}
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))
    child = tmp_path / "child.yaml"
    child.write_text(yaml.safe_dump({"defaults": "base.yaml", "sft": {"_override_": True, "seed": 3}}))
    assert "data.train is ??? and has to be set" in message(child)
    sft = load_recipe(child, ["data.train={data_path: x}"]).recipe.sft
    assert sft is not None and (sft.seed, sft.max_num_steps) == (3, 60)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("", "is empty; wanted sections such as policy: and data:"),
        ("# sft\n", "is empty"),
        ("- sft: {}\n", "wanted sections such as policy: and data:"),
        ("sft:\n\tseed: 1\n", "line 2 is not YAML: found character '\\t' that cannot start any token; indent with"),
        ("sft: {seed: ${mul:4,8}}\n", "line 1 is not YAML: ${...} between { and } stands in quotes"),
        ("sft:\n  seed: 1\n   val_period: 2\n", "line 3 is not YAML: mapping values are not allowed here: mend the"),
        ("sft: *other\n", "line 1 is not YAML: no &other stands above *other in this file (anchors do not reach over"),
        ("sft: {}\n---\ndpo: {}\n", "line 2 begins a second document (---); keep one of them"),
        (
            "sft: {}\nsft.seed: 3\n",
            "the key 'sft.seed' has dots in its name, which only overrides take; in a file write",
        ),
        ("sft: {}\npolicy: {megatron_cfg.peft.dim: 3}\n", "in a file write megatron_cfg: {peft: {dim: 3}}"),
        ("sft: {}\nsft: {seed: 1}\n", "the key sft stands twice"),
        ("sft: {}\npolicy: {on: 1}\n", "line 2 is not YAML: the key true is no text; put it in quotes"),
        ("sft: {}\npolicy: {null: 1}\n", "the key null is no text"),
        ("sft: {}\n1: 2\n", "has the key 1; wanted sections"),
        ("sft: {}\npolicy: {1: 2}\n", "unknown key policy.1; "),
    ],
)
def test_files_gone_wrong(text: str, wanted: str, tmp_path: Path):
    (tmp_path / "r.yaml").write_text(text)
    assert wanted in message(tmp_path / "r.yaml")


@pytest.mark.parametrize("head, between", [("\ufeff", "\n"), ("", "\r\n")], ids=["byte order mark", "CRLF"])
def test_files_of_other_editors(head: str, between: str, tmp_path: Path):
    lines = ["sft: {seed: 3}", "policy: {model_name: m}", "data:", "  train: {data_path: a.jsonl}", ""]
    (tmp_path / "r.yaml").write_bytes((head + between.join(lines)).encode())
    assert load_recipe(tmp_path / "r.yaml").recipe.seed == 3
