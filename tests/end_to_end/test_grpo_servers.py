"""GRPO whose answers come from two real rollout servers (`megatron-lora serve`), one of which is killed."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from megatron_lora.conversion.fingerprint import fingerprint_base
from megatron_lora.policy.preload import copy_of, released_copies, use_copy
from megatron_lora.rollout.server_client import EngineFacts, ServerClient
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
from tests.support.trainer import Ended, Ranks, RankServer

pytestmark = [pytest.mark.timeout(1800), pytest.mark.long]
STEPS = 6


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("servers") / "base")


def values(base: Path, urls: list[str], **generation: Any) -> dict[str, Any]:
    servers = {"colocated": {"enabled": False}, "servers": {"urls": urls}} if urls else {}
    settings = {"backend": "vllm", "vllm_cfg": {"tensor_parallel_size": 1}, "refit": "adapter"}
    return recipe(base, settings | servers | generation, TP, max_num_steps=STEPS)


@contextmanager
def serving(path: Path, log: Path, *overrides: str) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """(URL, process) of a server of a recipe, once it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "megatron_lora.cli.main", "serve", str(path), "--port", str(port), *overrides]
    url = f"http://127.0.0.1:{port}"
    with log.open("w") as output:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        _wait_for(url, process, log)
        yield url, process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture(scope="module")
def servers(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, subprocess.Popen[bytes]]]:
    folder = tmp_path_factory.mktemp("serve")
    given = values(base, ["http://127.0.0.1:1"])
    # Places for the adapters of two versions.
    given["grpo"]["async_grpo"] = {"enabled": True, "in_flight_weight_updates": True}
    given["loss_fn"]["proximal_policy"] = "rollout"
    path = write_recipe(folder, given)
    with ExitStack() as stack:
        # One after the other: two vLLM servers that start at once may pick the same port for their workers.
        yield dict(
            stack.enter_context(
                serving(path, folder / f"{number}.log", f"policy.preload_to_shm={str(number == 1).lower()}")
            )
            for number in range(2)
        )
    # What the killed one has left.
    with released_copies():
        use_copy(base)


def _wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 900
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


def ahead(base: Path, urls: list[str], name: str) -> dict[str, Any]:
    """The recipe, each step's metrics with a number that says which prompts it had."""
    given = values(base, urls)
    if name:
        asynchronous, loss = ASYNCHRONOUS[name]
        given["grpo"]["async_grpo"] = {"enabled": True} | asynchronous
        given["loss_fn"] |= loss
    which = {"kind": "python", "name": "which", "function": "tests.support.rewards:prompt_number", "weight": 0.0}
    given["env"]["reward_functions"].append(which)
    return given


@pytest.fixture(scope="module")
def ranks() -> Iterator[RankServer]:
    with RankServer() as server:
        yield server


@dataclass(frozen=True)
class Starts:
    """Starts the recipe's runs, all below a folder of their own."""

    base: Path
    urls: list[str]
    ranks: RankServer
    folder: Path

    def start(self, place: Path, name: str) -> Ranks:
        """place: the run's folder; its recipe is written beside it, what it prints too."""
        path = write_recipe(place.with_name(f"{place.name}-recipe"), ahead(self.base, self.urls, name))
        number = sum(1 for _ in self.folder.glob("output-*"))
        arguments = [str(path), f"checkpointing.checkpoint_dir={place}"]
        return self.ranks.start(arguments, self.folder / f"output-{number}")

    def whole(self, name: str) -> Path:
        """A run that nothing disturbs; "": of synchronous steps."""
        place = self.folder / f"whole-{name.replace(' ', '-')}"
        if not place.exists():
            assert_went_through(self.start(place, name).end())
        return place


def assert_went_through(ended: Ended) -> None:
    assert ended.status == 0 and ended.left == [], ended.stdout[-2000:] + ended.stderr[-2000:]


