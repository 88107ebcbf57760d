"""A rank that stops answering ends the run: real ranks over gloo, one that sleeps and one that is stopped."""

import os
import re
import sys
from pathlib import Path

import pytest

from megatron_lora.cli import launcher
from megatron_lora.cli.launcher import Machines, launch
from megatron_lora.runtime.watch import Seen, blame

ROOT = Path(__file__).resolve().parents[2]
RANK = """
import os, signal, sys, time
import torch.distributed as dist
from megatron_lora.config.schema_run import TimeoutsConfig
from megatron_lora.runtime import terminal, watch
from megatron_lora.runtime.activity import begin, tick
from megatron_lora.runtime.world import init_distributed

watch.INTERVAL_SECONDS = 0.2
world = init_distributed(60)
dist.barrier()
limits = TimeoutsConfig(training_seconds=2.0, slow_seconds=60.0)
with terminal.output_in_log(world.rank), watch.watched(world, limits):
    begin("loading", is_slow=True)
    begin("training step 1")
    for _ in range(6):  # longer than the limit in all, with signs of life
        time.sleep(0.5)
        tick()
    dist.barrier()
    if world.rank == 1:
        print("rank 1 hangs here", flush=True)
        time.sleep(600) if sys.argv[1] == "sleeps" else os.kill(os.getpid(), signal.SIGSTOP)
    begin("training step 2")
    dist.barrier()
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["sleeps", "stops"])
def test_the_rank_that_hangs_is_named_and_the_run_ends(
    how: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setattr(launcher, "SECONDS_TO_LEAVE", 1.0)
    monkeypatch.setattr(launcher, "SECONDS_TO_STOP", 1.0)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{os.environ.get('PYTHONPATH', '')}")
    assert launch([sys.executable, "-c", RANK, how], Machines(2)) == 1
    message = capfd.readouterr().err.splitlines()[-1]
    assert (
        message.startswith("error: no progress for 2 s while training step ") and "timeouts.training_seconds" in message
    )
    assert "Did not answer: rank 1 (last: training step 1)." in message
    # Before the run has a folder, a temporary one.
    stood = re.search(r"where each rank stood is in (\S*/megatron-lora-rank-0-\w+\.log)\.", message)
    assert stood is not None and "rank 0 did not come on for 2 s" in Path(stood[1]).read_text()


def test_blame():
    """Silent ranks before those that are behind; where all stand at the same place, all."""
    look = {0: Seen(5, 3, "c"), 1: Seen(5, 2, "b"), 2: Seen(5, 3, "c")}
    later = {rank: Seen(seen.beats + 1, seen.marks, seen.what) for rank, seen in look.items()}
    assert blame(look, later, 3) == {1: "b"}
    assert blame(look, {**later, 2: look[2]}, 3) == {2: "c"}
    assert blame(look, later, 4) == {3: "nothing yet"}
    even = {rank: Seen(beats, 3, "c") for rank, beats in ((0, 7), (1, 7))}
    assert blame({rank: Seen(6, 3, "c") for rank in even}, even, 2) == {0: "c", 1: "c"}
