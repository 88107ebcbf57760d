"""Runs that are killed, told to stop, or find a damaged checkpoint end where an undisturbed run ends, bit for bit."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.end_to_end.conftest import Job, Run
from tests.support.runs import save_base
from tests.support.trainer import Ended, RankServer, read_metrics

MEASURED = ("step_time_seconds", "tokens_per_second", "peak_memory_gib")


@dataclass(frozen=True)
class Killed:
    """dir: the run's folder. first, last: how the first and the last start ended. content: of the folder after the
    kill during saving."""

    dir: Path
    first: Ended
    content: list[str]
    last: Ended


def assert_same_end(found: Path, whole: Path) -> None:
    """The same metrics at every step and the same adapter, to the last bit."""
    for kind in ("train", "validation"):
        metrics = [
            [
                {name: value for name, value in record.items() if name not in MEASURED}
                for record in read_metrics(run, kind)
            ]
            for run in (found, whole)
        ]
        assert metrics[0] == metrics[1]
    assert (found / "latest_step.txt").read_text() == (whole / "latest_step.txt").read_text() == "12\n"
    adapters = [load_file(run / "step_12" / "hf_adapter" / "adapter_model.safetensors") for run in (found, whole)]
    assert adapters[0].keys() == adapters[1].keys()
    assert all(torch.equal(tensor, adapters[1][name]) for name, tensor in adapters[0].items())


def files_of(step: Path) -> set[str]:
    return {str(path.relative_to(step)) for path in step.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def server() -> Iterator[RankServer]:
    with RankServer() as server:
        yield server


@pytest.fixture(scope="module")
def killed(job: Job, server: RankServer) -> Killed:
    """The same command three times: its ranks are killed between two steps, all of it is killed while it saves, and
    then it is left alone, but with its newest checkpoint damaged before."""
    run_dir = job.root / "killed"
    arguments = job.arguments(run_dir)
    first = server.start(arguments, job.root / "first").kill_when(lambda: len(read_metrics(run_dir)) >= 7)
    assert (run_dir / "latest_step.txt").read_text() == "6\n"
    server.start(arguments, job.root / "second").kill_when((run_dir / ".step_9.partial").exists)
    content = sorted(path.name for path in run_dir.iterdir())
    shard = max((run_dir / "step_6" / "policy" / "optimizer").glob("*.distcp"), key=lambda path: path.stat().st_size)
    os.truncate(shard, shard.stat().st_size // 2)
    return Killed(run_dir, first, content, server.start(arguments, job.root / "third").end())


def test_a_crash_leaves_no_process(killed: Killed):
    assert killed.first.status != 0 and killed.first.left == []


def test_kill_leaves_complete_checkpoints_alone(killed: Killed):
    steps = [name for name in killed.content if "step_" in name]
    assert steps == [".step_9.partial", "step_3", "step_6"]


def test_damaged_checkpoint_is_skipped_with_a_notice(killed: Killed):
    assert killed.last.status == 0, killed.last.stderr[-3000:]
    notice = next(line for line in killed.last.stdout.splitlines() if "is not complete" in line)
    assert "step_6" in notice and ".distcp has" in notice and "skipped" in notice
    assert f"resumed from {killed.dir / 'step_3'}" in killed.last.stdout


def test_killed_run_ends_where_the_whole_run_ends(killed: Killed, whole_run: Run):
    assert_same_end(killed.dir, whole_run.dir)
    assert sorted(path.name for path in killed.dir.glob("*step_*")) == ["step_12", "step_6"]
    assert killed.last.left == []


@pytest.mark.long
def test_a_killed_run_of_experts_ends_where_the_whole_run_ends(job: Job, server: RankServer, tmp_path: Path):
    """EP=2, adapters with dropout on attention and experts, the routers' auxiliary loss added."""
    base = save_base(tmp_path / "base", "qwen3_moe", num_hidden_layers=2, max_position_embeddings=512)
    megatron = "policy.megatron_cfg"
    arguments = [
        str(job.recipe),
        f"policy.model_name={base}",
        f"policy.tokenizer.name={base}",
        f"{megatron}.expert_model_parallel_size=2",
        f"{megatron}.moe_router_load_balancing_type=aux_loss",
        f"{megatron}.peft.target_modules=[linear_qkv, linear_proj, linear_fc1, linear_fc2]",
    ]
    runs = {}
    for name in ("whole", "killed"):
        runs[name] = [*arguments, f"checkpointing.checkpoint_dir={tmp_path / name}"]
    whole = server.start(runs["whole"], tmp_path / "first").end()
    assert whole.status == 0, whole.stderr[-3000:]
    killed = tmp_path / "killed"
    ended = server.start(runs["killed"], tmp_path / "second").kill_when(lambda: len(read_metrics(killed)) >= 7)
    assert ended.status != 0 and ended.left == []
    last = server.start(runs["killed"], tmp_path / "third").end()
    assert last.status == 0, last.stderr[-3000:]
    assert f"resumed from {killed / 'step_6'}" in last.stdout
    assert_same_end(killed, tmp_path / "whole")
    assert all(record["load_balancing_loss"] > 0 for record in read_metrics(killed))


