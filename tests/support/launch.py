"""Start a module on ranks of its own, on this machine's CPUs."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
LINES_SHOWN = 80


class RanksFailed(AssertionError):
    """A rank ended badly; the message holds the first traceback and the end of what all of them wrote to stderr."""


def run_ranks(module: str, ranks: int, *arguments: str | Path, timeout: float = 2400.0) -> str:
    """Run `python -m module arguments` under torchrun on so many processes, and return their stdout. Raises as
    `run_module`."""
    torchrun = ["torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m", module]
    return run_module(*torchrun, *arguments, timeout=timeout, what=f"{module} on {ranks} ranks")


def run_module(module: str, *arguments: str | Path, timeout: float = 2400.0, what: str = "") -> str:
    """Run `python -m module arguments`, one thread a process, and return its stdout.

    Raises RanksFailed where it exits with another status than 0, or has not ended in `timeout` seconds.
    """
    what = what or module
    command = [sys.executable, "-m", module, *(str(argument) for argument in arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    try:
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired as late:
        written = (late.stderr or b"").decode(errors="replace")
        raise RanksFailed(f"{what} had not ended after {timeout:g} s\n{_end(written)}") from None
    if done.returncode != 0:
        raise RanksFailed(f"{what} ended with status {done.returncode}\n{_end(done.stderr)}")
    return done.stdout


def _end(text: str) -> str:
    """The first traceback, which is the cause (the other ranks' follow from it), and the end."""
    lines = text.splitlines()
    first = next((number for number, line in enumerate(lines) if "Traceback (most recent call last)" in line), None)
    early = lines[first : first + LINES_SHOWN] if first is not None and first < len(lines) - LINES_SHOWN else []
    return "\n".join([*early, *(["..."] if early else []), *lines[-LINES_SHOWN:]])
