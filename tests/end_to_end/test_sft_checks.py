"""What a start refuses, what stops a run, and NeMo RL's recipe: single-process runs, one after the other."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.end_to_end.conftest import Job
from tests.support.launch import ROOT
from tests.support.trainer import gsm8k_rows, read_metrics, run_commands, save_base, write_rows
from tools.tiny_model import build_tokenizer

NEMO_RL_RECIPE = ROOT / "tests/fixtures/nemo_rl/examples/configs/recipes/llm/sft-llama3.1-8b-1n8g-megatron-lora.yaml"
BAD_ROW = 6


@dataclass(frozen=True)
class Answers:
    """by_name: what each command answered. root: where they ran. kept: a copy of the first run before the others."""

    by_name: dict[str, dict]
    root: Path
    kept: Path


def spoil_one_token(base: Path, folder: Path, character: str) -> Path:
    """The base with a NaN embedding for one character: every row without it is as good as ever."""
    shutil.copytree(base, folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][build_tokenizer().convert_tokens_to_ids(character)] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def answers(job: Job, tmp_path_factory: pytest.TempPathFactory) -> Answers:
    root = tmp_path_factory.mktemp("checks")
    rows = gsm8k_rows(12, seed=4)
    rows[BAD_ROW - 1]["question"] += " ~"
    few = write_rows(root / "few.jsonl", rows)
    first = [str(job.recipe), f"checkpointing.checkpoint_dir={root / 'run'}", "data.validation=null"]
    longer = [*first, "sft.max_num_steps=4"]
    peft = "policy.megatron_cfg.peft"
    own_file = ["data.train.dataset_name=null", f"data.train.data_path={few}"]
    commands = {
        "run": [*first, "sft.max_num_steps=2"],
        "same again": [*first, "sft.max_num_steps=2"],
        "resume off": [*longer, "checkpointing.resume=false"],
        "other rank": [*longer, f"{peft}.dim=4"],
        "other linears": [*longer, f"{peft}.target_modules=[linear_qkv]"],
        "other sizes": [*longer, f"policy.model_name={save_base(root / 'wide', hidden_size=96)}"],
        "other weights": [*longer, f"policy.model_name={save_base(root / 'other', seed=7)}"],
        "full fine-tuning": [*longer, f"{peft}.enabled=false"],
        "other data": [*longer, *own_file],
        "other weights, checked only": [*longer, f"policy.model_name={root / 'other'}", "--dry-run"],
        "NaN": [
            str(job.recipe),
            f"policy.model_name={spoil_one_token(job.base, root / 'nan', '~')}",
            f"checkpointing.checkpoint_dir={root / 'nan_run'}",
            *own_file,
            "data.validation=null",
            "data.shuffle=false",
            "policy.train_global_batch_size=4",
            "policy.max_total_sequence_length=192",
            "policy.sequence_packing.train_mb_tokens=192",
            "checkpointing.save_period=1",
        ],
        "NeMo RL": [
            str(NEMO_RL_RECIPE),
            f"policy.model_name={job.base}",
            f"policy.tokenizer.name={job.base}",
            "policy.precision=float32",
            "policy.train_global_batch_size=8",
            "policy.max_total_sequence_length=512",
            "sft.max_num_steps=2",
            "data.train.dataset_name=gsm8k",
            f"data.train.data_path={job.data}",
            f"checkpointing.checkpoint_dir={root / 'nemo'}",
            f"logger.log_dir={root / 'nemo_logs'}",
            "logger.wandb_enabled=false",
        ],
    }
    names = list(commands)
    found = run_commands(root, {name: commands[name] for name in names[:2]})
    shutil.copytree(root / "run", root / "kept")
    found |= run_commands(root, {name: commands[name] for name in names[2:]})
    return Answers(found, root, root / "kept")


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_finished_run_has_nothing_to_do(answers: Answers):
    assert answers.by_name["run"]["status"] == 0, answers.by_name["run"]["stderr"]
    again = answers.by_name["same again"]
    assert again["status"] == 0 and "nothing to do: the run is at step 2 of 2" in again["stdout"], again["stderr"]
    assert [record["step"] for record in read_metrics(answers.kept)] == [1, 2]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("resume off", ("holds a run and checkpointing.resume=false",)),
        ("other rank", ("step_2 holds other adapters", "rank 8", "rank 4", "peft")),
        ("other linears", ("step_2 holds other adapters", "linear_fc1", "2 linears of linear_qkv")),
        ("other sizes", ("step_2 was trained on another model", "hidden_size=64 (here 96)")),
        ("other weights", ("step_2 was trained on another model", "weights differ")),
        ("other weights, checked only", ("step_2 was trained on another model", "weights differ")),
        ("full fine-tuning", ("step_2 holds an adapter, this run trains a whole model",)),
        ("other data", ("num_items=64", "num_items=12", "same data set")),
    ],
)
def test_a_folder_of_another_run_is_refused(answers: Answers, name: str, said: tuple[str, ...]):
    answer = answers.by_name[name]
    assert answer["status"] == 2
    message = answer["stderr"].strip()
    assert message.startswith("error: ") and len(message.splitlines()) == 1, message
    for part in said:
        assert part in message


def test_refusals_leave_the_run_as_it_was(answers: Answers):
    assert content(answers.root / "run") == content(answers.kept)


def test_nan_stops_the_run_and_names_step_and_row(answers: Answers):
    """Row 6 of the file stands in the second batch of four."""
    answer, run_dir = answers.by_name["NaN"], answers.root / "nan_run"
    assert answer["status"] == 1
    message = answer["stderr"].strip()
    assert message.startswith("stopped at step 2: the loss is nan for data rows [6]"), message
    assert "the last good checkpoint is kept (step_1)" in message and len(message.splitlines()) == 1
    assert sorted(path.name for path in run_dir.glob("*step_*")) == ["step_1"]
    assert (run_dir / "latest_step.txt").read_text() == "1\n"
    assert [record["step"] for record in read_metrics(run_dir)] == [1]


def test_nemo_rls_recipe_runs_with_another_model(answers: Answers):
    answer, run_dir = answers.by_name["NeMo RL"], answers.root / "nemo"
    assert answer["status"] == 0, answer["stderr"]
    assert len(read_metrics(run_dir)) == 2
    step = run_dir / "step_2"
    assert json.loads((step / "hf_adapter" / "adapter_config.json").read_text())["r"] == 128
    for path in (step / "policy" / "tokenizer").iterdir():
        assert (step / "hf_adapter" / path.name).read_bytes() == path.read_bytes()
    notices = [line for line in answer["stdout"].splitlines() if "without effect" in line]
    assert len(notices) == 1, answer["stdout"]
