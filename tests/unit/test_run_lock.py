"""One run at a time in a folder."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_lora.errors import UserError
from megatron_lora.trainers.run_lock import LOCK, RunLock

HOLDER = """
import sys, pathlib
from megatron_lora.trainers.run_lock import RunLock
lock = RunLock(pathlib.Path(sys.argv[1]))
lock.take()
print("taken", flush=True)
sys.stdin.read()
"""


def test_another_process_is_refused_until_the_first_one_dies(tmp_path: Path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "taken\n"
        for attempt in (RunLock(tmp_path).check, RunLock(tmp_path).take):
            with pytest.raises(UserError, match=f"is in use by another run \\(process {holder.pid} on .*, since 20"):
                attempt()
    finally:
        holder.kill()
        holder.communicate()
    # A killed run leaves its file, but no lock.
    assert (tmp_path / LOCK).exists()
    RunLock(tmp_path).check()
    with RunLock(tmp_path) as lock:
        lock.take()
        assert str(os.getpid()) in (tmp_path / LOCK).read_text()
    assert not (tmp_path / LOCK).exists()


def test_checking_writes_nothing(tmp_path: Path):
    RunLock(tmp_path / "none").check()
    RunLock(tmp_path).check()
    assert list(tmp_path.iterdir()) == []
