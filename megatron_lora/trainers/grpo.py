"""Group relative policy optimization: the loop (Shao et al. 2024, algorithm 1).

for a batch of prompts q:
    sample a group of answers o_1 .. o_G from the policy as it is                 RolloutEngine.generate
    compute their rewards r_1 .. r_G                                              reward_answers
    compute advantages relative to the group                                      Estimator
    for each part of the answers: update the policy by the clipped objective      Policy.train_step
    give the rollout engine the new weights                                       RolloutEngine.refit
"""

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

from megatron_lora.data.batch import Row
from megatron_lora.data.dataset import Prompt
from megatron_lora.data.loader import GroupLoader
from megatron_lora.errors import UserError
from megatron_lora.objectives.advantages import clip_advantages, informative_groups, subtract_kl
from megatron_lora.objectives.estimators import Estimator
from megatron_lora.objectives.grpo import GRPOObjective, set_positive_example_weights
from megatron_lora.objectives.row_filters import filter_overlong, mask_by_logprob_error, sequence_prob_errors
from megatron_lora.policy.interface import StepResult
from megatron_lora.rollout.generator import Sample, rollout_logprob_error
from megatron_lora.rollout.rewards import RewardRunner
from megatron_lora.runtime.activity import begin
from megatron_lora.runtime.spans import span
from megatron_lora.trainers.grpo_setup import loss_config, reward_specs
from megatron_lora.trainers.grpo_validation import show_answer, show_samples, stop_reason, validate_answers
from megatron_lora.trainers.loop import DataSpent, run_steps
from megatron_lora.trainers.reward_watch import RewardWatch
from megatron_lora.trainers.rollout_ahead import RolloutsAhead, describe_ages
from megatron_lora.trainers.rollout_batch import (
    Group,
    build_rows,
    describe_groups,
    is_truncated,
    num_generated,
    raw_rewards,
    reward_answers,
    shaped_rewards,
)
from megatron_lora.trainers.rollout_engine import TRAINING, RolloutEngine
from megatron_lora.trainers.rollout_scores import OLD, REFERENCE, mean_kl, scores_all_ahead, with_field, with_scores
from megatron_lora.trainers.session import Session


def train_grpo(session: Session, loader: GroupLoader[Prompt], validation: GroupLoader[Prompt] | None) -> None:
    """Raise the reward of the policy's answers."""
    options = session.recipe.grpo
    assert options is not None
    engine = RolloutEngine(session, loader.dataset)
    with RewardRunner(reward_specs(session.recipe), session.recipe.env.math.num_workers) as runner:
        engine.start()
        trainer = GRPOTrainer(session, loader, engine, runner, shows_samples=validation is None)

        def validate() -> None:
            if validation is not None:
                validate_answers(session, engine, runner, validation)

        run_steps(
            session,
            options,
            trainer.step,
            validate,
            first_validation=options.val_start_at,
            stop_reason=lambda: stop_reason(session, options),
        )
        trainer.show_last_answer()
        engine.close()


@dataclass
class Rollout:
    """A step's groups, and what drawing and rewarding them took. num_dropped: groups that dynamic sampling left out."""

    groups: list[Group]
    seconds: float
    reward_seconds: float
    num_tokens: int
    num_dropped: int
    num_batches: int


