"""The trainer from the outside: a small base with its tokenizer, GSM8K-like rows, a recipe, and its command line."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import psutil
import yaml

from megatron_lora.data.sources import GSM8K_VARIABLE
from tests.support.launch import ROOT
from tests.support.models import save_model
from tools.tiny_model import VOCAB_SIZE, build_tokenizer

MARK = "MEGATRON_LORA_TEST_RUN"  # an environment variable that every process of a run inherits
LIMIT_SECONDS = 1200.0


def save_base(folder: Path, **changes: object) -> Path:
    """A random Qwen3-shaped model of two layers with the quickstart's byte tokenizer."""
    sizes = {"num_hidden_layers": 2, "vocab_size": VOCAB_SIZE, "max_position_embeddings": 512} | changes
    save_model(folder, "qwen3", **sizes)
    build_tokenizer().save_pretrained(folder)
    return folder


def write_rows(path: Path, rows: Iterable[Any]) -> Path:
    """JSONL; a text is written as it is."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(line + "\n" for line in lines))
    return path


def gsm8k_rows(number: int, seed: int) -> list[dict[str, str]]:
    """Word problems in GSM8K's form."""
    draw = random.Random(seed)
    rows = []
    for _ in range(number):
        name, thing = draw.choice(["Ann", "Ben", "Ida", "Tom"]), draw.choice(["apples", "books", "coins"])
        a, b = draw.randint(2, 49), draw.randint(2, 49)
        rows.append(
            {
                "question": f"{name} has {a} {thing} and gets {b} more. How many {thing} does {name} have?",
                "answer": f"{name} has {a} + {b} = <<{a}+{b}={a + b}>>{a + b} {thing}.\n#### {a + b}",
            }
        )
    return rows


def gsm8k_folder(folder: Path) -> Path:
    """GSM8K itself where the environment variable names it, else small files of its form."""
    if GSM8K_VARIABLE in os.environ:
        return Path(os.environ[GSM8K_VARIABLE])
    write_rows(folder / "train.jsonl", gsm8k_rows(64, seed=1))
    write_rows(folder / "test.jsonl", gsm8k_rows(16, seed=2))
    return folder


def write_recipe(path: Path, model: Path, data: Path) -> Path:
    """SFT of the base on GSM8K, 12 steps (eight an epoch) in fp32, with dropout, so that random states matter."""
    section = {"dataset_name": "gsm8k", "data_path": str(data)}
    recipe = {
        "defaults": str(ROOT / "configs" / "sft.yaml"),
        "sft": {"max_num_steps": 12, "max_num_epochs": 2, "val_period": 6, "val_batches": 1},
        "policy": {
            "model_name": str(model),
            "precision": "float32",
            "train_global_batch_size": 8,
            "max_total_sequence_length": 512,
            "sequence_packing": {"train_mb_tokens": 512},
            "megatron_cfg": {
                "peft": {"dim": 8, "alpha": 16, "dropout": 0.1},
                "optimizer": {"lr": 2e-2},
                "scheduler": {"lr_warmup_iters": 2},
            },
        },
        "data": {"train": section | {"split": "train"}, "validation": section | {"split": "test"}},
        "checkpointing": {"save_period": 3, "keep_top_k": 2},
    }
    path.write_text(yaml.safe_dump(recipe))
    return path


def read_metrics(run_dir: Path, kind: str = "train") -> list[dict[str, Any]]:
    """The complete lines of metrics.jsonl of one kind."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    records = [json.loads(line) for line in lines if line.endswith("\n")]
    return [record for record in records if record["kind"] == kind]


@dataclass
class Ended:
    """How a command ended. left: processes of it that are still there, as their command lines."""

    status: int
    stdout: str
    stderr: str
    left: list[str]


class Marked:
    """Processes that inherit an environment variable of ours, however far down they were started."""

    def __init__(self) -> None:
        self.mark = uuid4().hex

    def environment(self, **more: str) -> dict[str, str]:
        return os.environ | {"OMP_NUM_THREADS": "1", MARK: self.mark} | more

    def processes(self) -> list[psutil.Process]:
        """Those that are there; zombies are not."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return found

    def left(self, *expected: int) -> list[str]:
        """Command lines of those that are still there after a moment, but for the expected process ids."""
        deadline = time.monotonic() + 10
        while found := [process for process in self.processes() if process.pid not in expected]:
            if time.monotonic() > deadline:
                return [" ".join(process.cmdline()) for process in found]
            time.sleep(0.1)
        return []


