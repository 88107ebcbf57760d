"""Recipes as files: defaults, interpolation, overrides, and one message for each mistake."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megatron_lora.config import dump_recipe, load_recipe
from megatron_lora.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
NEMO_RL = ROOT / "tests/fixtures/nemo_rl/examples/configs"
OWN_RECIPES = sorted([*(ROOT / "recipes").glob("**/*.yaml"), *(ROOT / "configs").glob("[!c]*.yaml")])
NEMO_RL_RECIPES = sorted(NEMO_RL.glob("**/*.yaml"))

MINIMAL = {"sft": {}, "policy": {"model_name": "m"}, "data": {"train": {"data_path": "rows.jsonl"}}}


def write(folder: Path, content: dict | str, name: str = "recipe.yaml") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return path


@pytest.fixture
def minimal(tmp_path: Path) -> Path:
    return write(tmp_path, MINIMAL)


def message(path: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as error:
        load_recipe(path, overrides)
    return str(error.value)


def name_of(path: Path) -> str:
    return path.name


@pytest.mark.parametrize("path", OWN_RECIPES, ids=name_of)
def test_own_recipes_load_without_a_notice(path: Path):
    assert load_recipe(path).notices == []


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("**/*.yaml")), ids=name_of)
def test_own_recipes_say_how_to_launch_them_and_mean_the_same_on_both_backends(path: Path):
    assert f"-m megatron_lora.train recipes/{path.name}" in path.read_text().replace("\\\n#     ", "")
    policy = load_recipe(path, ["policy.megatron_cfg.enabled=false"]).recipe.policy
    assert policy.backend == "dtensor"
    assert (policy.adapter.enabled, policy.adapter.dim) == (True, policy.megatron_cfg.peft.dim)
    assert policy.dtensor_cfg.tensor_parallel_size == policy.megatron_cfg.tensor_model_parallel_size


@pytest.mark.parametrize("path", NEMO_RL_RECIPES, ids=name_of)
def test_nemo_rl_recipes_load_with_one_notice(path: Path):
    loaded = load_recipe(path)
    assert len(loaded.notices) == 1 and "\n" not in loaded.notices[0]
    assert "cluster.{gpus_per_node" in loaded.notices[0]


def test_there_are_nemo_rl_recipes_to_load():
    assert len(NEMO_RL_RECIPES) == 11


def test_values_of_a_nemo_rl_lora_recipe_arrive():
    recipe = load_recipe(NEMO_RL / "recipes/llm/sft-llama3.1-8b-1n8g-megatron-lora.yaml").recipe
    megatron = recipe.policy.megatron_cfg
    assert recipe.algorithm == "sft" and recipe.policy.backend == "megatron"
    assert (megatron.peft.enabled, megatron.peft.dim, megatron.peft.alpha) == (True, 128, 128)
    assert megatron.peft.lora_dtype is None  # written as a bare None
    assert (megatron.optimizer.lr, megatron.optimizer.adam_eps, megatron.optimizer.clip_grad) == (2e-5, 1e-8, 1.0)
    assert recipe.policy.sequence_packing.train_mb_tokens == 4096  # ${mul:...} of two overridden keys
    assert recipe.policy.tokenizer.chat_template == "default"
    assert recipe.data.validation is None and recipe.data.train.seed == 42
    assert recipe.checkpointing.metric == ("validation", "loss")


def test_a_template_with_jinja_and_dollar_braces_survives_loading_and_dumping(tmp_path: Path):
    template = "{% for m in messages %}${{ m['content'] }}${x}{% endfor %}"
    content = {**MINIMAL, "policy": {"model_name": "m", "tokenizer": {"chat_template": template}}}
    recipe = load_recipe(write(tmp_path, content)).recipe
    assert recipe.policy.tokenizer.chat_template == template
    again = load_recipe(write(tmp_path, dump_recipe(recipe), "again.yaml")).recipe
    assert again == recipe


@pytest.mark.parametrize("path", [*OWN_RECIPES, *NEMO_RL_RECIPES], ids=name_of)
def test_a_dumped_recipe_loads_again_to_the_same(path: Path, tmp_path: Path):
    recipe = load_recipe(path).recipe
    loaded = load_recipe(write(tmp_path, dump_recipe(recipe)))
    assert loaded.recipe == recipe and loaded.notices == []


def test_defaults_are_merged_in_order_relative_to_the_file(tmp_path: Path):
    write(tmp_path, {**MINIMAL, "sft": {"seed": 1, "max_num_steps": 1, "val_period": 1}}, "bases/first.yaml")
    write(tmp_path, {"sft": {"seed": 2, "max_num_steps": 2}}, "bases/second.yaml")
    path = write(
        tmp_path, {"defaults": ["../bases/first.yaml", "../bases/second.yaml"], "sft": {"seed": 3}}, "runs/run.yaml"
    )
    sft = load_recipe(path).recipe.sft
    assert sft is not None and (sft.seed, sft.max_num_steps, sft.val_period) == (3, 2, 1)


def test_interpolations_see_overrides(tmp_path: Path):
    content = {
        "dpo": {"preference_average_log_probs": False, "sft_average_log_probs": "${.preference_average_log_probs}"},
        "policy": {
            "model_name": "m",
            "max_total_sequence_length": 8,
            "train_micro_batch_size": 2,
            "dynamic_batching": {
                "train_mb_tokens": "${mul:${policy.max_total_sequence_length}, ${policy.train_micro_batch_size}}"
            },
        },
        "data": {"train": {"data_path": "${policy.model_name}.jsonl"}},
    }
    overrides = ["policy.max_total_sequence_length=16", "dpo.preference_average_log_probs=true"]
    recipe = load_recipe(write(tmp_path, content), overrides).recipe
    assert recipe.policy.dynamic_batching.train_mb_tokens == 32
    assert recipe.dpo is not None and recipe.dpo.sft_average_log_probs is True
    assert recipe.data.train.data_path == "m.jsonl"


def test_overrides_take_yaml_values(minimal: Path):
    recipe = load_recipe(
        minimal,
        [
            "policy.megatron_cfg.optimizer.lr=1e-4",
            "policy.megatron_cfg.peft.target_modules=[linear_qkv, '*.layers.1.*']",
            "policy.megatron_cfg.peft.lora_dtype=torch.float32",
            "data.validation={data_path: more.jsonl}",
            "policy.optimizer={name: torch.optim.AdamW, kwargs: {lr: 1e-3, betas: [0.9, '1e-1']}}",
            "checkpointing.metric_name=null",
        ],
    ).recipe
    assert recipe.policy.megatron_cfg.optimizer.lr == 1e-4
    assert recipe.policy.megatron_cfg.peft.target_modules == ["linear_qkv", "*.layers.1.*"]
    assert recipe.policy.megatron_cfg.peft.lora_dtype == "float32"
    assert recipe.data.validation is not None and recipe.data.validation.data_path == "more.jsonl"
    assert recipe.policy.optimizer is not None and recipe.policy.optimizer.kwargs["betas"] == [0.9, 0.1]
    assert recipe.checkpointing.metric is None


@pytest.mark.parametrize(
    ("override", "wanted"),
    [
        ("policy.megatron_cfg.peft.dmi=4", "did you mean policy.megatron_cfg.peft.dim?"),
        ("policy.peft.dim=4", "did you mean policy.megatron_cfg.peft?"),
        ("policy.lora_cfg.dim=4", "did you mean policy.dtensor_cfg.lora_cfg?"),
        ("policy.megatron_cfg.peft.rank=4", "did you mean policy.megatron_cfg.peft.dim?"),
        ("policy.megatron_cfg.peft.lora_alpha=4", "did you mean policy.megatron_cfg.peft.alpha?"),
        ("quux=1", "unknown key quux; the recipe has the keys async_rl, checkpointing, "),
        ("data.train=[x]", "data.train=['x']: wanted a section"),
        ("polcy.precision=float32", "did you mean policy?"),
        ("policy.generation.vllm_cfg.use_tqmd=true", "did you mean policy.generation.vllm_cfg.use_tqdm?"),
        ("grpo.async_grpo.enabld=false", "the recipe has the sections sft and grpo; keep one"),
        ("policy.megatron_cfg.peft.dim=eight", "policy.megatron_cfg.peft.dim='eight': wanted an integer"),
        ("policy.megatron_cfg.peft.dim=true", "policy.megatron_cfg.peft.dim=true: wanted an integer"),
        ("policy.megatron_cfg.peft.dim=0", "policy.megatron_cfg.peft.dim=0: wanted a number at least 1"),
        ("policy.megatron_cfg.peft.dropout=1.0", "policy.megatron_cfg.peft.dropout=1.0: wanted a number below 1"),
        ("policy.megatron_cfg.peft.dropout=-0.1", "dropout=-0.1: wanted a number at least 0"),
        ("policy.megatron_cfg.peft.alpha=0", "policy.megatron_cfg.peft.alpha=0: wanted a number above 0"),
        ("policy.megatron_cfg.peft.dropout_position=mid", "dropout_position='mid': wanted 'pre' or 'post'"),
        ("policy.megatron_cfg.peft.lora_dtype=fp9", "lora_dtype='fp9': wanted null or one of float32, bfloat16"),
        ("policy.megatron_cfg.peft=none", "policy.megatron_cfg.peft='none': wanted a section"),
        ("policy.model_name=7", "policy.model_name=7: wanted text"),
        ("policy.megatron_cfg.enabled=maybe", "policy.megatron_cfg.enabled='maybe': wanted true or false"),
        ("policy.megatron_cfg.optimizer.lr=.nan", "optimizer.lr=nan: wanted"),
        ("policy.train_micro_batch_size=64", "train_micro_batch_size=64 is above train_global_batch_size=32"),
        ("policy.megatron_cfg.optimizer.min_lr=1", "min_lr=1.0 is above lr="),
        ("data.train.data_path=null", "train names no rows"),
        ("policy.model_name='${policy.nmae}'", "policy.nmae"),
        ("grpo={}", "the sections sft and grpo; keep one"),
        ("sft=null", "none of the sections sft, dpo, grpo"),
        ("checkpointing.metric_name=loss", "wanted `val:NAME` or `train:NAME`"),
        ("justakey", "wanted dotted.key=value"),
        ("a..b=1", "wanted dotted.key=value"),
        ("sft.seed=[1", "is not YAML"),
    ],
)
def test_mistakes_in_overrides(minimal: Path, override: str, wanted: str):
    assert wanted in message(minimal, override)


def test_exclusions_need_empty_targets(minimal: Path):
    section = "policy.megatron_cfg.peft"
    text = message(minimal, f"{section}.target_modules=[linear_qkv]", f"{section}.exclude_modules=[linear_fc1]")
    assert text.startswith(f"{section}: exclude_modules=['linear_fc1'] needs empty target_modules")


def test_several_mistakes_are_told_at_once(minimal: Path):
    text = message(minimal, "sft.seed=x", "policy.precision=int3")
    assert "sft.seed='x'" in text and "policy.precision='int3'" in text


def test_a_milestone_list_that_does_not_fit_is_refused(minimal: Path):
    overrides = ["policy.optimizer={}", "policy.scheduler=[{name: a.B}, {name: a.C}, {milestones: [5, 6]}]"]
    assert "2 schedulers and milestones [5, 6]; wanted 1" in message(minimal, *overrides)


def test_one_generation_has_no_leave_one_out_baseline():
    text = message(ROOT / "configs/grpo.yaml", "grpo.num_generations_per_prompt=1")
    assert "grpo: num_generations_per_prompt=1 leaves no other answer" in text


def test_a_global_batch_has_to_divide_the_rollout():
    assert "does not divide the 256 samples" in message(
        ROOT / "configs/grpo.yaml", "policy.train_global_batch_size=100"
    )
    assert load_recipe(ROOT / "configs/grpo.yaml", ["policy.train_global_batch_size=64"]).recipe.grpo is not None


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("a: [1", "line 1 is not YAML"),
        ("sft: {}\nsft: {}\n", "the key sft stands twice"),
        ("just text", "wanted sections"),
        ("", "wanted sections"),
        ("1: 2", "wanted sections"),
        ("defaults: {a: 1}", "wanted a recipe's path or a list"),
        ("defaults: missing.yaml", "there is no recipe"),
        ("defaults: recipe.yaml", "go round in a circle"),
        ("sft: {}", "lacks policy"),
    ],
)
def test_malformed_files(tmp_path: Path, text: str, wanted: str):
    assert wanted in message(write(tmp_path, text))


def test_a_missing_file_and_a_folder(tmp_path: Path):
    assert "there is no recipe" in message(tmp_path / "none.yaml")
    assert "is a folder" in message(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    assert "cannot be read" in message(tmp_path / "binary.yaml")


def test_loading_imports_no_torch():
    code = (
        "import sys; from megatron_lora.config import load_recipe; load_recipe(sys.argv[1]); "
        "import megatron_lora.policy.layout_checks; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(ROOT / "configs/sft.yaml")], check=True, cwd=ROOT)
