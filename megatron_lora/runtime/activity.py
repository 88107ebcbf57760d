"""What this rank is doing and what it holds, for messages when it ends or does not answer."""

import time
from dataclasses import dataclass, replace


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


def begin(what: str, *, is_slow: bool = False) -> None:
    """From here on this rank does `what`."""
    global _now
    _now = Activity(what, _now.marks + 1, time.monotonic(), is_slow)


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
    return dict(_held)