def run_trainer(*arguments: str | Path, ranks: int = 1, **environment: str) -> Ended:
    """The command line as a user types it, under torchrun where there is more than one rank; waits for its end."""
    marked = Marked()
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    done = subprocess.run(
        [sys.executable, *launcher, "-m", "megatron_lora.train", *map(str, arguments)],
        cwd=ROOT,
        env=marked.environment(**environment),
        capture_output=True,
        text=True,
        timeout=LIMIT_SECONDS,
    )
    return Ended(done.returncode, done.stdout, done.stderr, marked.left())


class RankServer:
    """Starts ranks of the trainer without the wait for imports (rank_server.py). Nothing outlives the `with` block."""

    def __enter__(self) -> "RankServer":
        self.marked = Marked()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.rank_server"],
            cwd=ROOT,
            env=self.marked.environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return self

    def __exit__(self, *exception: object) -> None:
        for process in self.marked.processes():
            process.kill()
        self.process.communicate()

    def ask(self, request: Mapping[str, Any]) -> list[int]:
        assert self.process.stdin is not None and self.process.stdout is not None
        print(json.dumps(request), file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())

    def start(self, arguments: list[str], output: Path) -> "Ranks":
        """Two ranks. output: a folder that is made for what they print."""
        output.mkdir()
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        files = {"out": str(output / "out"), "err": str(output / "err")}
        return Ranks(self, output, self.ask({"arguments": arguments, "ranks": 2, "port": port, **files}))


@dataclass
class Ranks:
    """Running ranks of one start."""

    server: RankServer
    output: Path
    pids: list[int]

    def kill_when(self, condition: Callable[[], bool]) -> Ended:
        """Kill all ranks, as a power cut would, the moment that the condition holds."""
        self._wait_until(condition)
        for pid in self.pids:
            os.kill(pid, signal.SIGKILL)
        return self.end()

    def stop_when(self, condition: Callable[[], bool]) -> Ended:
        """SIGTERM to the ranks' process groups, helpers too, as torchrun passes it on."""
        self._wait_until(condition)
        for pid in self.pids:
            os.killpg(pid, signal.SIGTERM)
        return self.end()

    def _wait_until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + LIMIT_SECONDS
        while not condition():
            ended = any(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE for pid in self.pids)
            assert not ended, f"a rank ended before:\n{(self.output / 'err').read_text()[-4000:]}"
            assert time.monotonic() < deadline, "the run took too long"
            time.sleep(0.001)

    def end(self) -> Ended:
        """Wait for all ranks. status: the first that is not 0."""
        statuses = self.server.ask({"wait": self.pids})
        texts = [(self.output / name).read_text() for name in ("out", "err")]
        left = self.server.marked.left(self.server.process.pid)
        return Ended(next((status for status in statuses if status), 0), *texts, left)


def run_commands(folder: Path, commands: Mapping[str, list[str]]) -> dict[str, dict[str, Any]]:
    """Command lines for one rank, one after the other in one process: name -> {"status", "stdout", "stderr"}. Leaves
    nothing of its own in the folder."""
    todo, answers = folder / "commands.json", folder / "answers.json"
    todo.write_text(json.dumps(dict(commands)))
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.command_worker", todo, answers],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=LIMIT_SECONDS,
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    found = json.loads(answers.read_text())
    todo.unlink()
    answers.unlink()
    return found
