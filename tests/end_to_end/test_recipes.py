"""Every recipe in recipes/ runs its first two steps on both backends, with only the one key changed.

A small model, small data and a layout of two ranks stand in for the recipe's own.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.compare import relative_differences
from tests.support.launch import ROOT
from tests.support.reference import save_adapter
from tests.support.runs import arithmetic_preferences
from tests.support.trainer import RankServer, gsm8k_rows, read_metrics, save_base, write_rows

pytestmark = pytest.mark.timeout(900)

TOLERANCE = 1e-4
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
SHOWN = ("sft-quickstart-megatron", "sft-llama3.1-8b-megatron")
BACKENDS = {"megatron": "true", "dtensor": "false"}
# One GPU's worth of a recipe in a size that two CPU processes do in seconds.
SHORT = ("max_num_steps=2", "val_batches=1", "val_global_batch_size=8")
SMALL = {
    "sft": (*(f"sft.{size}" for size in SHORT), "policy.train_global_batch_size=8"),
    "dpo": (*(f"dpo.{size}" for size in SHORT), "policy.train_global_batch_size=8"),
    "grpo": (
        "grpo.max_num_steps=2",
        "grpo.num_prompts_per_step=4",
        "grpo.num_generations_per_prompt=4",
        "grpo.max_val_samples=4",
        "policy.train_global_batch_size=16",
        "policy.generation.max_new_tokens=8",
    ),
    "distillation": (
        "distillation.max_num_steps=2",
        "distillation.num_prompts_per_step=4",
        "distillation.num_generations_per_prompt=4",
        "distillation.max_val_samples=4",
        "policy.train_global_batch_size=16",
        "policy.generation.max_new_tokens=8",
    ),
}
DRAWING = ("grpo", "distillation")
# Of the shapes of the teacher's adapter.
TEACHERS = [f"policy.megatron_cfg.peft.{key}" for key in ("dim=4", "alpha=8")]


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipes")
    save_base(folder / "base", max_position_embeddings=4096)
    messages = [
        {"messages": [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}]}
        for row in gsm8k_rows(40, seed=3)
    ]
    write_rows(folder / "messages.jsonl", messages)
    write_rows(folder / "preferences.jsonl", arithmetic_preferences(40))
    save_adapter(folder / "base", folder / "teacher")
    write_rows(folder / "train.jsonl", gsm8k_rows(40, seed=1))
    write_rows(folder / "test.jsonl", gsm8k_rows(16, seed=2))
    return folder


@pytest.fixture(scope="module")
def server() -> Iterator[RankServer]:
    with RankServer() as started:
        yield started


def algorithm_of(recipe: Path) -> str:
    content = yaml.safe_load(recipe.read_text())
    return Path(content["defaults"]).stem


def is_long(recipe: Path) -> bool:
    """All but one recipe of each kind of data: the others differ in sizes, which stand-ins take away."""
    return recipe.stem not in SHOWN


def stand_ins(recipe: Path, room: Path) -> list[str]:
    """Overrides that put the small model and data in the recipe's place, the same for both backends."""
    content, algorithm = yaml.safe_load(recipe.read_text()), algorithm_of(recipe)
    tp_size = content["policy"].get("megatron_cfg", {}).get("tensor_model_parallel_size", 1)
    layout = {
        "tensor_model_parallel_size": min(2, tp_size),
        "pipeline_model_parallel_size": 1,
        "expert_model_parallel_size": 1,
        "num_layers_in_first_pipeline_stage": "null",
        "num_layers_in_last_pipeline_stage": "null",
        "virtual_pipeline_model_parallel_size": "null",
    }
    return [
        f"policy.model_name={room / 'base'}",
        f"policy.tokenizer.name={room / 'base'}",
        "policy.precision=float32",
        *SMALL[algorithm],
        *([f"teacher.adapter={room / 'teacher'}", *TEACHERS] if algorithm == "distillation" else []),
        "policy.megatron_cfg.peft.init_adapter=null",
        *(f"policy.megatron_cfg.{key}={value}" for key, value in layout.items()),
        *(["policy.generation.vllm_cfg.tensor_parallel_size=null"] if algorithm in DRAWING else []),
        *small_data(content.get("data", {}).get("train", {}).get("dataset_name"), algorithm, room),
    ]


def small_data(dataset_name: str | None, algorithm: str, room: Path) -> list[str]:
    """Rows of the same form as the recipe's data set; `arithmetic` is built in and stays."""
    if dataset_name == "arithmetic":
        return []
    if algorithm == "dpo":
        path = room / "preferences.jsonl"
        return ["data.train.dataset_name=null", f"data.train.data_path={path}", "data.validation=null"]
    if dataset_name == "tulu3_sft_mixture":
        path = room / "messages.jsonl"
        return ["data.train.dataset_name=null", f"data.train.data_path={path}", "data.train.split_validation_size=0.2"]
    return [f"data.{section}.data_path={room}" for section in ("train", "validation")]


@pytest.mark.parametrize(
    "recipe",
    [pytest.param(recipe, id=recipe.stem, marks=[pytest.mark.long] if is_long(recipe) else []) for recipe in RECIPES],
)
def test_the_first_steps_are_the_same_on_both_backends(
    recipe: Path, room: Path, server: RankServer, tmp_path: Path
) -> None:
    ours, theirs = run_both(recipe, room, server, tmp_path)
    if algorithm_of(recipe) in DRAWING:
        # Answers are drawn from probabilities that differ in the last bits.
        for line in (*ours, *theirs):
            assert line["rollout_logprob_error"] < TOLERANCE
        return
    for name in ("loss", "grad_norm"):
        assert max(relative_differences([line[name] for line in ours], [line[name] for line in theirs])) < TOLERANCE


def run_both(
    recipe: Path, room: Path, server: RankServer, tmp_path: Path, *overrides: str
) -> list[list[dict[str, Any]]]:
    """The metrics of a recipe's first steps on either backend."""
    runs = []
    for backend, enabled in BACKENDS.items():
        folder = tmp_path / backend
        arguments = [str(recipe), *stand_ins(recipe, room), f"checkpointing.checkpoint_dir={folder}", *overrides]
        ended = server.start(
            [*arguments, f"policy.megatron_cfg.enabled={enabled}"], tmp_path / f"{backend}_output"
        ).end()
        assert ended.status == 0, ended.stderr[-4000:]
        assert not ended.left
        runs.append(read_metrics(folder))
        assert [line["step"] for line in runs[-1]] == [1, 2]
    return runs


@pytest.mark.long
def test_distillation_over_the_teachers_most_likely_tokens(room: Path, server: RankServer, tmp_path: Path) -> None:
    [recipe] = [recipe for recipe in RECIPES if algorithm_of(recipe) == "distillation"]
    # Two updates a step: the second one meets answers of a policy that has moved.
    asked = ("distillation.topk_logits_k=8", "loss_fn.kl_type=mixed", "policy.train_global_batch_size=8")
    for lines in run_both(recipe, room, server, tmp_path, *asked):
        for line in lines:
            assert line["rollout_logprob_error"] < TOLERANCE and line["num_updates"] == 2
            assert line["forward_kl"] > 0 and line["reverse_kl"] > 0 and line["grad_norm"] > 0
            assert line["loss"] == pytest.approx((line["forward_kl"] + line["reverse_kl"]) / 2, rel=1e-4)
            assert 0 < line["teacher_candidate_mass"] < 1 and "clip_fraction" not in line