@pytest.fixture(scope="module")
def starts(
    base: Path,
    servers: dict[str, subprocess.Popen[bytes]],
    ranks: RankServer,
    tmp_path_factory: pytest.TempPathFactory,
) -> Starts:
    return Starts(base, list(servers), ranks, tmp_path_factory.mktemp("ahead"))


def assert_same_numbers(found: list[dict[str, Any]], wanted: list[dict[str, Any]]) -> None:
    for ours, theirs in zip(found, wanted, strict=True):
        assert [ours[key] for key in SAME] == pytest.approx([theirs[key] for key in SAME], rel=1e-5, abs=1e-7)


def test_answers_asked_ahead(starts: Starts) -> None:
    plain, same = starts.whole(""), starts.whole("age 0")
    # Age 0 is the synchronous run.
    assert_same_numbers(metrics(same), metrics(plain))
    assert all(line["staleness_max"] == 0 and line["stale_samples"] == 0 for line in metrics(same))
    last = f"step_{STEPS}"
    assert largest_difference(adapter_of(same / last), adapter_of(plain / last)) < 1e-5
    for name in ASYNCHRONOUS:
        assert_names_are_known(starts.whole(name))
    for name in ("age 1", "in flight"):
        lines = metrics(starts.whole(name))
        assert [line["adapter_version"] for line in lines] == [max(0, step - 1) for step in range(STEPS)]
        assert [line["staleness_mean"] for line in lines] == [0.0] + [1.0] * (STEPS - 1)
        assert all(line["staleness_share_1"] == line["staleness_max"] for line in lines)
        # The distance to the policy that drew the answers is that of a step, far above rounding.
        assert lines[0]["rollout_logprob_error"] < 1e-4 < lines[-1]["rollout_logprob_error"] < 1.0
        assert max(line["refit_probe_error"] for line in lines) < 1e-4


@pytest.mark.parametrize("how", ["killed while it refits", "stopped"])
@pytest.mark.parametrize("name", ["age 0", "in flight"])
def test_a_run_that_goes_on_loses_no_prompt_repeats_none_and_uses_nothing_stale(
    starts: Starts, name: str, how: str
) -> None:
    """What was asked ahead is asked again with the weights that the run has; of age 0 the very same answers."""
    place = starts.folder / f"{name} {how}".replace(" ", "-")
    begun = starts.start(place, name)
    if how == "stopped":
        assert_went_through(begun.stop_when((place / "step_2" / "training_info.json").is_file))
    else:
        # Of each refit the weights lie here from before they are handed over until they are proven.
        begun.kill_when(lambda: any((place / "rollout-weights").glob("version-3-*/adapter_config.json")))
    versions = {folder.name for folder in (place / "rollout-weights").glob("version-*")}
    saved = int((place / "latest_step.txt").read_text())
    if how == "stopped":
        assert 2 <= saved == len(metrics(place)) < STEPS
    else:
        assert saved == 2 == metrics(place)[-1]["step"] and versions
    assert_went_through(starts.start(place, name).end())
    lines, wanted = metrics(place), metrics(starts.whole(name))
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert [line["reward_which"] for line in lines] == [line["reward_which"] for line in wanted]
    assert len({line["reward_which"] for line in lines}) == STEPS
    # A run that goes on has asked for nothing yet: its first answers are of the weights that it has.
    age = ASYNCHRONOUS[name][0].get("max_trajectory_age_steps", 1)
    ages = [min(age, step if step < saved else step - saved) for step in range(STEPS)]
    assert [line["adapter_version"] for line in lines] == [step - age for step, age in enumerate(ages)]
    assert [line["staleness_mean"] for line in lines] == [line["staleness_max"] for line in lines] == ages
    assert sum(line["stale_samples"] for line in lines) == 0
    assert max(line["refit_probe_error"] for line in lines) < 1e-4
    if age == 0:
        assert_same_numbers(lines, wanted)
    assert position(place) == position(starts.whole(name))
    # The servers have forgotten what the killed run gave them.
    for url in starts.urls:
        client = ServerClient(url, 60.0)
        client.describe()
        assert client.loaded and not versions & set(client.loaded)


