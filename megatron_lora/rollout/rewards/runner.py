"""Scoring a batch: cheap rewards at once, the others in worker processes that are killed when they hang."""

import contextlib
import json
import logging
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
from dataclasses import dataclass, field
from io import BufferedReader, BufferedWriter
from pathlib import Path
from types import TracebackType
from typing import Any

from megatron_lora.errors import UserError
from megatron_lora.rollout.rewards.spec import BOUNDED_KINDS, RewardSpec, build_reward, check_reward
from megatron_lora.rollout.rewards.worker import describe, write_frame

logger = logging.getLogger(__name__)

START_SECONDS = 120.0
WORKER_FILE = Path(__file__).with_name("worker.py")


@dataclass(frozen=True)
class RewardSample:
    """What is scored. extra: the data row's other fields, and "num_tokens", the completion's length in tokens."""

    prompt: str
    completion: str
    answer: str
    extra: dict = field(default_factory=dict)


@dataclass
class RewardOutcome:
    """total: the weighted sum. values: each reward's own number, unweighted, by name; 0 where it failed. errors: why,
    by name."""

    total: float = 0.0
    values: dict[str, float] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Call:
    sample: int
    spec: int


class _Worker:
    """A worker process: starting, idle, or busy with one call."""

    def __init__(self, start_frame: bytes):
        self.call: _Call | None = None
        self.ready = False
        self.deadline = time.monotonic() + START_SECONDS
        self.process = subprocess.Popen(
            [sys.executable, "-P", str(WORKER_FILE)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            start_new_session=True,  # so that killing it kills what a reward has started
        )
        assert isinstance(self.process.stdin, BufferedWriter) and isinstance(self.process.stdout, BufferedReader)
        self.stdin, self.stdout = self.process.stdin, self.process.stdout
        with contextlib.suppress(BrokenPipeError):  # it ended at once; the end of its output will say so
            write_frame(self.stdin, start_frame)

    @property
    def idle(self) -> bool:
        return self.ready and self.call is None

    def send(self, call: _Call, payload: bytes, timeout_seconds: float) -> None:
        write_frame(self.stdin, payload)
        self.call, self.deadline = call, time.monotonic() + timeout_seconds

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
        return  # a forked copy of the runner
    for worker in workers:
        worker.kill()
    workers.clear()


class RewardRunner:
    """Scores batches with the weighted sum of several rewards.

    A reward that raises, hangs beyond its `timeout_seconds`, kills its process or returns no finite number counts 0
    for that sample, with a log line; the others still count. Worker processes start with the first batch that needs
    one and stay until `close`.

    specs: the rewards, names distinct. num_workers: processes at most (also at most one a CPU core). Raises UserError
    where a reward cannot be built, RuntimeError later where a worker process cannot start. Not for several threads.
    """

    def __init__(self, specs: Sequence[RewardSpec], num_workers: int = 8):
        self.specs = [spec.resolved() for spec in specs]
        names = [spec.name for spec in self.specs]
        if not names or len(set(names)) < len(names):
            raise UserError(f"env.reward_functions has the names {names}; give one reward or more, each its own name")
        for spec in self.specs:
            check_reward(spec)
        self._inline = {i: build_reward(s) for i, s in enumerate(self.specs) if s.kind in BOUNDED_KINDS}
        self._num_workers = max(1, min(num_workers, len(os.sched_getaffinity(0))))
        self._workers: list[_Worker] = []
        search_path = [entry or os.getcwd() for entry in sys.path]
        self._start_frame = pickle.dumps((search_path, pickle.dumps(self.specs)))
        self._finalizer = weakref.finalize(self, _kill_all, self._workers, os.getpid())

    def __call__(self, samples: Sequence[RewardSample]) -> list[RewardOutcome]:
        """Score the samples, in order."""
        outcomes = [RewardOutcome() for _ in samples]
        calls: deque[_Call] = deque()
        for i, sample in enumerate(samples):
            for j in range(len(self.specs)):
                if j in self._inline:
                    self._score_inline(j, sample, outcomes[i])
                else:
                    calls.append(_Call(i, j))
        if calls:
            self._score_in_workers(calls, samples, outcomes)
        for outcome in outcomes:
            outcome.total = sum(spec.weight * outcome.values[spec.name] for spec in self.specs)
        self._log_errors(outcomes)
        return outcomes

    def close(self) -> None:
        """End the worker processes. The runner can be used again, it starts new ones."""
        _kill_all(self._workers, os.getpid())

    def __enter__(self) -> "RewardRunner":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _score_inline(self, number: int, sample: RewardSample, outcome: RewardOutcome) -> None:
        try:
            value = self._inline[number](sample.prompt, sample.completion, sample.answer, sample.extra)
            self._record(number, outcome, value=value)
        except Exception as error:
            self._record(number, outcome, error=describe(error))

    def _record(self, number: int, outcome: RewardOutcome, value: float = 0.0, error: str | None = None) -> None:
        name = self.specs[number].name
        outcome.values[name] = value
        if error is not None:
            outcome.errors[name] = error

    def _score_in_workers(
        self, calls: deque[_Call], samples: Sequence[RewardSample], outcomes: list[RewardOutcome]
    ) -> None:
        self._drop([worker for worker in self._workers if worker.process.poll() is not None])
        try:
            while calls or any(worker.call for worker in self._workers):
                for worker in list(self._workers):
                    if worker.idle and calls:
                        self._dispatch(worker, calls, samples, outcomes)
                self._start_workers(len(calls))
                self._await_replies(outcomes)
        finally:
            # An interrupted batch must not leave replies that the next one would take for its own.
            self._drop([worker for worker in self._workers if worker.call])

    def _start_workers(self, num_calls: int) -> None:
        """As many processes as there are calls that no other process is free, or about to be free, to take."""
        starting = sum(not worker.ready for worker in self._workers)
        for _ in range(min(num_calls - starting, self._num_workers - len(self._workers))):
            self._workers.append(_Worker(self._start_frame))

    def _dispatch(
        self, worker: _Worker, calls: deque[_Call], samples: Sequence[RewardSample], outcomes: list[RewardOutcome]
    ) -> None:
        call = calls.popleft()
        sample = samples[call.sample]
        try:
            payload = pickle.dumps((call.spec, (sample.prompt, sample.completion, sample.answer, sample.extra)))
        except (pickle.PicklingError, TypeError, AttributeError) as error:
            self._record(call.spec, outcomes[call.sample], error=f"extra cannot be sent to a process: {error}")
            return
        try:
            worker.send(call, payload, self.specs[call.spec].timeout_seconds)
        except BrokenPipeError:  # it died while idle; the call never began
            calls.appendleft(call)
            self._drop([worker])

    def _await_replies(self, outcomes: list[RewardOutcome]) -> None:
        """Wait for the next reply or deadline, and deal with all that are there."""
        waiting = [worker for worker in self._workers if not worker.idle]
        if not waiting:
            return
        with selectors.DefaultSelector() as selector:
            for worker in waiting:
                selector.register(worker.stdout, selectors.EVENT_READ, worker)
            timeout = min(worker.deadline for worker in waiting) - time.monotonic()
            answered = [key.data for key, _ in selector.select(max(timeout, 0.0))]
        for worker in answered:
            self._take_reply(worker, outcomes)
        now = time.monotonic()
        for worker in waiting:
            if worker not in answered and worker.deadline <= now:
                self._give_up(worker, outcomes)

    def _take_reply(self, worker: _Worker, outcomes: list[RewardOutcome]) -> None:
        line = os.read(worker.stdout.fileno(), 65536)
        message: dict[str, Any] = json.loads(line) if line else {}
        if not worker.ready:
            if "ready" not in message:
                status = self._drop([worker])
                raise RuntimeError(f"a reward worker did not start: {message.get('error', f'exit status {status}')}")
            worker.ready = True
            return
        call = worker.call
        assert call is not None
        worker.call = None
        if not line:
            message = {"error": f"the reward ended its process (exit status {self._drop([worker])})"}
        self._record(call.spec, outcomes[call.sample], message.get("value", 0.0), message.get("error"))

    def _give_up(self, worker: _Worker, outcomes: list[RewardOutcome]) -> None:
        call, worker.call = worker.call, None
        self._drop([worker])
        if call is None:
            raise RuntimeError(f"a reward worker did not start within {START_SECONDS:g} seconds")
        error = f"timed out after {self.specs[call.spec].timeout_seconds:g} seconds"
        self._record(call.spec, outcomes[call.sample], error=error)

    def _drop(self, workers: list[_Worker]) -> int:
        """Kill workers and forget them; returns the last one's exit status."""
        status = 0
        for worker in workers:
            status = worker.kill()
            self._workers.remove(worker)
        return status

    def _log_errors(self, outcomes: list[RewardOutcome]) -> None:
        for spec in self.specs:
            failed = [(i, o.errors[spec.name]) for i, o in enumerate(outcomes) if spec.name in o.errors]
            if failed:
                index, error = failed[0]
                logger.warning(
                    "reward '%s' failed and counts 0 for %d of %d samples; sample %d: %s",
                    spec.name,
                    len(failed),
                    len(outcomes),
                    index,
                    error,
                )
