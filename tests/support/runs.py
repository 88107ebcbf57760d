"""Runs of the command line on small models: a base with a tokenizer, a recipe, and what the run wrote."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import load_file
from torch import Tensor

from megatron_lora.config.loader import load_recipe
from megatron_lora.data.arithmetic import arithmetic_rows
from megatron_lora.trainers.metric_names import metric_names
from tests.support.launch import ROOT, run_ranks
from tests.support.models import save_model
from tools.tiny_model import build_tokenizer


def save_base(folder: Path, family: str = "qwen3", **changes: object) -> Path:
    """A random model with the quickstart's tokenizer, which spells texts byte by byte."""
    tokenizer = build_tokenizer()
    save_model(folder, family, vocab_size=len(tokenizer), **changes)
    tokenizer.save_pretrained(folder)
    return folder


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def arithmetic_preferences(num_rows: int, split: str = "train", seed: int = 0) -> list[dict[str, str]]:
    """Right answers against wrong ones that have as many digits."""
    draw = random.Random(seed)
    rows = []
    for row in arithmetic_rows(split)[:num_rows]:
        right = row["completion"]
        low, high = (0, 9) if len(right) == 1 else (10 ** (len(right) - 1), 10 ** len(right) - 1)
        wrong = str(draw.choice([number for number in range(low, high + 1) if str(number) != right]))
        rows.append({"prompt": row["prompt"], "chosen": right, "rejected": wrong})
    return rows


def run(folder: Path, recipe: dict[str, Any], ranks: int, *overrides: str) -> Path:
    """`torchrun -m megatron_lora.train`; returns the run's folder. Raises RanksFailed."""
    path = write_recipe(folder, recipe)
    run_ranks("megatron_lora.train", ranks, path, f"checkpointing.checkpoint_dir={folder / 'run'}", *overrides)
    return folder / "run"


def write_recipe(folder: Path, recipe: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def start(folder: Path, recipe: dict[str, Any], ranks: int, *overrides: str) -> subprocess.Popen[str]:
    """The same in the background, in a session of its own, for runs that are to be disturbed."""
    path = write_recipe(folder, recipe)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command += ["-m", "megatron_lora.train", str(path), f"checkpointing.checkpoint_dir={folder / 'run'}", *overrides]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 300.0) -> None:
    """Wait for something that a running process does. Raises AssertionError where it ends, or takes longer."""
    deadline = time.monotonic() + seconds
    while not condition():
        if process.poll() is not None or time.monotonic() > deadline:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            raise AssertionError(f"it did not happen; the process wrote:\n{process.communicate()[0]}")
        time.sleep(0.2)


def metrics(run_folder: Path, kind: str = "train") -> list[dict[str, Any]]:
    """The lines of one kind of metrics.jsonl."""
    lines = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def adapter_of(step_folder: Path) -> dict[str, Tensor]:
    """The HF PEFT tensors of a checkpoint."""
    return load_file(step_folder / "hf_adapter" / "adapter_model.safetensors")


def assert_names_are_known(run_folder: Path) -> None:
    """Every number that the run logged is one by which `checkpointing.metric_name` could rank."""
    recipe = load_recipe(run_folder / "config.yaml").recipe
    for kind in ("train", "validation"):
        logged = {name for line in metrics(run_folder, kind) for name in line} - {"kind", "step"}
        assert logged <= set(metric_names(recipe, kind)), logged - set(metric_names(recipe, kind))
