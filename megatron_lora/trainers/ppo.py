"""Proximal policy optimization with a critic (Schulman et al. 2017): GRPO's steps, with advantages of each token by the
critic's values, and the critic's own updates."""

import time
from collections.abc import Sequence
from dataclasses import replace

import torch

from megatron_lora.data.batch import Row
from megatron_lora.objectives.gae import explained_variance, reward_at_the_end
from megatron_lora.objectives.value import RETURNS, VALUES, ValueObjective
from megatron_lora.policy.interface import StepResult
from megatron_lora.trainers.grpo import GRPOTrainer
from megatron_lora.trainers.rollout_batch import Group
from megatron_lora.trainers.rollout_scores import with_field

# Row field: 0 of an answer without a reward, from which nothing is learned.
REWARDED = "rewarded"


class PPOTrainer(GRPOTrainer):
    """Steps of PPO. The critic learns first, on the same parts of a step's rows as the policy."""

    def prepare(self) -> None:
        super().prepare()
        critic, config, gae = self.policy.critic, self.session.recipe.critic, self.estimator.gae
        assert critic is not None and config is not None and gae is not None
        self.critic, self.gae = critic, gae
        self.warmup_steps = config.warmup_steps
        self.value_objective = ValueObjective(config.cliprange_value)

    def score(self, groups: list[Group]) -> tuple[list[Row], dict[str, float]]:
        rows, values = super().score(groups)
        # Answers are not compared with those of their group.
        del values["zero_variance_groups"]
        return rows, values

    def with_scores(self, rows: list[Row], rewarded: Sequence[bool]) -> list[Row]:
        """An answer's reward is that of its last token; a KL penalty in the reward is each token's own."""
        rewards = [reward_at_the_end(float(row.token_fields["advantages"][0]), row.target_mask) for row in rows]
        return super().with_scores(with_field(rows, "advantages", rewards), rewarded)

    def over_batch(self, rows: list[Row], rewarded: Sequence[bool]) -> list[Row]:
        """From the tokens' rewards to values, returns and advantages."""
        rows = [
            replace(row, row_fields=row.row_fields | {REWARDED: float(has)})
            for row, has in zip(rows, rewarded, strict=True)
        ]
        values = self.critic.score(rows)
        masks = [row.target_mask for row in map(_learned, rows)]
        advantages, returns = self.gae([row.token_fields["advantages"] for row in rows], values, masks)
        rows = with_field(with_field(rows, VALUES, values), RETURNS, returns)
        return super().over_batch(with_field(rows, "advantages", advantages), rewarded)

    def teaches(self, rows: Sequence[Row]) -> bool:
        """Not while the critic warms up, nor where GRPO's rows do not."""
        return self.session.step >= self.warmup_steps and super().teaches(rows)

    def update(self, rows: list[Row]) -> tuple[StepResult, list[Row]]:
        learned = self.update_critic(rows)
        result, rows = super().update(rows)
        result.metrics = learned | result.metrics
        return result, rows

    def update_critic(self, rows: Sequence[Row]) -> dict[str, float]:
        """An optimizer step of the critic for each `policy.train_global_batch_size` rows, in order; what the log says
        of it. Collective."""
        start = time.perf_counter()
        size = self.session.recipe.policy.train_global_batch_size
        # A row keeps its place, so that policy and critic divide the step alike.
        learned = [_learned(row) for row in rows]
        parts = [learned[first : first + size] for first in range(0, len(learned), size)]
        results = [
            self.critic.train_step([[row] for row in part], self.value_objective)
            for part in parts
            if self.value_objective.count(part)
        ]
        values, returns = ([row.token_fields[name] for row in learned] for name in (VALUES, RETURNS))
        explained = explained_variance(values, returns, [row.target_mask for row in learned])
        return _describe(results) | {"explained_variance": explained, "critic_seconds": time.perf_counter() - start}


def _learned(row: Row) -> Row:
    """The row without targets where its answer has no reward."""
    return row if row.row_fields[REWARDED] else replace(row, target_mask=torch.zeros_like(row.target_mask))


def _describe(results: Sequence[StepResult]) -> dict[str, float]:
    """The mean over a step's updates; nothing where there was none."""
    values = [
        {"value_loss": result.loss, "critic_grad_norm": result.grad_norm, "critic_lr": result.learning_rate}
        | result.metrics
        for result in results
    ]
    return {name: sum(value[name] for value in values) / len(values) for name in (values[0] if values else ())}
