"""What algorithms that draw their answers share as objects of `algorithms.py`."""

from collections.abc import Sequence
from typing import Any

from megatron_lora.config.schema import Recipe
from megatron_lora.errors import UserError
from megatron_lora.rollout.engines import check_place, engine_of
from megatron_lora.rollout.rewards import RewardRunner
from megatron_lora.runtime.world import World
from megatron_lora.trainers.algorithm import TRAIN, Algorithm, Loader
from megatron_lora.trainers.rollout_setup import (
    build_prompt_loaders,
    check_environment,
    check_reward_columns,
    reward_specs,
)

ANSWERS = ("reward", "reward_std", "reward_errors", "unrewarded", "response_length", "truncated_share", "num_samples",
           "num_turns", "environment_errors", "environment_tokens")  # fmt: skip
GENERATION = ("adapter_version", "generation_seconds", "generation_tokens_per_second")
VALIDATION = ("accuracy", "pass_k", "num_tokens", "step_time_seconds", "tokens_per_second", *ANSWERS, *GENERATION)
# Some of these are logged under some settings only.
STEPS = (
    *TRAIN, *ANSWERS, *GENERATION, "generation_batches", "dropped_groups", "num_updates", "rollout_logprob_error",
    "max_seq_prob_error", "reward_seconds", "sleep_seconds", "scoring_seconds", "training_seconds", "refit_seconds",
    "refit_bytes", "refit_proof_seconds", "scoring_model_tokens", "training_model_tokens", "refit_probe_error",
    "refit_probe_tolerance", "refit_wait_seconds", "rollout_wait_seconds", "stale_samples", "staleness_mean",
    "staleness_max", "routing_mismatch",
)  # fmt: skip


class RolloutAlgorithm(Algorithm):
    """Draws answers to prompts with the run's engine, rewards them, and trains on them."""

    curve = "reward"
    shares_prompts = True

    def check(self, recipe: Recipe, world: World) -> None:
        generation, own = recipe.policy.generation, recipe.algorithm
        RewardRunner(reward_specs(recipe), recipe.env.math.num_workers).close()
        check_environment(recipe)
        if generation.temperature == 0:
            raise UserError(
                "policy.generation.temperature=0 draws the same answer every time, so no group has an advantage; set "
                "it above 0 (1.0 is usual; val_temperature=0 is for validation)"
            )
        check_place(generation)
        if recipe.rollouts.oldest_answer >= 0 and not generation.engine.outside:
            raise UserError(
                f"{own}.async_grpo.enabled=true draws answers while the policy trains, which takes an engine outside "
                "the trainer's processes: set policy.generation.colocated.enabled=false and "
                f"policy.generation.servers.urls, or {own}.async_grpo.enabled=false"
            )
        self.check_loss(recipe)
        engine_of(generation).check(recipe.policy, world)

    def not_ready(self, recipe: Recipe, world: World) -> list[str]:
        return engine_of(recipe.policy.generation).not_ready(recipe.policy, world)

    def check_outside(self, recipe: Recipe, world: World) -> None:
        engine_of(recipe.policy.generation).check_outside(recipe.policy, world)

    def check_loss(self, recipe: Recipe) -> None:
        """Raise UserError where the loss cannot take the answers that the run draws."""

    def check_data(self, recipe: Recipe, sets: Sequence[Any]) -> None:
        check_reward_columns(recipe, sets)

    def build_loaders(self, recipe: Recipe, train: Any, validation: Any | None) -> tuple[Loader, Loader | None]:
        return build_prompt_loaders(recipe, train, validation)

    def updates_a_step(self, recipe: Recipe) -> int:
        return recipe.rollouts.num_samples // recipe.policy.train_global_batch_size

    def describe_steps(self, recipe: Recipe, loader: Loader, steps: int, updates: int) -> str:
        options = recipe.rollouts
        longest = options.num_samples * recipe.policy.max_total_sequence_length
        return (
            f"steps: {steps} of {options.num_samples} answers ({options.num_prompts_per_step} prompts x "
            f"{options.num_generations_per_prompt}), {updates} optimizer steps; at most {longest:,} tokens a step"
        )

    def metric_names(self, recipe: Recipe, kind: str) -> Sequence[str]:
        rewards = [f"reward_{entry.name or entry.kind}" for entry in recipe.env.reward_functions]
        if kind == "validation":
            return (*VALIDATION, *rewards)
        ages = [f"staleness_share_{age}" for age in range(recipe.rollouts.oldest_answer + 1)]
        return (*STEPS, *rewards, *ages)
