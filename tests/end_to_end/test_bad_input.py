"""Users' mistakes: each ends with exit status 2 and one clear message, and nothing is written."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from tests.end_to_end.conftest import Job
from tests.support.trainer import gsm8k_rows, run_commands, run_trainer, write_rows


@dataclass(frozen=True)
class Mistake:
    """make: makes the bad thing in a folder and returns the overrides, or the whole command line's recipe first.
    said: what the message must hold."""

    make: Callable[[Path, Job], list[str]]
    said: tuple[str, ...]


def override(*overrides: str) -> Callable[[Path, Job], list[str]]:
    return lambda folder, job: [str(job.recipe), *overrides]


def recipe(text: str) -> Callable[[Path, Job], list[str]]:
    def make(folder: Path, job: Job) -> list[str]:
        (folder / "bad.yaml").write_text(text)
        return [str(folder / "bad.yaml")]

    return make


def model(change: Callable[[Path], object]) -> Callable[[Path, Job], list[str]]:
    """A copy of the base that is spoilt by `change`."""

    def make(folder: Path, job: Job) -> list[str]:
        spoilt = folder / "model"
        shutil.copytree(job.base, spoilt)
        change(spoilt)
        return [str(job.recipe), f"policy.model_name={spoilt}"]

    return make


def config(**changes: object) -> Callable[[Path], object]:
    """Another config.json in the model's folder."""

    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def truncate(folder: Path) -> None:
    weights = folder / "model.safetensors"
    os.truncate(weights, weights.stat().st_size - 1000)


def only_config(content: dict[str, object]) -> Callable[[Path], object]:
    return lambda folder: (folder / "config.json").write_text(json.dumps(content))


def data(*rows: object) -> Callable[[Path, Job], list[str]]:
    def make(folder: Path, job: Job) -> list[str]:
        path = write_rows(folder / "rows.jsonl", rows)
        return [str(job.recipe), "data.train.dataset_name=null", f"data.train.data_path={path}"]

    return make


def below_a_file(folder: Path, job: Job) -> list[str]:
    (folder / "file").write_text("")
    return [str(job.recipe), f"checkpointing.checkpoint_dir={folder / 'file' / 'run'}"]


def peft_folder(**settings: object) -> Callable[[Path, Job], list[str]]:
    """Starting from an adapter that some other peft wrote."""

    def make(folder: Path, job: Job) -> list[str]:
        adapter = folder / "adapter"
        adapter.mkdir()
        content = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj"], **settings}
        (adapter / "adapter_config.json").write_text(json.dumps(content))
        save_file({"unread": torch.zeros(1)}, adapter / "adapter_model.safetensors")
        return [str(job.recipe), f"{PEFT}.init_adapter={adapter}"]

    return make


