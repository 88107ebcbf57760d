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
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from io import BufferedReader, BufferedWriter
from pathlib import Path
from types import TracebackType
from typing import Any

from megatron_lora.errors import UserError
from megatron_lora.rollout.rewards.calling import LARGEST, Arguments, UserReward, score_samples
from megatron_lora.rollout.rewards.spec import BOUNDED_KINDS, RewardSpec, build_reward
from megatron_lora.rollout.rewards.worker import LATE_EXIT_SECONDS, write_frame

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

    @property
    def arguments(self) -> Arguments:
        return self.prompt, self.completion, self.answer, self.extra


@dataclass
class RewardOutcome:
    """values: each reward's own number, unweighted, by name: 0 where it failed, None where it abstained. total: the
    weighted sum of those that did not abstain, None where all did. errors: why one failed, by name."""

    total: float | None = 0.0
    values: dict[str, float | None] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Call:
    samples: Sequence[int]
    spec: int


class _Worker:
    """A worker process: starting, idle, or busy with one call."""

    def __init__(self, start_frame: bytes):
        self.call: _Call | None = None
        self.ready = False
        self.received = b""
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
    for that sample (a function that takes a batch: for all of them), with a log line; the others still count. One that
    returns None abstains. Worker processes start with the first batch that needs one and stay until `close`.

    specs: the rewards, names distinct. num_workers: processes at most (also at most one a CPU core). Raises UserError
    where a reward cannot be built, RuntimeError later where a worker process cannot start. Not for several threads.
    """

    def __init__(self, specs: Sequence[RewardSpec], num_workers: int = 8):
        self.specs = [spec.resolved() for spec in specs]
        names = [spec.name for spec in self.specs]
        if not names or len(set(names)) < len(names):
            raise UserError(f"env.reward_functions has the names {names}; give one reward or more, each its own name")
        # math-verify is built in its worker alone: importing sympy takes seconds.
        self._built = {i: build_reward(s) for i, s in enumerate(self.specs) if s.kind != "math"}
        self._inline = {i for i, s in enumerate(self.specs) if s.kind in BOUNDED_KINDS}
        self._num_workers = max(1, min(num_workers, len(os.sched_getaffinity(0))))
        self._workers: list[_Worker] = []
        search_path = [entry or os.getcwd() for entry in sys.path]
        self._start_frame = pickle.dumps((search_path, pickle.dumps(self.specs)))
        self._finalizer = weakref.finalize(self, _kill_all, self._workers, os.getpid())

    def __call__(self, samples: Sequence[RewardSample]) -> list[RewardOutcome]:
        """Score the samples, in order."""
        outcomes = [RewardOutcome() for _ in samples]
        everyone = range(len(samples))
        calls: deque[_Call] = deque()
        for number in range(len(self.specs)):
            if number in self._inline:
                found = score_samples(self._built[number], [sample.arguments for sample in samples])
                self._record(_Call(everyone, number), outcomes, found)
            elif self._takes_batch(number) and samples:
                calls.append(_Call(everyone, number))
            else:
                calls.extend(_Call([place], number) for place in everyone)
        if calls:
            self._score_in_workers(calls, samples, outcomes)
        for outcome in outcomes:
            outcome.total = self._total(outcome)
        self._log_errors(outcomes)
        return outcomes

    def check_columns(self, columns: Iterable[str]) -> None:
        """Raises UserError where a user's function needs an argument that no row has as a column."""
        for reward in self._built.values():
            if isinstance(reward, UserReward):
                reward.check_columns(columns)

    def _takes_batch(self, number: int) -> bool:
        reward = self._built.get(number)
        return isinstance(reward, UserReward) and reward.takes_batch

    def _seconds(self, number: int) -> float:
        """How long a call may take. The calls of an `async` function end in time by themselves, if they are let."""
        reward = self._built.get(number)
        grace = LATE_EXIT_SECONDS / 2 if isinstance(reward, UserReward) and reward.is_async else 0.0
        return self.specs[number].timeout_seconds + grace

    def _total(self, outcome: RewardOutcome) -> float | None:
        given = [(spec.weight, outcome.values[spec.name]) for spec in self.specs]
        parts = [weight * value for weight, value in given if value is not None]
        total = sum(parts)
        if not -LARGEST <= total <= LARGEST:
            raise UserError(
                f"env.reward_functions: the weighted sum of {outcome.values} is {total}, more than a 32-bit float "
                "holds; lower the weights"
            )
        return total if parts else None

    def close(self) -> None:
        """End the worker processes. The runner can be used again, it starts new ones."""
        _kill_all(self._workers, os.getpid())

    def __enter__(self) -> "RewardRunner":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _record(
        self, call: _Call, outcomes: list[RewardOutcome], results: Sequence[tuple[float | None, str | None]]
    ) -> None:
        name = self.specs[call.spec].name
        for place, (value, error) in zip(call.samples, results, strict=True):
            outcomes[place].values[name] = value
            if error is not None:
                outcomes[place].errors[name] = error

    def _fail(self, call: _Call, outcomes: list[RewardOutcome], error: str) -> None:
        self._record(call, outcomes, [(0.0, error)] * len(call.samples))

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
        try:
            payload = pickle.dumps((call.spec, [samples[place].arguments for place in call.samples]))
        except (pickle.PicklingError, TypeError, AttributeError) as error:
            self._fail(call, outcomes, f"extra cannot be sent to a process: {error}")
            return
        try:
            worker.send(call, payload, self._seconds(call.spec))
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
        worker.received += line
        if line and not line.endswith(b"\n"):
            return  # the rest of a batch's values is on its way
        line, worker.received = worker.received, b""
        message: dict[str, Any] = json.loads(line) if line.endswith(b"\n") else {}
        if not worker.ready:
            if "ready" not in message:
                status = self._drop([worker])
                raise RuntimeError(f"a reward worker did not start: {message.get('error', f'exit status {status}')}")
            worker.ready = True
            return
        call = worker.call
        assert call is not None
        worker.call = None
        if "results" in message:
            self._record(call, outcomes, message["results"])
        else:
            self._fail(call, outcomes, f"the reward ended its process (exit status {self._drop([worker])})")

    def _give_up(self, worker: _Worker, outcomes: list[RewardOutcome]) -> None:
        call, worker.call = worker.call, None
        self._drop([worker])
        if call is None:
            raise RuntimeError(f"a reward worker did not start within {START_SECONDS:g} seconds")
        self._fail(call, outcomes, f"timed out after {self.specs[call.spec].timeout_seconds:g} seconds")

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
