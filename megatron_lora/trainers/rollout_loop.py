"""The loop of algorithms that train on answers which the policy draws.

for a batch of prompts q:
    sample answers o_1 .. o_G from the policy as it is                            RolloutEngine.generate
    compute their rewards r_1 .. r_G                                              reward_answers
    make rows of them with what the objective reads                               RolloutTrainer.score
    for each part of the rows: update the policy                                  RolloutTrainer.update_on
    give the rollout engine the new weights                                       RolloutEngine.refit
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

from megatron_lora.data.batch import Row
from megatron_lora.data.dataset import Prompt
from megatron_lora.data.loader import GroupLoader
from megatron_lora.objectives.row_filters import sequence_prob_errors
from megatron_lora.policy.interface import StepResult
from megatron_lora.rollout.generator import Sample, rollout_logprob_error
from megatron_lora.rollout.rewards import RewardRunner
from megatron_lora.runtime.activity import begin
from megatron_lora.runtime.spans import span
from megatron_lora.trainers.loop import run_steps
from megatron_lora.trainers.reward_watch import RewardWatch
from megatron_lora.trainers.rollout_ahead import RolloutsAhead, describe_ages
from megatron_lora.trainers.rollout_batch import Group, describe_groups, num_generated, reward_answers
from megatron_lora.trainers.rollout_engine import TRAINING, RolloutEngine
from megatron_lora.trainers.rollout_scores import OLD, with_field
from megatron_lora.trainers.rollout_setup import reward_specs
from megatron_lora.trainers.rollout_validation import show_answer, show_samples, stop_reason, validate_answers
from megatron_lora.trainers.session import Session, StepAbandoned


def train_on_rollouts(
    session: Session,
    loader: GroupLoader[Prompt],
    validation: GroupLoader[Prompt] | None,
    kind: "type[RolloutTrainer]",
) -> None:
    """All steps of a run whose steps are `kind`'s. Collective."""
    options = session.recipe.rollouts
    engine = RolloutEngine(session, loader.dataset)
    with RewardRunner(reward_specs(session.recipe), session.recipe.env.math.num_workers) as runner:
        try:
            engine.start()
        except StepAbandoned:
            engine.close()
            session.reporter.message("stopped by a signal while waiting for rollout servers; the same command goes on")
            return
        trainer = kind(session, loader, engine, runner, shows_samples=validation is None)

        def validate() -> None:
            if validation is not None:
                validate_answers(session, engine, runner, validation)

        run_steps(
            session,
            options,
            trainer.step,
            validate,
            first_validation=options.val_start_at,
            stop_reason=lambda: stop_reason(session),
        )
        trainer.show_last_answer()
        engine.close()


@dataclass
class Rollout:
    """A step's groups, and what drawing and rewarding them took. num_dropped: groups that dynamic sampling left out."""

    groups: list[Group] = field(default_factory=list)
    seconds: float = 0.0
    reward_seconds: float = 0.0
    num_tokens: int = 0
    num_dropped: int = 0
    num_batches: int = 0