PEFT = "policy.megatron_cfg.peft"
GOOD_ROW = gsm8k_rows(1, seed=3)[0]
TP, PP = "policy.megatron_cfg.tensor_model_parallel_size", "policy.megatron_cfg.pipeline_model_parallel_size"
GPT2 = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_layer": 2, "n_head": 4, "n_embd": 64}
MISTAKES = {
    "missing recipe": Mistake(lambda folder, job: [str(folder / "no.yaml")], ("there is no recipe", "no.yaml")),
    "recipe is no YAML": Mistake(recipe("policy: [1, 2\n"), ("bad.yaml", "line")),
    "recipe is a list": Mistake(recipe("- policy\n"), ("bad.yaml", "wanted sections")),
    "recipe without algorithm": Mistake(
        recipe("policy: {model_name: x}\ndata: {train: {dataset_name: gsm8k}}\n"), ("sft", "dpo", "grpo")
    ),
    "override without value": Mistake(override("policy.precision"), ("policy.precision", "dotted.key=value")),
    "unknown key": Mistake(override("policy.megatron_cfg.peft.dims=8"), ("policy.megatron_cfg.peft.dims", "dim")),
    "wrong type": Mistake(override("policy.train_global_batch_size=many"), ("train_global_batch_size", "many")),
    "dropout out of range": Mistake(override("policy.megatron_cfg.peft.dropout=1.5"), ("peft.dropout", "1.5")),
    "dim 0": Mistake(override("policy.megatron_cfg.peft.dim=0"), ("peft.dim", "0")),
    "target that fits nothing": Mistake(
        override("policy.megatron_cfg.peft.target_modules=[linear_kqv]"), ("linear_kqv", "linear_qkv")
    ),
    "4 bits without the adapters' dtype": Mistake(
        override(f"{PEFT}.quantization=nf4"), ("quantization=nf4 needs lora_dtype", "lora_dtype=bfloat16 or float32")
    ),
    "full fine-tuning in 4 bits": Mistake(
        override(f"{PEFT}.quantization=nf4", f"{PEFT}.lora_dtype=float32", f"{PEFT}.enabled=false"),
        ("quantization=nf4 with enabled=false", "set enabled=true"),
    ),
    "B slower than A": Mistake(override(f"{PEFT}.lora_plus_ratio=0.5"), (f"{PEFT}.lora_plus_ratio", "0.5", "1")),
    "DoRA where B is split": Mistake(
        override(f"{PEFT}.type=dora", f"{PEFT}.a2a_experimental=true"), ("needs a row-parallel linear's whole B",)
    ),
    "a kind that is not there": Mistake(override(f"{PEFT}.type=lokr"), (f"{PEFT}.type", "lokr", "canonical_lora")),
    "an adapter of another kind": Mistake(peft_folder(peft_type="IA3"), ("peft_type='IA3'", "merge_and_unload")),
    "trained biases": Mistake(override(f"{PEFT}.bias=lora_only"), (f"{PEFT}.bias", "lora_only")),
    "an adapter with trained biases": Mistake(
        peft_folder(peft_type="LORA", r=4, lora_alpha=8, bias="lora_only"), ("bias", "lora_only")
    ),
    "init_adapter that is not there": Mistake(
        override("policy.megatron_cfg.peft.init_adapter=/no/adapter"), ("/no/adapter",)
    ),
    "no model folder": Mistake(override("policy.model_name=/no/such/model"), ("/no/such/model", "no such folder")),
    "model without config": Mistake(model(lambda folder: (folder / "config.json").unlink()), ("config.json",)),
    "config is no JSON": Mistake(model(lambda folder: (folder / "config.json").write_text("{")), ("config",)),
    "model without weights": Mistake(
        model(lambda folder: (folder / "model.safetensors").unlink()), ("model.safetensors", "model")
    ),
    "truncated safetensors": Mistake(model(truncate), ("model.safetensors", "truncated")),
    "architecture the bridge lacks": Mistake(model(only_config(GPT2)), ("gpt2", "llama", "qwen3")),
    "architecture nobody knows": Mistake(model(config(model_type="no_such_model")), ("no_such_model",)),
    "model without tokenizer": Mistake(
        model(lambda folder: [(folder / name).unlink() for name in ("tokenizer.json", "tokenizer_config.json")]),
        ("policy.tokenizer.name", "tokenizer.json"),
    ),
    "TP that does not divide the heads": Mistake(override(f"{TP}=3"), (f"{TP}=3", "4 attention heads", "1 or 2")),
    "TP that does not divide the groups": Mistake(override(f"{TP}=4"), (f"{TP}=4", "2 query groups", "1 or 2")),
    "TP that does not divide the ranks": Mistake(override(f"{TP}=2"), ("=2", "1 ranks", "--nproc-per-node")),
    "PP beyond the layers": Mistake(override(f"{PP}=4"), (f"{PP}=4", "2 layers", "at most 2")),
    "row is no JSON": Mistake(data(GOOD_ROW, '{"question": '), ("rows.jsonl, row 2", "no JSON")),
    "row lacks a field": Mistake(data(GOOD_ROW, GOOD_ROW, {"question": "?"}), ("row 3", "'answer'", "missing")),
    "row is empty": Mistake(data(GOOD_ROW, "", GOOD_ROW), ("rows.jsonl, row 2", "empty")),
    "row is an empty object": Mistake(data({}), ("rows.jsonl, row 1", "empty")),
    "answer is empty": Mistake(data(GOOD_ROW | {"answer": " "}), ("row 1", "'answer'", "empty")),
    "no data file": Mistake(
        override("data.train.dataset_name=null", "data.train.data_path=/no/rows.jsonl"), ("/no/rows.jsonl",)
    ),
    "empty data set": Mistake(data(), ("rows.jsonl", "no rows")),
    "every row too long": Mistake(
        override("policy.max_total_sequence_length=8", "policy.sequence_packing.train_mb_tokens=8"),
        ("every row is longer", "8 tokens", "policy.max_total_sequence_length"),
    ),
    "fewer rows than a batch": Mistake(data(GOOD_ROW), ("policy.train_global_batch_size", "1 ", "8")),
    "folder below a file": Mistake(below_a_file, ("checkpointing.checkpoint_dir", "cannot be written")),
    "folder that the system refuses": Mistake(
        override("checkpointing.checkpoint_dir=/proc/run"), ("checkpointing.checkpoint_dir", "cannot be written")
    ),
}


