"""GRPO whose answers come from two real rollout servers (`megatron-lora serve`), one of which is killed."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.test_grpo import TP, recipe
from tests.support.launch import ROOT
from tests.support.runs import metrics, run, save_base, start, wait_until, write_recipe

pytestmark = [pytest.mark.timeout(1800), pytest.mark.long]
STEPS = 6


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("servers") / "base")


def values(base: Path, urls: list[str], **generation: Any) -> dict[str, Any]:
    servers = {"colocated": {"enabled": False}, "servers": {"urls": urls}} if urls else {}
    settings = {"backend": "vllm", "vllm_cfg": {"tensor_parallel_size": 1}, "refit": "adapter"}
    return recipe(base, settings | servers | generation, TP, max_num_steps=STEPS)


@pytest.fixture(scope="module")
def servers(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, subprocess.Popen[bytes]]]:
    folder = tmp_path_factory.mktemp("serve")
    path = write_recipe(folder, values(base, ["http://127.0.0.1:1"]))
    started: dict[str, subprocess.Popen[bytes]] = {}
    for number in range(2):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [sys.executable, "-m", "megatron_lora.cli.main", "serve", str(path), "--port", str(port)]
        url, log = f"http://127.0.0.1:{port}", folder / f"{number}.log"
        with log.open("w") as output:
            started[url] = subprocess.Popen(
                command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
        # One after the other: two vLLM servers that start at once may pick the same port for their workers.
        _wait_for(url, started[url], log)
    yield started
    for process in started.values():
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 400
    while process.poll() is None and time.monotonic() < deadline:
        try:
            urllib.request.urlopen(f"{url}/health", timeout=5)
            return
        except OSError:
            time.sleep(1)
    raise AssertionError(log.read_text()[-3000:])


def test_servers_answer_as_colocated_engines_and_one_may_die(
    base: Path, servers: dict[str, subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    colocated = metrics(run(tmp_path / "colocated", values(base, []), 2))
    merged = metrics(run(tmp_path / "merged", values(base, list(servers), refit="merge"), 2))
    process = start(tmp_path / "servers", values(base, list(servers)), 2)
    folder = tmp_path / "servers" / "run"
    wait_until(lambda: (folder / "step_2" / "training_info.json").is_file(), process)
    dead, killed = next(iter(servers.items()))
    os.killpg(killed.pid, signal.SIGKILL)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    assert "rollout server left out" in output and dead in output
    lines = metrics(folder)
    assert [line["adapter_version"] for line in lines] == list(range(STEPS))
    for found in (lines, merged):
        assert max(line["rollout_logprob_error"] for line in found) < 1e-4
        assert max(line["refit_probe_error"] for line in found) < 1e-4
        # Equal until a draw falls between two roundings, so one answer may differ in a step.
        pairs = [(a["reward"], b["reward"]) for a, b in zip(found, colocated, strict=True)]
        assert sum(abs(a - b) for a, b in pairs) / STEPS < 0.02, pairs
    assert not (folder / "rollout-weights").exists()
