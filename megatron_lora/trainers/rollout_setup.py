"""What algorithms that draw their answers share before a run: rewards, environments, batches of prompts."""

from collections.abc import Sequence
from dataclasses import replace

from megatron_lora.config.schema import Recipe
from megatron_lora.data.dataset import Prompt, PromptDataset
from megatron_lora.data.loader import GroupLoader
from megatron_lora.errors import UserError
from megatron_lora.rollout.environments import load_environment
from megatron_lora.rollout.rewards import RewardRunner, RewardSpec
from megatron_lora.trainers.rollout_turns import environment_spec


def reward_specs(recipe: Recipe) -> list[RewardSpec]:
    """The rewards that `env` names."""
    specs = [RewardSpec.from_config(entry) for entry in recipe.env.reward_functions]
    checker = recipe.env.math.math_verify_impl
    if checker != "dapo_math_verify":
        return specs
    return [replace(spec, kind=checker) if spec.kind == "math" else spec for spec in specs]


def check_reward_columns(recipe: Recipe, sets: Sequence[Sequence[Prompt]]) -> None:
    """Raises UserError where a reward function needs an argument that no row has as a column."""
    columns = {name for prompts in sets for prompt in prompts for name in prompt.extra}
    if recipe.env.environment is not None:
        columns |= {"final_turn", "num_turns"}
    # Only functions of the user's read columns; importing theirs again costs what it costs.
    with RewardRunner(reward_specs(recipe)) as runner:
        runner.check_columns(columns)


def build_prompt_loaders(
    recipe: Recipe, train: PromptDataset, validation: PromptDataset | None
) -> tuple[GroupLoader[Prompt], GroupLoader[Prompt] | None]:
    """Batches of prompts; validation reads the first `max_val_samples` prompts, in order."""
    options, own = recipe.rollouts, recipe.algorithm
    loader = GroupLoader(
        train,
        options.prompts_a_batch,
        seed=recipe.seed,
        shuffle=recipe.data.shuffle,
        size_key=f"{own}.num_prompts_per_step",
    )
    if validation is None:
        return loader, None
    first = [validation[position] for position in range(min(options.max_val_samples, len(validation)))]
    size = min(options.val_batch_size, len(first))
    return loader, GroupLoader(first, size, shuffle=False, drop_last=False, size_key=f"{own}.val_batch_size")


def check_environment(recipe: Recipe) -> None:
    """Raise UserError where answers of several turns lack what they need."""
    options, own = recipe.rollouts, recipe.algorithm
    if recipe.env.environment is None:
        if options.max_rollout_turns > 1:
            raise UserError(
                f"{own}.max_rollout_turns={options.max_rollout_turns} needs something that answers between the model's "
                f"turns: set env.environment.path to a class of yours, or {own}.max_rollout_turns=1"
            )
        return
    if options.max_rollout_turns == 1:
        raise UserError(
            f"env.environment answers between the model's turns, but {own}.max_rollout_turns=1: set it to 2 or more, "
            "or env.environment=null"
        )
    if options.oldest_answer >= 0:
        raise UserError(
            "grpo.async_grpo.enabled=true asks for whole answers ahead, and env.environment answers between their "
            "turns: set one of them to false or null"
        )
    load_environment(environment_spec(recipe))