@pytest.fixture(scope="module")
def answers(job: Job, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """What the trainer answered to each mistake, all in one process."""
    folder = tmp_path_factory.mktemp("mistakes")
    commands = {}
    for number, (name, mistake) in enumerate(MISTAKES.items()):
        case = folder / str(number)
        case.mkdir()
        arguments = mistake.make(case, job)
        if not any("checkpoint_dir" in argument for argument in arguments) and str(job.recipe) in arguments:
            arguments.append(f"checkpointing.checkpoint_dir={case / 'run'}")
        commands[name] = arguments
    before = _files(folder)
    found = run_commands(folder, commands)
    return found | {"before": before, "after": _files(folder)}


def _files(folder: Path) -> dict[str, float]:
    return {str(path): path.stat().st_mtime_ns if path.is_file() else 0.0 for path in folder.rglob("*")}


@pytest.mark.parametrize("name", MISTAKES)
def test_one_message_and_status_2(name: str, answers: dict[str, dict]):
    answer = answers[name]
    message = answer["stderr"].strip()
    assert answer["status"] == 2, message
    assert message.startswith("error: ") and message.count("error: ") == 1 and "Traceback" not in message
    # One mistake that reaches two keys by interpolation, and YAML's own pointer to the place, take several lines.
    assert all(line.startswith("  ") for line in message.splitlines()[1:]), message
    for part in MISTAKES[name].said:
        assert part in message, message


def test_nothing_was_written(answers: dict[str, dict]):
    assert answers["before"] == answers["after"]


def test_an_error_is_the_command_lines_only_output(job: Job, tmp_path: Path):
    """As a user starts it; a mistake in the recipe is found before torch is imported."""
    ended = run_trainer(job.recipe, "policy.precison=float32", f"checkpointing.checkpoint_dir={tmp_path / 'run'}")
    assert (ended.status, ended.stdout) == (2, "")
    assert ended.stderr.startswith("error: ") and "policy.precision" in ended.stderr and ended.stderr.count("\n") == 1
    debugged = run_trainer(job.recipe, "policy.precison=float32", "--debug")
    assert debugged.status == 2 and "Traceback" in debugged.stderr
    assert list(tmp_path.iterdir()) == []


def test_under_torchrun_one_rank_speaks(job: Job, tmp_path: Path):
    """TP x PP = 4 on two ranks."""
    ended = run_trainer(job.recipe, f"{TP}=2", f"{PP}=2", f"checkpointing.checkpoint_dir={tmp_path / 'run'}", ranks=2)
    assert ended.status != 0 and ended.left == []
    # Once by the rank, and once more as the end of torchrun's own report.
    assert ended.stderr.count("error: policy.megatron_cfg: tensor_model_parallel_size=2 x") == 2
    assert "exitcode  : 2" in ended.stderr
    last, border = ended.stderr.splitlines()[-2:]
    assert "does not divide the 2 ranks; start a multiple of 4 ranks" in last and set(border) == {"="}
    assert list(tmp_path.iterdir()) == []


def test_recipe_can_be_printed_and_checked_without_training(job: Job, tmp_path: Path):
    run_dir = f"checkpointing.checkpoint_dir={tmp_path / 'run'}"
    printed = run_trainer(job.recipe, run_dir, "--print-config")
    assert printed.status == 0
    assert yaml.safe_load(printed.stdout)["policy"]["megatron_cfg"]["peft"]["dim"] == 8
    checked = run_trainer(job.recipe, run_dir, "--dry-run")
    assert checked.status == 0 and "the recipe is valid" in checked.stdout
    assert "sft of " in checked.stdout and "by megatron: ranks 1 = TP 1 x PP 1 x CP 1 x DP 1" in checked.stdout
    assert "trainable: 14,848 parameters in 8 linears" in checked.stdout
    assert "train: 64 rows" in checked.stdout and "steps: 12 of 8 rows, 8 an epoch" in checked.stdout
    assert "memory a rank, as far as it is known: base " in checked.stdout
    batch = "policy.train_global_batch_size=128"
    refused = run_trainer(job.recipe, run_dir, batch, "--dry-run")  # 64 rows
    assert refused.status == 2 and "policy.train_global_batch_size" in refused.stderr
    assert list(tmp_path.iterdir()) == []
