"""Scoring a batch: cheap rewards at once, the others in worker processes that are killed when they hang."""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from types import TracebackType

from megatron_lora.errors import UserError
from megatron_lora.rollout.rewards.calling import LARGEST, Arguments, UserReward, score_samples
from megatron_lora.rollout.rewards.spec import BOUNDED_KINDS, RewardSpec, build_reward
from megatron_lora.rollout.worker_pool import Call, WorkerPool
from megatron_lora.rollout.worker_process import LATE_EXIT_SECONDS

logger = logging.getLogger(__name__)


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
        self.pool = WorkerPool("megatron_lora.rollout.rewards.spec:build_scorer", self.specs, "a reward", num_workers)

    def __call__(self, samples: Sequence[RewardSample]) -> list[RewardOutcome]:
        """Score the samples, in order."""
        outcomes = [RewardOutcome() for _ in samples]
        everyone = range(len(samples))
        calls: list[_Call] = []
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
        self.pool.close()

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

    def _score_in_workers(
        self, calls: Sequence[_Call], samples: Sequence[RewardSample], outcomes: list[RewardOutcome]
    ) -> None:
        replies = self.pool(
            [
                Call((call.spec, [samples[place].arguments for place in call.samples]), self._seconds(call.spec))
                for call in calls
            ]
        )
        for call, reply in zip(calls, replies, strict=True):
            failed = [(0.0, reply.error)] * len(call.samples)
            self._record(call, outcomes, failed if reply.error else reply.value)

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