class GRPOTrainer:
    """One run's steps. shows_samples: show sample answers of training steps (there is no validation that does)."""

    def __init__(
        self,
        session: Session,
        loader: GroupLoader[Prompt],
        engine: RolloutEngine,
        runner: RewardRunner,
        *,
        shows_samples: bool,
    ):
        assert session.recipe.grpo is not None
        self.session, self.engine, self.runner = session, engine, runner
        self.policy, self.options = session.policy, session.recipe.grpo
        self.objective = GRPOObjective(loss_config(session.recipe))
        self.estimator = Estimator.from_config(self.options.adv_estimator)
        self.loader, self.prompts = loader, loader.forever()
        self.watch = RewardWatch()
        self.shows_samples = shows_samples
        self._last_groups: list[Group] = []
        self._learning_rate = 0.0
        self.ahead: RolloutsAhead | None = None
        if self.options.async_grpo.enabled:
            self.ahead = RolloutsAhead(engine, loader, self.options, session.total_steps)

    def step(self) -> None:
        """Sample, reward, update, refit, log. Collective."""
        with span("step"):
            self._step()

    def _step(self) -> None:
        start = time.perf_counter()
        number = self.session.step + 1
        begin(f"generating and rewarding answers of step {number}", is_slow=True)
        rollout = self._sample()
        sampled = time.perf_counter()
        with span("sleep"):
            self.engine.sleep()
        asleep = time.perf_counter()
        self.session.abandon_step_if_asked()
        tokens = self.policy.model_tokens
        begin(f"computing log-probabilities of step {number}")
        with span("scoring"):
            rows, values = self._score(rollout.groups)
        self.session.abandon_step_if_asked()
        scored, scored_tokens = time.perf_counter(), self.policy.model_tokens
        begin(f"training step {number}")
        with span("training"):
            result, rows = self._update(rows)
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
        period = self.options.val_period
        if self.shows_samples and period and self.session.step % period == 0:
            show_samples(self.session, rollout.groups, "answers")
        self._last_groups = rollout.groups[:1]

    def show_last_answer(self) -> None:
        """One answer of the last step, for whoever looks at the end of the run."""
        if self._last_groups:
            show_answer(self.session, self._last_groups[0])

    def _sample(self) -> Rollout:
        """Groups for a step: one batch of prompts, or with dynamic sampling (DAPO, Yu et al. 2025, section 3.2) as many
        batches as it takes until enough groups have different rewards."""
        options = self.options
        rollout = Rollout([], 0.0, 0.0, 0, 0, 0)
        while True:
            prompts = self._next_prompts(rollout)
            answers, seconds = self._answers(prompts, rollout.num_batches)
            drawn = time.perf_counter()
            with span("rewards"):
                groups = reward_answers(self.runner, prompts, answers, self.session.world)
            rollout.reward_seconds += time.perf_counter() - drawn
            self.watch.see([outcome for group in groups for outcome in group.outcomes])
            rollout.seconds += seconds
            rollout.num_tokens += num_generated(groups)
            rollout.num_batches += 1
            if not options.use_dynamic_sampling:
                rollout.groups = groups
                return rollout
            kept = informative_groups(raw_rewards(groups)).tolist()
            rollout.groups += [group for group, keep in zip(groups, kept, strict=True) if keep]
            rollout.num_dropped += kept.count(False)
            if len(rollout.groups) >= options.num_prompts_per_step:
                rollout.groups = rollout.groups[: options.num_prompts_per_step]
                return rollout
            if rollout.num_batches >= options.dynamic_sampling_max_gen_batches:
                raise UserError(
                    f"dynamic sampling found {len(rollout.groups)} groups with different rewards in "
                    f"{rollout.num_batches} batches of prompts (step {self.session.step + 1}), wanted "
                    f"grpo.num_prompts_per_step={options.num_prompts_per_step}: the prompts are too easy or too hard; "
                    "lower it, or raise grpo.dynamic_sampling_max_gen_batches or grpo.num_generations_per_prompt"
                )

    def _answers(self, prompts: list[Prompt], batch: int) -> tuple[list[list[Sample]], float]:
        """(each prompt's answers, seconds): drawn now, or asked for before."""
        if self.ahead is None:
            return self.engine.generate(prompts, self.options.num_generations_per_prompt, purpose=TRAINING, batch=batch)
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

    def _next_prompts(self, rollout: Rollout) -> list[Prompt]:
        """The next batch, where the run's epochs have one left: dynamic sampling takes more than one a step."""
        options, step = self.options, self.session.step
        prompts = next(self.prompts)
        if self.loader.epoch < options.max_num_epochs:
            return prompts
        used = (
            f"the prompts of grpo.max_num_epochs={options.max_num_epochs} are used up after step {step}: dynamic "
            f"sampling found {len(rollout.groups)} of the next step's {options.num_prompts_per_step} groups in the rest"
        )
        if step == 0:
            raise UserError(f"{used}, so no step could be taken; raise it, or give more or harder prompts")
        raise DataSpent(used)

    def _score(self, groups: list[Group]) -> tuple[list[Row], dict[str, float]]:
        """Rows with advantages and those log-probabilities that the updates do not compute themselves, and what the log
        says of them."""
        found = self.estimator.within_groups(shaped_rewards(groups, self.options))
        rows = build_rows(groups, found.advantages)
        if self.options.overlong_filtering:
            rows = filter_overlong(rows, [is_truncated(sample) for group in groups for sample in group.samples])
        rows = self._with_scores(rows, (~raw_rewards(groups).isnan()).flatten().tolist())
        values: dict[str, float] = {"zero_variance_groups": found.num_zero_variance}
        threshold = self.options.seq_logprob_error_threshold
        if threshold is not None:
            values |= rollout_errors(rows, groups)
            masked = mask_by_logprob_error(rows, threshold)
            rows, values["masked_by_logprob_error"] = masked.rows, masked.num_masked
        return rows, values

    def _with_scores(self, rows: list[Row], rewarded: Sequence[bool]) -> list[Row]:
        """What the updates need to know of the old policy and the reference, and cannot compute themselves; the
        advantages over the batch, which may need it. rewarded: whether the row's answer has a reward."""
        config = self.objective.config
        in_reward = config.use_kl_in_reward and config.reference_policy_kl_penalty > 0
        if not in_reward:
            rows = self._over_batch(rows, rewarded)
        first_update = self.session.recipe.policy.train_global_batch_size
        ahead = scores_all_ahead(self.session.recipe, config) or not self._teaches(rows[:first_update])
        reference = config.reference_policy_kl_penalty > 0
        with self._sampling():
            rows = with_scores(self.policy, rows, old_from=0 if ahead else first_update, reference=reference)
        if in_reward:
            advantages = subtract_kl(
                [row.token_fields["advantages"] for row in rows],
                [row.token_fields[OLD] for row in rows],
                [row.token_fields[REFERENCE] for row in rows],
                config.reference_policy_kl_penalty,
                config.reference_policy_kl_type,
            )
            rows = self._over_batch(with_field(rows, "advantages", advantages), rewarded)
        return rows

    def _over_batch(self, rows: list[Row], rewarded: Sequence[bool]) -> list[Row]:
        """The advantages that the loss gets: normalised over the batch where the estimator says so, then clipped."""
        low, high = self.options.advantage_clip_low, self.options.advantage_clip_high
        values = self.estimator.over_tokens(
            [row.token_fields["advantages"] for row in rows], [row.target_mask for row in rows], rewarded
        )
        return with_field(rows, "advantages", [clip_advantages(value, low, high) for value in values])

    def _sampling(self) -> AbstractContextManager[None]:
        """Within it log-probabilities are those of the distribution that the answers were drawn from."""
        generation = self.session.recipe.policy.generation
        return self.policy.sampling(generation.temperature, top_k=generation.top_k or -1, top_p=generation.top_p)

    def _update(self, rows: list[Row]) -> tuple[StepResult, list[Row]]:
        """An optimizer step for each `policy.train_global_batch_size` rows, in order: the mean of what they report, and
        the rows, all with the old policy's log-probabilities."""
        size = self.session.recipe.policy.train_global_batch_size
        results: list[StepResult] = []
        scored: list[Row] = []
        with self._sampling():
            for first in range(0, len(rows), size):
                part = rows[first : first + size]
                if self._teaches(part):
                    results.append(self._step_on(part, on_policy=not results))
                    if results[-1].logps is not None:
                        part = with_field(part, OLD, results[-1].logps)
                scored += part
        if results:
            self._learning_rate = results[-1].learning_rate
        result = mean_result(results, rows, self._learning_rate)
        config = self.objective.config
        if not results and config.reference_policy_kl_penalty > 0:
            result.metrics["kl"] = mean_kl(scored, config.reference_policy_kl_type)
        return result, scored

    def _step_on(self, rows: list[Row], *, on_policy: bool) -> StepResult:
        """One update. on_policy: the first since the answers were drawn."""
        objective = GRPOObjective(self.objective.config, on_policy=on_policy)
        if objective.config.positive_example_nll_weight > 0:
            set_positive_example_weights(rows, objective)
        return self.policy.train_step([[row] for row in rows], objective, keep_logps=OLD not in rows[0].token_fields)

    def _teaches(self, rows: Sequence[Row]) -> bool:
        """Whether the loss of these rows has any gradient: not where every group's rewards are equal (or every answer
        is filtered out) and the policy's weights are still its reference's. Adam divides a gradient by its own size,
        so rounding in place of a zero would become a whole step. Collective."""
        config = self.objective.config
        if any(bool(row.token_fields["advantages"][row.target_mask].any()) for row in rows):
            return True
        if config.positive_example_nll_weight > 0 and any(r.row_fields["reward"] > 0 and r.num_targets for r in rows):
            return True
        return config.kl_in_loss and self.objective.count(list(rows)) > 0 and not self.policy.at_reference()


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
