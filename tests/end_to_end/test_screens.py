"""What a terminal of 100 columns shows: `megatron-lora train` behind a pseudo-terminal."""

import fcntl
import json
import os
import pty
import re
import resource
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.end_to_end.conftest import Job
from tests.support.launch import ROOT
from tests.support.models import save_model
from tools.tiny_model import VOCAB_SIZE, build_tokenizer

COLUMNS = 100
LIMIT_SECONDS = 600.0
CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
NOISE = ("Traceback", "WARNING", "Warning", "OMP_NUM_THREADS", "[Gloo]", "torch.distributed.elastic")


def show(
    arguments: list[str], meanwhile: Callable[[int], None] = lambda pid: None, *, address_space: int | None = None
) -> tuple[int, list[str]]:
    """Run the command in a terminal; returns its exit status and every line that was ever shown. meanwhile: called
    with the launcher's process id every time something was shown. address_space: bytes that each process may have."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, COLUMNS, 0, 0))
    command = [sys.executable, "-m", "megatron_lora.cli.main", "train", *arguments]
    environment = {key: value for key, value in os.environ.items() if key != "COLUMNS"} | {"TERM": "xterm-256color"}

    def limit() -> None:
        if address_space is not None:
            resource.setrlimit(resource.RLIMIT_AS, (address_space, address_space))

    started = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdin=theirs, stdout=theirs, stderr=theirs, preexec_fn=limit
    )
    os.close(theirs)
    shown, deadline = b"", time.monotonic() + LIMIT_SECONDS
    while time.monotonic() < deadline:
        try:
            piece = os.read(ours, 65536)
        except OSError:  # the last process that had the terminal is gone
            break
        if not piece:
            break
        shown += piece
        meanwhile(started.pid)
    os.close(ours)
    status = started.wait(timeout=60)
    lines = [CONTROL.sub("", line) for line in re.split(r"[\r\n]+", shown.decode(errors="replace"))]
    return status, [line.rstrip() for line in lines if line.strip()]


def arguments(job: Job, run_dir: Path, *more: str) -> list[str]:
    return [*job.arguments(run_dir), "--nproc", "2", *more]


def test_a_good_run(job: Job, tmp_path: Path):
    status, lines = show(arguments(job, tmp_path / "run", "sft.max_num_steps=3"))
    screen = "\n".join(lines)
    assert status == 0, screen
    assert not [noise for noise in NOISE if noise in screen], screen
    tables = [line for line in lines if line[0] in "┏┃┡│└"]
    assert tables and max(map(len, tables)) <= COLUMNS, screen
    bars = [line for line in lines if re.search(r"\b3/3\b", line)]
    assert bars and all(len(line) <= COLUMNS for line in bars)
    log = tmp_path / "run/log.txt"
    assert str(log) in screen and log.read_text().count("--- rank") == 2
    assert f"wrote {tmp_path / 'run/metrics.jsonl'}" in screen and "peak memory of a process: " in screen
    assert screen.endswith(str(tmp_path / "run/step_3/hf_adapter")), screen  # the last thing is where the adapter is
    # At the end: an answer beside the one in the data, and the course of the loss.
    assert re.search(r"the model's answer after step 3\n.*\n.* prompt .* answer .* in the data", screen), screen
    assert re.search(r"^loss, steps 1 to 3: [\d.]+ to [\d.]+$", screen, re.MULTILINE), screen


def test_a_mistyped_key_and_help():
    status, lines = show(["configs/sft.yaml", "policy.precison=float32", "--nproc", "8"])
    assert (status, lines) == (2, ["error: unknown key policy.precison; did you mean policy.precision?"])
    status, lines = show(["--help"])
    assert status == 0 and lines[0].startswith("usage: megatron-lora train RECIPE.yaml") and max(map(len, lines)) <= 100


@pytest.mark.long
def test_out_of_memory(job: Job, tmp_path: Path):
    """A layer with a window makes a mask of tokens x tokens, 20 GB of positions here: more than a process may have."""
    sizes = {"num_hidden_layers": 2, "vocab_size": VOCAB_SIZE, "max_position_embeddings": 65536}
    save_model(tmp_path / "base", "mistral", sliding_window=64, **sizes)
    build_tokenizer().save_pretrained(tmp_path / "base")
    rows = [{"prompt": "say it", "completion": "again and " * 5000} for _ in range(2)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    overrides = [
        f"policy.model_name={tmp_path / 'base'}",
        "policy.max_total_sequence_length=65536",
        "policy.sequence_packing.enabled=false",
        "policy.train_global_batch_size=2",
        "data.train.dataset_name=null",
        f"data.train.data_path={tmp_path / 'rows.jsonl'}",
        "data.validation=null",
    ]
    status, lines = show(arguments(job, tmp_path / "run", *overrides), address_space=8 << 30)
    screen = "\n".join(lines)
    said = next(number for number, line in enumerate(lines) if line.startswith("error: "))
    assert status == 1 and len([line for line in lines if line.startswith("error: ")]) == 1, screen
    wanted = r"error: out of the machine's memory on rank [01] while training step 1 \(\d+\.\d\d GiB more were wanted\)"
    assert re.fullmatch(wanted, lines[said]), screen
    assert lines[said + 1] == "  micro-batch: at most 65,536 tokens"
    assert re.match(r"  held: this rank \d+\.\d\d GiB, other processes ", lines[said + 2]), screen
    assert "    policy.max_total_sequence_length=32768 (now 65536)" in lines[said:]
    assert lines[-2] == "  the last complete checkpoint is as it was" and lines[-1].endswith("run/log.txt")
    assert "Traceback" not in screen and "Traceback" in (tmp_path / "run/log.txt").read_text()


def to_second_rank(number: int, run: Path, done: list[int]) -> Callable[[int], None]:
    """What sends rank 1 a signal, once, when the run has a checkpoint."""

    def send(launcher: int) -> None:
        if not done and (run / "step_3/training_info.json").exists():
            rank = next(child for child in psutil.Process(launcher).children() if child.environ().get("RANK") == "1")
            done.append(rank.pid)
            os.kill(rank.pid, number)

    return send


LONG_RUN = ("sft.max_num_steps=400", "sft.max_num_epochs=100")


@pytest.mark.long
def test_a_stopped_rank(job: Job, tmp_path: Path):
    """It neither answers nor ends: the run does, and says who it was."""
    stopped: list[int] = []
    send = to_second_rank(signal.SIGSTOP, tmp_path / "run", stopped)
    limits = ("timeouts.training_seconds=30", "timeouts.slow_seconds=60")
    status, lines = show(arguments(job, tmp_path / "run", *LONG_RUN, *limits), send)
    screen = "\n".join(lines)
    assert stopped and status not in (0, 2), screen
    said = next(line for line in lines if line.startswith("error: "))
    assert re.match(r"error: no progress for (30|60) s while ", said) and "Did not answer: rank 1" in screen
    assert "Traceback" not in screen and not psutil.pid_exists(stopped[0])
    assert (tmp_path / "run/latest_step.txt").read_text().strip() >= "3"


@pytest.mark.long
def test_a_killed_rank(job: Job, tmp_path: Path):
    killed: list[int] = []
    send = to_second_rank(signal.SIGKILL, tmp_path / "run", killed)
    status, lines = show(arguments(job, tmp_path / "run", *LONG_RUN), send)
    assert killed and status == 137, lines[-5:]
    assert lines[-1].startswith("error: rank 1 was ended by SIGKILL") and "Traceback" not in "\n".join(lines)
    assert (tmp_path / "run/latest_step.txt").read_text().strip() >= "3"
