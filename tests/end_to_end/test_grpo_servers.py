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

from tests.end_to_end.test_grpo import SAME, TP, recipe
from tests.support.compare import largest_difference
from tests.support.launch import ROOT
from tests.support.runs import (
    adapter_of,
    assert_names_are_known,
    metrics,
    run,
    save_base,
    start,
    wait_until,
    write_recipe,
)

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
    given = values(base, ["http://127.0.0.1:1"])
    # Places for the adapters of two versions.
    given["grpo"]["async_grpo"] = {"enabled": True, "in_flight_weight_updates": True}
    given["loss_fn"]["proximal_policy"] = "rollout"
    path = write_recipe(folder, given)
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


ASYNCHRONOUS = {
    # A ratio to the policy that drew the answers: its clipped loss knows their age.
    "age 0": ({"max_trajectory_age_steps": 0}, {}),
    "age 1": ({}, {"use_importance_sampling_correction": True, "truncated_importance_sampling_ratio": 2.0}),
    "in flight": ({"in_flight_weight_updates": True}, {"proximal_policy": "rollout"}),
}


def test_answers_asked_ahead(base: Path, servers: dict[str, subprocess.Popen[bytes]], tmp_path: Path) -> None:
    plain = run(tmp_path / "plain", values(base, list(servers)), 2)
    found = {}
    for name, (asynchronous, loss) in ASYNCHRONOUS.items():
        given = values(base, list(servers))
        given["grpo"]["async_grpo"] = {"enabled": True} | asynchronous
        given["loss_fn"] |= loss
        found[name] = run(tmp_path / name.replace(" ", "-"), given, 2)
        assert_names_are_known(found[name])
    # Age 0 is the synchronous run.
    for ours, theirs in zip(metrics(found["age 0"]), metrics(plain), strict=True):
        assert [ours[key] for key in SAME] == pytest.approx([theirs[key] for key in SAME], rel=1e-5, abs=1e-7)
        assert ours["staleness_max"] == 0 and ours["stale_samples"] == 0
    last = f"step_{STEPS}"
    assert largest_difference(adapter_of(found["age 0"] / last), adapter_of(plain / last)) < 1e-5
    for name in ("age 1", "in flight"):
        lines = metrics(found[name])
        assert [line["adapter_version"] for line in lines] == [max(0, step - 1) for step in range(STEPS)]
        assert [line["staleness_mean"] for line in lines] == [0.0] + [1.0] * (STEPS - 1)
        assert all(line["staleness_share_1"] == line["staleness_max"] for line in lines)
        # The distance to the policy that drew the answers is that of a step, far above rounding.
        assert lines[0]["rollout_logprob_error"] < 1e-4 < lines[-1]["rollout_logprob_error"] < 1.0
        assert max(line["refit_probe_error"] for line in lines) < 1e-4


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
