"""Group relative policy optimization (Shao et al. 2024, algorithm 1): what a step learns from its answers.

Advantages are relative to the group of answers to one prompt (`Estimator`), and the policy is updated by the clipped
objective (`GRPOObjective`); the loop is `rollout_loop.py`'s.
"""

from collections.abc import Sequence

from megatron_lora.config.schema import Recipe
from megatron_lora.data.batch import Row
from megatron_lora.data.dataset import Prompt
from megatron_lora.errors import UserError
from megatron_lora.objectives.advantages import clip_advantages, informative_groups, subtract_kl
from megatron_lora.objectives.estimators import Estimator
from megatron_lora.objectives.grpo import GRPOObjective, set_positive_example_weights
from megatron_lora.objectives.row_filters import filter_overlong, mask_by_logprob_error
from megatron_lora.policy.interface import StepResult
from megatron_lora.runtime.world import World
from megatron_lora.trainers.algorithm import Loader
from megatron_lora.trainers.grpo_setup import check_async, check_grpo, loss_config, scores_all_ahead
from megatron_lora.trainers.loop import DataSpent
from megatron_lora.trainers.rollout_algorithm import RolloutAlgorithm
from megatron_lora.trainers.rollout_batch import Group, build_rows, is_truncated, raw_rewards, shaped_rewards
from megatron_lora.trainers.rollout_loop import Rollout, RolloutTrainer, rollout_errors, train_on_rollouts
from megatron_lora.trainers.rollout_scores import OLD, REFERENCE, mean_kl, with_field, with_scores
from megatron_lora.trainers.session import Session


class GRPOTrainer(RolloutTrainer):
    """Steps of GRPO."""

    def prepare(self) -> None:
        recipe = self.session.recipe
        assert recipe.grpo is not None
        self.options = recipe.grpo
        self.objective = GRPOObjective(loss_config(recipe))
        self.estimator = Estimator.from_config(self.options.adv_estimator)

    def sample(self) -> Rollout:
        """Groups for a step: one batch of prompts, or with dynamic sampling (DAPO, Yu et al. 2025, section 3.2) as many
        batches as it takes until enough groups have different rewards."""
        options = self.options
        rollout = Rollout()
        while True:
            groups = self.draw(self._next_prompts(rollout), rollout)
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

    def score(self, groups: list[Group]) -> tuple[list[Row], dict[str, float]]:
        """Rows with advantages and those log-probabilities that the updates do not compute themselves."""
        found = self.estimator.within_groups(shaped_rewards(groups, self.options))
        rows = build_rows(groups, found.advantages)
        if self.options.overlong_filtering:
            rows = filter_overlong(rows, [is_truncated(sample) for group in groups for sample in group.samples])
        rows = self.with_scores(rows, (~raw_rewards(groups).isnan()).flatten().tolist())
        values: dict[str, float] = {"zero_variance_groups": found.num_zero_variance}
        threshold = self.options.seq_logprob_error_threshold
        if threshold is not None:
            values |= rollout_errors(rows, groups)
            masked = mask_by_logprob_error(rows, threshold)
            rows, values["masked_by_logprob_error"] = masked.rows, masked.num_masked
        return rows, values

    def with_scores(self, rows: list[Row], rewarded: Sequence[bool]) -> list[Row]:
        """What the updates need to know of the old policy and the reference, and cannot compute themselves; the
        advantages over the batch, which may need it. rewarded: whether the row's answer has a reward."""
        config = self.objective.config
        in_reward = config.use_kl_in_reward and config.reference_policy_kl_penalty > 0
        if not in_reward:
            rows = self.over_batch(rows, rewarded)
        first_update = self.session.recipe.policy.train_global_batch_size
        ahead = scores_all_ahead(self.session.recipe, config) or not self.teaches(rows[:first_update])
        reference = config.reference_policy_kl_penalty > 0
        with self.sampling():
            rows = with_scores(self.policy, rows, old_from=0 if ahead else first_update, reference=reference)
        if in_reward:
            advantages = subtract_kl(
                [row.token_fields["advantages"] for row in rows],
                [row.token_fields[OLD] for row in rows],
                [row.token_fields[REFERENCE] for row in rows],
                config.reference_policy_kl_penalty,
                config.reference_policy_kl_type,
            )
            rows = self.over_batch(with_field(rows, "advantages", advantages), rewarded)
        return rows

    def over_batch(self, rows: list[Row], rewarded: Sequence[bool]) -> list[Row]:
        """The advantages that the loss gets: normalised over the batch where the estimator says so, then clipped."""
        low, high = self.options.advantage_clip_low, self.options.advantage_clip_high
        values = self.estimator.over_tokens(
            [row.token_fields["advantages"] for row in rows], [row.target_mask for row in rows], rewarded
        )
        return with_field(rows, "advantages", [clip_advantages(value, low, high) for value in values])

    def update_on(self, rows: list[Row], *, on_policy: bool) -> StepResult:
        objective = GRPOObjective(self.objective.config, on_policy=on_policy)
        if objective.config.positive_example_nll_weight > 0:
            set_positive_example_weights(rows, objective)
        return self.policy.train_step([[row] for row in rows], objective, keep_logps=OLD not in rows[0].token_fields)

    def teaches(self, rows: Sequence[Row]) -> bool:
        """Not where every group's rewards are equal (or every answer is filtered out) and the policy's weights are
        still its reference's."""
        config = self.objective.config
        if any(bool(row.token_fields["advantages"][row.target_mask].any()) for row in rows):
            return True
        if config.positive_example_nll_weight > 0 and any(r.row_fields["reward"] > 0 and r.num_targets for r in rows):
            return True
        return config.kl_in_loss and self.objective.count(list(rows)) > 0 and not self.policy.at_reference()

    def unmoved(self, rows: list[Row]) -> dict[str, float]:
        config = self.objective.config
        if config.reference_policy_kl_penalty <= 0:
            return {}
        return {"kl": mean_kl(rows, config.reference_policy_kl_type)}


# Some of these are logged under some settings only.
METRICS = (
    "policy_loss", "positive_nll_loss", "advantage_abs", "probs_ratio", "probs_ratio_clamped", "clip_fraction", "kl",
    "token_mult_prob_error", "gen_kl_error", "policy_kl_error", "approx_entropy", "sampling_importance_ratio",
    "is_oob_ratio", "masked_by_logprob_error", "zero_variance_groups",
    # Of a critic.
    "value_loss", "critic_grad_norm", "critic_lr", "value_clip_fraction", "value_mean", "return_mean",
    "explained_variance", "critic_seconds",
)  # fmt: skip


class GRPO(RolloutAlgorithm):
    """The algorithm of the section `grpo`."""

    def check(self, recipe: Recipe, world: World) -> None:
        check_grpo(recipe)
        super().check(recipe, world)

    def check_loss(self, recipe: Recipe) -> None:
        check_async(recipe)

    def batches_a_step(self, recipe: Recipe) -> int:
        return -(-recipe.rollouts.num_prompts_per_step // recipe.rollouts.prompts_a_batch)

    def metric_names(self, recipe: Recipe, kind: str) -> Sequence[str]:
        names = super().metric_names(recipe, kind)
        return (*names, *METRICS) if kind == "train" else names

    def train(self, session: Session, loader: Loader, validation: Loader | None) -> None:
        from megatron_lora.trainers.ppo import PPOTrainer

        train_on_rollouts(session, loader, validation, GRPOTrainer if session.recipe.critic is None else PPOTrainer)