class RolloutTrainer(ABC):
    """One run's steps. shows_samples: show sample answers of training steps (there is no validation that does).

    A subclass says what the rows of a step are and how the policy is updated on a part of them.
    """

    def __init__(
        self,
        session: Session,
        loader: GroupLoader[Prompt],
        engine: RolloutEngine,
        runner: RewardRunner,
        *,
        shows_samples: bool,
    ):
        self.session, self.engine, self.runner = session, engine, runner
        self.policy, self.rollouts = session.policy, session.recipe.rollouts
        self.loader, self.prompts = loader, loader.forever()
        self.watch = RewardWatch()
        self.shows_samples = shows_samples
        self._last_groups: list[Group] = []
        self._learning_rate = 0.0
        self.ahead: RolloutsAhead | None = None
        if self.rollouts.oldest_answer >= 0:
            self.ahead = RolloutsAhead(engine, loader, self.rollouts, session.total_steps)
        self.prepare()

    @abstractmethod
    def prepare(self) -> None:
        """Make what a subclass keeps, once the rest is there. Collective."""

    @abstractmethod
    def score(self, groups: list[Group]) -> tuple[list[Row], dict[str, float]]:
        """Rows of the answers with what `update_on` reads, and what the log says of them. Within it the policy is as
        it was when the answers were drawn. Collective."""

    @abstractmethod
    def teaches(self, rows: Sequence[Row]) -> bool:
        """Whether the loss of these rows has any gradient. Adam divides a gradient by its own size, so rounding in
        place of a zero would become a whole step. Collective."""

    @abstractmethod
    def update_on(self, rows: list[Row], *, on_policy: bool) -> StepResult:
        """One update. on_policy: the first since the answers were drawn. Gives the rows' log-probabilities back where
        they lack "old_logps". Collective."""

    def unmoved(self, rows: list[Row]) -> dict[str, float]:
        """Metrics of a step without any update."""
        return {}

    def sample(self) -> Rollout:
        """The answers of a step. Collective."""
        rollout = Rollout()
        rollout.groups = self.draw(next(self.prompts), rollout)
        return rollout

    def step(self) -> None:
        """Sample, reward, update, refit, log. Collective."""
        with span("step"):
            self._step()

    def _step(self) -> None:
        start = time.perf_counter()
        number = self.session.step + 1
        begin(f"generating and rewarding answers of step {number}", is_slow=True)
        rollout = self.sample()
        sampled = time.perf_counter()
        with span("sleep"):
            self.engine.sleep()
        asleep = time.perf_counter()
        self.session.abandon_step_if_asked()
        tokens = self.policy.model_tokens
        begin(f"computing log-probabilities of step {number}")
        with span("scoring"):
            rows, values = self.score(rollout.groups)
        self.session.abandon_step_if_asked()
        scored, scored_tokens = time.perf_counter(), self.policy.model_tokens
        begin(f"training step {number}")
        with span("training"):
            result, rows = self.update(rows)
        trained, trained_tokens = time.perf_counter(), self.policy.model_tokens
        values = rollout_errors(rows, rollout.groups) | values
        self.session.step += 1
        begin(f"handing the weights of step {number} to the engine", is_slow=True)
        refit = (self.ahead or self.engine).refit(self.session.step)
        end = time.perf_counter()
        timing = {
            "generation_seconds": rollout.seconds,
            "generation_tokens_per_second": rollout.num_tokens / rollout.seconds,
            "reward_seconds": rollout.reward_seconds,
            "sleep_seconds": asleep - sampled,
            "scoring_seconds": scored - asleep,
            "training_seconds": trained - scored,
            "scoring_model_tokens": scored_tokens - tokens,
            "training_model_tokens": trained_tokens - scored_tokens,
        }
        sampling = {
            **self._versions(rollout.groups),
            "num_samples": len(rows),
            "generation_batches": rollout.num_batches,
            "dropped_groups": rollout.num_dropped,
        }
        self.session.log_train(
            result, end - start, describe_groups(rollout.groups) | values | sampling | timing | refit
        )
        period = self.rollouts.val_period
        if self.shows_samples and period and self.session.step % period == 0:
            show_samples(self.session, rollout.groups, "answers")
        self._last_groups = rollout.groups[:1]

    def show_last_answer(self) -> None:
        """One answer of the last step, for whoever looks at the end of the run."""
        if self._last_groups:
            show_answer(self.session, self._last_groups[0])

    def draw(self, prompts: list[Prompt], rollout: Rollout) -> list[Group]:
        """A batch of answers, rewarded; what it took is added to the rollout. Collective."""
        answers, seconds = self._answers(prompts, rollout.num_batches)
        drawn = time.perf_counter()
        with span("rewards"):
            groups = reward_answers(self.runner, prompts, answers, self.session.world)
        rollout.reward_seconds += time.perf_counter() - drawn
        for warning in self.watch.see([outcome for group in groups for outcome in group.outcomes]):
            self.session.reporter.warning(warning)
        rollout.seconds += seconds
        rollout.num_tokens += num_generated(groups)
        rollout.num_batches += 1
        return groups

    def _answers(self, prompts: list[Prompt], batch: int) -> tuple[list[list[Sample]], float]:
        """(each prompt's answers, seconds): drawn now, or asked for before."""
        if self.ahead is None:
            return self.engine.generate(
                prompts, self.rollouts.num_generations_per_prompt, purpose=TRAINING, batch=batch
            )
        self.ahead.ask()
        return self.ahead.collect(self.session.step, prompts)

    def _versions(self, groups: Sequence[Group]) -> dict[str, float]:
        """Of the weights that drew the step's answers; asked after the step."""
        samples = [sample for group in groups for sample in group.samples]
        values: dict[str, float] = {"adapter_version": min(sample.adapter_version for sample in samples)}
        if self.ahead is not None:
            values |= describe_ages(samples, self.session.step - 1, self.ahead.max_age)
            values |= {"stale_samples": self.ahead.num_stale, "rollout_wait_seconds": self.ahead.wait_seconds}
        return values

    def sampling(self) -> AbstractContextManager[None]:
        """Within it log-probabilities are those of the distribution that the answers were drawn from."""
        generation = self.session.recipe.policy.generation
        return self.policy.sampling(generation.temperature, top_k=generation.top_k or -1, top_p=generation.top_p)

    def update(self, rows: list[Row]) -> tuple[StepResult, list[Row]]:
        """An optimizer step for each `policy.train_global_batch_size` rows, in order: the mean of what they report, and
        the rows, all with the old policy's log-probabilities."""
        size = self.session.recipe.policy.train_global_batch_size
        results: list[StepResult] = []
        scored: list[Row] = []
        with self.sampling():
            for first in range(0, len(rows), size):
                part = rows[first : first + size]
                if self.teaches(part):
                    results.append(self.update_on(part, on_policy=not results))
                    if results[-1].logps is not None:
                        part = with_field(part, OLD, results[-1].logps)
                scored += part
        if results:
            self._learning_rate = results[-1].learning_rate
        result = mean_result(results, rows, self._learning_rate)
        if not results:
            result.metrics |= self.unmoved(scored)
        return result, scored


def rollout_errors(rows: Sequence[Row], groups: Sequence[Group]) -> dict[str, float]:
    """How far trainer and rollout engine are apart on the answers that carry loss. rows: with "old_logps"."""
    samples = [sample for group in groups for sample in group.samples]
    kept = [(row, sample) for row, sample in zip(rows, samples, strict=True) if row.num_targets]
    return {
        "rollout_logprob_error": rollout_logprob_error(
            [row.token_fields[OLD] for row, _ in kept], [sample for _, sample in kept]
        ),
        "max_seq_prob_error": max(sequence_prob_errors([row for row, _ in kept]), default=0.0),
    }


def mean_result(results: Sequence[StepResult], rows: Sequence[Row], learning_rate: float) -> StepResult:
    """The mean over a step's updates; zeros where nothing was to be learned from its answers."""
    count = max(1, len(results))
    names = list(results[0].metrics) if results else []
    metrics = {name: sum(result.metrics[name] for result in results) / count for name in names}
    return StepResult(
        loss=sum(result.loss for result in results) / count,
        metrics=metrics | {"num_updates": len(results)},
        grad_norm=sum(result.grad_norm for result in results) / count,
        learning_rate=learning_rate,
        num_target_tokens=sum(row.num_targets for row in rows),
        num_tokens=sum(len(row) for row in rows),
    )
