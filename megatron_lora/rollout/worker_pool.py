"""The user's code in worker processes that are killed when they hang, end or do not start."""

import contextlib
import json
import os
import pickle
import selectors
import signal
import subprocess
import sys
import time
import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from io import BufferedReader, BufferedWriter
from pathlib import Path
from typing import Any

from megatron_lora.rollout.worker_process import write_frame

START_SECONDS = 120.0
WORKER_FILE = Path(__file__).with_name("worker_process.py")


@dataclass(frozen=True)
class Call:
    """payload: what the worker's function is called with; it is pickled. seconds: after which it is given up."""

    payload: Any
    seconds: float


@dataclass(frozen=True)
class Reply:
    """value: what the function returned, as JSON keeps it. error: why it returned nothing; "" where it did."""

    value: Any = None
    error: str = ""


class _Worker:
    """A worker process: starting, idle, or busy with one call (its number)."""

    def __init__(self, start_frame: bytes):
        self.call: int | None = None
        self.ready = False
        self.received = b""
        self.deadline = time.monotonic() + START_SECONDS
        self.process = subprocess.Popen(
            [sys.executable, "-P", str(WORKER_FILE)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            start_new_session=True,  # so that killing it kills what the user's code has started
        )
        assert isinstance(self.process.stdin, BufferedWriter) and isinstance(self.process.stdout, BufferedReader)
        self.stdin, self.stdout = self.process.stdin, self.process.stdout
        with contextlib.suppress(BrokenPipeError):  # it ended at once; the end of its output will say so
            write_frame(self.stdin, start_frame)

    @property
    def idle(self) -> bool:
        return self.ready and self.call is None

    def send(self, number: int, frame: bytes, seconds: float) -> None:
        write_frame(self.stdin, frame)
        self.call, self.deadline = number, time.monotonic() + seconds

    def kill(self) -> int:
        """End it and all that it started; returns its exit status."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        status = self.process.wait()
        for stream in (self.stdin, self.stdout):
            with contextlib.suppress(BrokenPipeError):  # what it had not read yet
                stream.close()
        return status


def _kill_all(workers: list[_Worker], owner: int) -> None:
    if os.getpid() != owner:
        return  # a forked copy of the pool
    for worker in workers:
        worker.kill()
    workers.clear()


class WorkerPool:
    """Calls a function of the user's in processes of its own, which start with the first calls and stay until `close`.

    factory: import path `module:function` of what makes that function from `argument`, which is pickled. what: the
    user's code, in messages. num_workers: processes at most (also at most one a CPU core). Not for several threads.
    """

    def __init__(self, factory: str, argument: Any, what: str, num_workers: int):
        self.what = what
        self.workers: list[_Worker] = []
        self._num_workers = max(1, min(num_workers, len(os.sched_getaffinity(0))))
        search_path = [entry or os.getcwd() for entry in sys.path]
        self._start_frame = pickle.dumps((search_path, factory, pickle.dumps(argument)))
        self._finalizer = weakref.finalize(self, _kill_all, self.workers, os.getpid())

    def __call__(self, calls: Sequence[Call]) -> list[Reply]:
        """A reply to each call, in order. Raises RuntimeError where a process cannot start."""
        replies: list[Reply] = [Reply()] * len(calls)
        waiting = deque(range(len(calls)))
        self._drop([worker for worker in self.workers if worker.process.poll() is not None])
        try:
            while waiting or any(worker.call is not None for worker in self.workers):
                for worker in list(self.workers):
                    if worker.idle and waiting:
                        self._dispatch(worker, waiting, calls, replies)
                self._start_workers(len(waiting))
                self._await_replies(calls, replies)
        finally:
            # Interrupted calls must not leave replies that the next ones would take for their own.
            self._drop([worker for worker in self.workers if worker.call is not None])
        return replies

    def close(self) -> None:
        """End the processes. The pool can be used again, it starts new ones."""
        _kill_all(self.workers, os.getpid())

    def _start_workers(self, num_calls: int) -> None:
        """As many processes as there are calls that no other process is free, or about to be free, to take."""
        starting = sum(not worker.ready for worker in self.workers)
        for _ in range(min(num_calls - starting, self._num_workers - len(self.workers))):
            self.workers.append(_Worker(self._start_frame))

    def _dispatch(self, worker: _Worker, waiting: deque[int], calls: Sequence[Call], replies: list[Reply]) -> None:
        number = waiting.popleft()
        call = calls[number]
        try:
            frame = pickle.dumps((call.payload, call.seconds))
        except (pickle.PicklingError, TypeError, AttributeError) as error:
            replies[number] = Reply(error=f"a column of the row cannot be sent to a process: {error}")
            return
        try:
            worker.send(number, frame, call.seconds)
        except BrokenPipeError:  # it died while idle; the call never began
            waiting.appendleft(number)
            self._drop([worker])

    def _await_replies(self, calls: Sequence[Call], replies: list[Reply]) -> None:
        """Wait for the next reply or deadline, and deal with all that are there."""
        waiting = [worker for worker in self.workers if not worker.idle]
        if not waiting:
            return
        with selectors.DefaultSelector() as selector:
            for worker in waiting:
                selector.register(worker.stdout, selectors.EVENT_READ, worker)
            timeout = min(worker.deadline for worker in waiting) - time.monotonic()
            answered = [key.data for key, _ in selector.select(max(timeout, 0.0))]
        for worker in answered:
            self._take_reply(worker, replies)
        now = time.monotonic()
        for worker in waiting:
            if worker not in answered and worker.deadline <= now:
                self._give_up(worker, calls, replies)

    def _take_reply(self, worker: _Worker, replies: list[Reply]) -> None:
        line = os.read(worker.stdout.fileno(), 65536)
        worker.received += line
        if line and not line.endswith(b"\n"):
            return  # the rest of it is on its way
        line, worker.received = worker.received, b""
        message: dict[str, Any] = json.loads(line) if line.endswith(b"\n") else {}
        if not worker.ready:
            if "ready" not in message:
                status = self._drop([worker])
                reason = message.get("error", f"exit status {status}")
                raise RuntimeError(f"{self.what} worker did not start: {reason}")
            worker.ready = True
            return
        number = worker.call
        assert number is not None
        worker.call = None
        if "results" in message:
            replies[number] = Reply(message["results"])
        else:
            replies[number] = Reply(error=f"{self.what} ended its process (exit status {self._drop([worker])})")

    def _give_up(self, worker: _Worker, calls: Sequence[Call], replies: list[Reply]) -> None:
        number, worker.call = worker.call, None
        self._drop([worker])
        if number is None:
            raise RuntimeError(f"{self.what} worker did not start within {START_SECONDS:g} seconds")
        replies[number] = Reply(error=f"timed out after {calls[number].seconds:g} seconds")

    def _drop(self, workers: list[_Worker]) -> int:
        """Kill workers and forget them; returns the last one's exit status."""
        status = 0
        for worker in workers:
            status = worker.kill()
            self.workers.remove(worker)
        return status
