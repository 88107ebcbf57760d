"""Starts `tests.gpu.worker` and reads what it wrote."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
SECONDS = 500


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_cases(folder: Path, cases: list[str], processes: int) -> str:
    """Run the cases in one process group. Returns the last of what it printed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    command += ["--master-port", str(free_port()), "-m", "tests.gpu.worker", str(folder), *cases]
    environment = dict(os.environ, CUDA_DEVICE_MAX_CONNECTIONS="1")
    log = folder / f"log-{processes}.txt"
    with log.open("wb") as stream:
        subprocess.run(command, cwd=ROOT, env=environment, stdout=stream, stderr=subprocess.STDOUT, timeout=SECONDS)
    return log.read_text(errors="replace")[-3000:]


def result(folder: Path, case: str, log: str) -> dict[str, Any]:
    """The case's measurements. Fails the test where the case failed or never ended."""
    for path in sorted(folder.glob(f"{case}*.json")):
        values = json.loads(path.read_text())
        assert "error" not in values, f"{path.stem}:\n{values['error']}"
    path = folder / f"{case}.json"
    assert path.exists(), f"{case} wrote no result; the process group's last words:\n{log}"
    return json.loads(path.read_text())


def worst_difference(values: dict[str, Any]) -> float:
    """Largest relative difference of two lists of losses."""
    pairs = zip(values["ours"], values["reference"], strict=True)
    return max(abs(ours - reference) / abs(reference) for ours, reference in pairs)
