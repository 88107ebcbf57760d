"""Ends a run in which a rank stopped answering, and names it.

A rank that hangs leaves the others waiting in a collective, silently and for as long as the process group's own limit.
Here a thread of every rank publishes where the rank is, and looks at the others when its own rank has not come on for
too long: those that passed fewer activities are behind, those whose thread is silent are stopped.
"""

import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from megatron_lora.config.schema_run import TimeoutsConfig
from megatron_lora.runtime import activity, terminal
from megatron_lora.runtime.failure import tell
from megatron_lora.runtime.quiet import end_children
from megatron_lora.runtime.world import World

INTERVAL_SECONDS = 2.0
STORE_SECONDS = 20.0  # rank 0's machine may hold the store: one that does not answer is as good as stopped
STATUS = 1


@dataclass(frozen=True)
class Seen:
    """What a rank published. beats: how often; marks: activities passed; what: the last of them."""

    beats: int
    marks: int
    what: str


def blame(before: Mapping[int, Seen], after: Mapping[int, Seen], size: int) -> dict[int, str]:
    """Rank -> what it last did, of those that hold the others up. before, after: two looks, some beats apart."""
    silent = {rank for rank in range(size) if rank not in after or before.get(rank) == after[rank]}
    most = max((seen.marks for seen in after.values()), default=0)
    behind = {rank for rank, seen in after.items() if seen.marks < most}
    found = silent or behind or set(after)
    return {rank: after[rank].what if rank in after else "nothing yet" for rank in sorted(found)}


class _Watch(threading.Thread):
    def __init__(self, world: World, limits: TimeoutsConfig):
        super().__init__(daemon=True, name="watch")
        self.rank, self.size, self.limits = world.rank, world.size, limits
        self.store: Any = dist.PrefixStore("watch", dist.distributed_c10d._get_default_store())
        self.ended = threading.Event()
        self.beats = 0

    def run(self) -> None:
        while not self.ended.wait(INTERVAL_SECONDS):
            now = activity.current()
            limit = self.limits.slow_seconds if now.is_slow else self.limits.training_seconds
            if time.monotonic() - now.since > limit:
                self._end(now, limit)
            elif not _within(STORE_SECONDS, self._publish):
                continue  # seen again when the limit is over

    def _publish(self) -> None:
        now = activity.current()
        self.beats += 1
        self.store.set(str(self.rank), json.dumps([self.beats, now.marks, now.what]))

    def _look(self) -> dict[int, Seen]:
        self._publish()
        names = [str(rank) for rank in range(self.size)]
        return {int(name): Seen(*json.loads(self.store.get(name))) for name in names if self.store.check([name])}

    def _end(self, now: activity.Activity, limit: float) -> None:
        looks: list[dict[int, Seen]] = []
        for _ in range(2):
            if not _within(STORE_SECONDS, lambda: looks.append(self._look())):
                break
            self.ended.wait(3 * INTERVAL_SECONDS)
        if self.ended.is_set() or activity.current() != now:
            return  # it came on meanwhile
        found = blame(looks[0], looks[1], self.size) if len(looks) == 2 else {0: "it holds the ranks' store"}
        # Not sys.stderr, which a live bar shows: this belongs into the log.
        print(f"rank {self.rank} did not come on for {limit:g} s while {now.what}:", file=sys.__stderr__, flush=True)
        faulthandler.dump_traceback(file=sys.stderr.fileno(), all_threads=True)
        if self.rank == min(set(range(self.size)) - set(found), default=0):
            tell(_message(found, now, limit))
        else:
            time.sleep(10 * INTERVAL_SECONDS)  # the one that speaks leaves first, and its launcher ends the others
        end_children()
        os._exit(STATUS)


def _message(found: Mapping[int, str], now: activity.Activity, limit: float) -> str:
    ranks = "; ".join(f"rank {rank} (last: {what})" for rank, what in found.items())
    key = "slow_seconds" if now.is_slow else "training_seconds"
    log = terminal.log()
    stood = f"; where each rank stood is in {log.path}" if log is not None else ""
    return (
        f"error: no progress for {limit:g} s while {now.what}. Did not answer: {ranks}. Raise timeouts.{key} if it "
        f"only takes long{stood}. The last complete checkpoint is as it was"
    )


def _within(seconds: float, call: Callable[[], Any]) -> bool:
    """Whether a call that may wait for ever came back in time."""
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(seconds)
    return not thread.is_alive()


@contextmanager
def watched(world: World, limits: TimeoutsConfig) -> Iterator[None]:
    """While inside, a rank that does not come on for longer than the limits ends the run with status 1."""
    watch = _Watch(world, limits)
    watch.start()
    try:
        yield
    finally:
        watch.ended.set()