@dataclass(frozen=True)
class Stopped:
    """dir: the run's folder. first, timed, last: how the starts ended. steps: those in metrics.jsonl after the first;
    latest: latest_step.txt after the first two."""

    dir: Path
    first: Ended
    steps: list[int]
    timed: Ended
    latest: list[str]
    last: Ended


@pytest.fixture(scope="module")
def stopped(job: Job, server: RankServer) -> Stopped:
    """A run that saves in the background, told to stop by SIGTERM, then by a limit of time that is over after any step,
    then left alone."""
    run_dir = job.root / "stopped"
    arguments = [*job.arguments(run_dir), "policy.megatron_cfg.checkpoint.async_save=true"]
    first = server.start(arguments, job.root / "fourth").stop_when(lambda: len(read_metrics(run_dir)) >= 4)
    steps = [record["step"] for record in read_metrics(run_dir)]
    latest = [(run_dir / "latest_step.txt").read_text()]
    limit = "checkpointing.checkpoint_must_save_by=00:00:00:00"
    timed = server.start([*arguments, limit], job.root / "timed").end()
    latest.append((run_dir / "latest_step.txt").read_text())
    return Stopped(run_dir, first, steps, timed, latest, server.start(arguments, job.root / "fifth").end())


def test_sigterm_saves_and_ends_with_status_0(stopped: Stopped):
    assert stopped.first.status == 0, stopped.first.stderr[-3000:]
    step = stopped.steps[-1]
    assert 4 <= step < 11 and stopped.latest[0] == f"{step}\n"
    assert f"stopped by a signal after step {step}; the same command goes on" in stopped.first.stdout
    assert stopped.first.left == []


def test_a_run_out_of_time_saves_and_ends_with_status_0(stopped: Stopped):
    assert stopped.timed.status == 0, stopped.timed.stderr[-3000:]
    step = stopped.steps[-1] + 1
    assert stopped.latest[1] == f"{step}\n" and stopped.timed.left == []
    told = f"stopped after step {step}: checkpointing.checkpoint_must_save_by=00:00:00:00 leaves no time for another"
    assert told in stopped.timed.stdout


def test_stopped_run_ends_where_the_whole_run_ends(stopped: Stopped, whole_run: Run):
    assert stopped.last.status == 0, stopped.last.stderr[-3000:]
    assert f"resumed from {stopped.dir / f'step_{stopped.steps[-1] + 1}'}" in stopped.last.stdout
    assert stopped.last.left == []
    assert_same_end(stopped.dir, whole_run.dir)


def test_saving_in_the_background_writes_the_same_files(stopped: Stopped, whole_run: Run):
    assert files_of(stopped.dir / "step_12") == files_of(whole_run.dir / "step_12")
