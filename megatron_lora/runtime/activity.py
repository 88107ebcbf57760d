"""What this rank is doing and what it holds, for messages when it ends or does not answer; what its start took."""

import os
import time
from dataclasses import dataclass, replace
from pathlib import Path


@dataclass(frozen=True)
class Activity:
    """marks: how often the activity changed; ranks of one run pass the same ones. since: time.monotonic(), of its start
    or the last sign of life. is_slow: it may take long without one."""

    what: str
    marks: int
    since: float
    is_slow: bool


_now = Activity("starting", 0, time.monotonic(), True)
_held: dict[str, int] = {}
# When each of the first activities began: what a start consists of.
_began: list[tuple[str, float]] = []
MOST_PARTS, SHORTEST_PART = 32, 0.05


def begin(what: str, *, is_slow: bool = False) -> None:
    """From here on this rank does `what`."""
    global _now
    _now = Activity(what, _now.marks + 1, time.monotonic(), is_slow)
    if len(_began) < MOST_PARTS:
        _began.append((what, _now.since))


def tick() -> None:
    """A sign of life inside an activity: a micro-batch, an answer."""
    global _now
    _now = replace(_now, since=time.monotonic())


def current() -> Activity:
    """What this rank does at the moment."""
    return _now


def hold(name: str, num_bytes: int) -> None:
    """Note what this rank holds on its GPU."""
    _held[name] = num_bytes


def held() -> dict[str, int]:
    """What was noted, in order."""
    return {name: size for name, size in _held.items() if size}


def describe_start() -> str:
    """How long this process has taken up to now by its parts, in seconds, the first of which is Python's own start with
    the imports that come before any work. Parts of no length are left out."""
    now = time.monotonic()
    began = [("importing", now - _process_seconds()), *_began]
    ends = [*(since for _, since in _began), now]
    lengths = [(what, end - since) for (what, since), end in zip(began, ends, strict=True)]
    parts = ", ".join(f"{what} {length:.1f}" for what, length in lengths if length >= SHORTEST_PART)
    return f"the first step was done {now - began[0][1]:.1f} s after the start: {parts}"


def _process_seconds() -> float:
    """How long this process has been there (proc(5): the 22nd field of stat, in clock ticks since the machine's
    start)."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