def position(place: Path) -> dict[str, Any]:
    """Of the data, after the last step."""
    return json.loads((place / f"step_{STEPS}" / "training_info.json").read_text())["loader"]


def test_servers_say_what_they_hold_and_another_base_or_rank_is_refused(
    starts: Starts, servers: dict[str, subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    """Before weights load. One of them reads the base's copy in shared memory."""
    places = [psutil.Process(process.pid).cmdline() for process in servers.values()]
    assert [str(copy_of(starts.base)) in place for place in places] == [False, True]
    assert copy_of(starts.base).is_dir()
    for url in starts.urls:
        assert ServerClient(url, 60.0).engine_facts() == EngineFacts(fingerprint_base(starts.base), 8)
    path = write_recipe(tmp_path / "recipe", ahead(starts.base, starts.urls, ""))
    other = save_base(tmp_path / "other", initializer_range=0.5)
    for overrides, said in (
        ([f"policy.model_name={other}"], f"have {fingerprint_base(other)}: start it anew with `megatron-lora serve`"),
        (["policy.megatron_cfg.peft.dim=16"], "the adapter's rank is 16, and"),
        (["policy.generation.servers.urls=[http://127.0.0.1:9]"], "start it with `megatron-lora serve"),
    ):
        arguments = [str(path), f"checkpointing.checkpoint_dir={tmp_path / 'run'}", *overrides]
        ended = starts.ranks.start(arguments, tmp_path / f"output-{len(overrides[0])}").end()
        assert ended.status == 2 and said in ended.stderr, ended.stderr
        assert "adapters" not in ended.stdout and not (tmp_path / "run").exists()


def test_a_signal_ends_the_wait_for_servers(starts: Starts) -> None:
    place = starts.folder / "waiting"
    path = write_recipe(place.with_name("waiting-recipe"), ahead(starts.base, ["http://127.0.0.1:9"], ""))
    arguments = [str(path), f"checkpointing.checkpoint_dir={place}"]
    arguments.append("policy.generation.servers.start_timeout_seconds=500")
    begun = starts.ranks.start(arguments, starts.folder / "output-waiting")
    began = time.monotonic()
    ended = begun.stop_when((place / "config.yaml").is_file)
    assert_went_through(ended)
    assert "stopped by a signal while waiting for rollout servers" in ended.stdout
    assert time.monotonic() - began < 300 and not list(place.glob("step_*"))


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


def test_the_trainer_follows_the_experts_that_a_server_reports(tmp_path: Path) -> None:
    """EP=2, adapters on attention, which the server is given as they are."""
    # vLLM's product of experts on a CPU takes multiples of 32.
    moe = save_base(tmp_path / "moe", "qwen3_moe", moe_intermediate_size=64)
    given = values(moe, ["http://127.0.0.1:1"])
    given["policy"]["megatron_cfg"] = given["policy"]["megatron_cfg"] | {
        "tensor_model_parallel_size": 1,
        "expert_model_parallel_size": 2,
    }
    given["policy"]["router_replay"] = {"enabled": True}
    given["grpo"]["max_num_steps"] = 2
    with serving(write_recipe(tmp_path / "serve", given), tmp_path / "server.log") as (url, _):
        given["policy"]["generation"]["servers"]["urls"] = [url]
        lines = metrics(run(tmp_path, given, 2))
    assert [line["adapter_version"] for line in lines] == [0, 1]
    assert max(line["rollout_logprob_error"] for line in lines) < 1e-4
    # In fp32 both choose alike; what a server would report of other tokens or layers is not what the trainer chooses.
    assert max(line["routing_mismatch"] for line in lines) < 0.01
