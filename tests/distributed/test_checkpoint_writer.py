"""The process that writes a checkpoint in the background ends with its rank, however that ends."""

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.launch import ROOT

pytestmark = [pytest.mark.long, pytest.mark.timeout(200)]

RANK = """
import os, sys, time
from megatron_lora.runtime.cpu import install_cpu_stand_ins
from megatron_lora.runtime.world import init_distributed

init_distributed()
install_cpu_stand_ins()
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron_lora.policy.megatron.checkpoint import schedule_requests

def write(rank, buckets, results):
    with open(sys.argv[1] + ".new", "w") as stream:
        stream.write(str(os.getpid()))
    os.rename(sys.argv[1] + ".new", sys.argv[1])
    time.sleep(600)

schedule_requests([AsyncRequest(write, (0, [], None), [])])
time.sleep(600)
"""


def test_a_killed_rank_leaves_no_writer(tmp_path: Path) -> None:
    """One that went on could write into the folder of the run that takes over."""
    told = tmp_path / "writer"
    rank = subprocess.Popen([sys.executable, "-c", RANK, str(told)], cwd=ROOT)
    try:
        wait_until(told.exists, seconds=120)
        writer = int(told.read_text())
        assert alive(writer)
        rank.kill()
        rank.wait()
        wait_until(lambda: not alive(writer), seconds=20)
    finally:
        rank.kill()


def alive(pid: int) -> bool:
    """Whether the process runs; one that is dead and not yet waited for does not."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def wait_until(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not so after {seconds} s"
        time.sleep(0.1)
