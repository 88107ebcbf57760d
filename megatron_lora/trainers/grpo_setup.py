"""What GRPO refuses before any weight is loaded, and its loaders of prompts."""

import math
from collections.abc import Sequence
from dataclasses import replace

from megatron_lora.config.schema import PolicyConfig, Recipe
from megatron_lora.config.schema_algorithms import GrpoConfig
from megatron_lora.config.schema_generation import GenerationConfig
from megatron_lora.data.dataset import Prompt, PromptDataset
from megatron_lora.data.loader import GroupLoader
from megatron_lora.errors import UserError
from megatron_lora.objectives.estimators import Estimator
from megatron_lora.objectives.grpo_config import GRPOConfig
from megatron_lora.objectives.reward_shaping import scale_rewards, soft_overlong_penalty
from megatron_lora.rollout import vllm_engine
from megatron_lora.rollout.environments import load_environment
from megatron_lora.rollout.rewards import RewardRunner, RewardSpec
from megatron_lora.runtime.world import World
from megatron_lora.trainers.rollout_turns import environment_spec


def check_grpo(recipe: Recipe, world: World) -> None:
    """Raise UserError for what cannot be run."""
    grpo, generation = recipe.grpo, recipe.policy.generation
    assert grpo is not None
    Estimator.from_config(grpo.adv_estimator).check_group_size(grpo.num_generations_per_prompt)
    loss = loss_config(recipe)
    if grpo.skip_reference_policy_logprobs_calculation and loss.reference_policy_kl_penalty > 0:
        raise UserError(
            "grpo.skip_reference_policy_logprobs_calculation=true, but loss_fn.reference_policy_kl_penalty="
            f"{loss.reference_policy_kl_penalty} needs the reference's log-probabilities; set one to false or the "
            "other to 0"
        )
    RewardRunner(reward_specs(recipe), recipe.env.math.num_workers).close()
    _check_shaping(recipe)
    _check_environment(recipe, grpo)
    if generation.temperature == 0:
        raise UserError(
            "policy.generation.temperature=0 draws the same answer every time, so no group has an advantage; set it "
            "above 0 (1.0 is usual; val_temperature=0 is for validation)"
        )
    _check_place(generation)
    _check_async(grpo, loss, generation)
    if generation.backend == "megatron":
        _check_native(recipe.policy)
    else:
        _check_vllm(recipe.policy, world)


def loss_config(recipe: Recipe) -> GRPOConfig:
    """`loss_fn` as the objective reads it. Raises UserError where its keys contradict each other."""
    assert recipe.policy.generation.max_new_tokens is not None
    return GRPOConfig.from_config(recipe.loss_fn, recipe.policy.generation.max_new_tokens)


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


def prompts_a_batch(grpo: GrpoConfig) -> int:
    """Prompts that are answered at once: a step's, or with dynamic sampling a part or a multiple of them."""
    multiplier = grpo.batch_multiplier if grpo.use_dynamic_sampling else 1
    return math.ceil(grpo.num_prompts_per_step * multiplier)


def fewest_batches(grpo: GrpoConfig) -> int:
    """Batches of prompts that a step takes at least."""
    return math.ceil(grpo.num_prompts_per_step / prompts_a_batch(grpo))


def build_prompt_loaders(
    recipe: Recipe, train: PromptDataset, validation: PromptDataset | None
) -> tuple[GroupLoader[Prompt], GroupLoader[Prompt] | None]:
    """Batches of prompts; validation reads the first `grpo.max_val_samples` prompts, in order."""
    grpo = recipe.grpo
    assert grpo is not None
    loader = GroupLoader(
        train,
        prompts_a_batch(grpo),
        seed=recipe.seed,
        shuffle=recipe.data.shuffle,
        size_key="grpo.num_prompts_per_step",
    )
    if validation is None:
        return loader, None
    first = [validation[position] for position in range(min(grpo.max_val_samples, len(validation)))]
    size = min(grpo.val_batch_size, len(first))
    return loader, GroupLoader(first, size, shuffle=False, drop_last=False, size_key="grpo.val_batch_size")


def _check_shaping(recipe: Recipe) -> None:
    """Raise what the first step would."""
    import torch

    assert recipe.grpo is not None
    shaping, scaling = recipe.grpo.reward_shaping, recipe.grpo.reward_scaling
    nothing = torch.zeros(0)
    if scaling.enabled:
        scale_rewards(nothing, scaling.source_min, scaling.source_max, scaling.target_min, scaling.target_max)
    if shaping.enabled and shaping.stop_properly_penalty_coef is None:
        assert shaping.max_response_length is not None
        soft_overlong_penalty(
            nothing, shaping.max_response_length, shaping.overlong_buffer_length, shaping.overlong_buffer_penalty
        )


def _check_environment(recipe: Recipe, grpo: GrpoConfig) -> None:
    """Answers of several turns."""
    if recipe.env.environment is None:
        if grpo.max_rollout_turns > 1:
            raise UserError(
                f"grpo.max_rollout_turns={grpo.max_rollout_turns} needs something that answers between the model's "
                "turns: set env.environment.path to a class of yours, or grpo.max_rollout_turns=1"
            )
        return
    if grpo.max_rollout_turns == 1:
        raise UserError(
            "env.environment answers between the model's turns, but grpo.max_rollout_turns=1: set it to 2 or more, or "
            "env.environment=null"
        )
    if grpo.async_grpo.enabled:
        raise UserError(
            "grpo.async_grpo.enabled=true asks for whole answers ahead, and env.environment answers between their "
            "turns: set one of them to false or null"
        )
    load_environment(environment_spec(recipe))


def _check_place(generation: GenerationConfig) -> None:
    """Who answers where: in the trainer's processes, or servers."""
    urls = generation.servers.urls
    if generation.colocated.enabled and urls:
        raise UserError(
            f"policy.generation.servers.urls names {len(urls)} servers, but policy.generation.colocated.enabled is "
            "true; set it to false, or urls to []"
        )
    if generation.colocated.enabled:
        return
    if generation.backend != "vllm":
        raise UserError(
            f"policy.generation.colocated.enabled=false, but backend={generation.backend} generates with the training "
            "model itself; set backend to vllm or enabled to true"
        )
    if not urls:
        raise UserError(
            "policy.generation.colocated.enabled=false needs policy.generation.servers.urls, such as "
            '["http://node1:8000"]; start a server with `megatron-lora serve RECIPE.yaml --host 0.0.0.0 --port 8000`, '
            "or set enabled to true"
        )
    wrong = [url for url in urls if not url.startswith(("http://", "https://"))]
    if wrong or len(set(urls)) < len(urls):
        raise UserError(f"policy.generation.servers.urls={urls}: wanted each server once, as http://host:port")


def _check_async(grpo: GrpoConfig, loss: GRPOConfig, generation: GenerationConfig) -> None:
    """Answers that are drawn while the policy trains, and may be older than it."""
    asynchronous = grpo.async_grpo
    if not asynchronous.enabled:
        return
    if generation.colocated.enabled:
        raise UserError(
            "grpo.async_grpo.enabled=true draws answers while the policy trains, which takes an engine outside the "
            "trainer's processes: set policy.generation.colocated.enabled=false and policy.generation.servers.urls, "
            "or grpo.async_grpo.enabled=false"
        )
    if grpo.use_dynamic_sampling:
        raise UserError(
            "grpo.use_dynamic_sampling=true takes as many prompts as a step turns out to need, so those of later "
            "steps cannot be asked ahead; set it or grpo.async_grpo.enabled to false"
        )
    if asynchronous.max_trajectory_age_steps and not loss.corrects_rollout:
        raise UserError(
            f"grpo.async_grpo.max_trajectory_age_steps={asynchronous.max_trajectory_age_steps} trains on answers of "
            "older weights, which the loss has to correct for: set loss_fn.use_importance_sampling_correction=true "
            "(weights to the policy that drew them, beside the clipped ratio) or loss_fn.proximal_policy=rollout (the "
            "clipped ratio is to that policy itself), or the age to 0"
        )


def _check_native(policy: PolicyConfig) -> None:
    if not policy.megatron_cfg.enabled:
        raise UserError(
            "policy.generation.backend=megatron generates with the Megatron model, but policy.megatron_cfg.enabled "
            "is false; set policy.generation.backend=vllm or policy.megatron_cfg.enabled=true"
        )
    experts = policy.megatron_cfg.expert_model_parallel_size
    if experts > 1:
        raise UserError(
            "policy.generation.backend=megatron has no expert parallelism, but policy.megatron_cfg."
            f"expert_model_parallel_size={experts}; set policy.generation.backend=vllm or the size to 1"
        )


def _check_vllm(policy: PolicyConfig, world: World) -> None:
    generation = policy.generation
    longest = generation.vllm_cfg.max_model_len
    if longest is not None and longest > policy.max_total_sequence_length:
        raise UserError(
            f"policy.generation.vllm_cfg.max_model_len={longest} is above policy.max_total_sequence_length="
            f"{policy.max_total_sequence_length}, so answers could be longer than what can be trained on; lower it"
        )
    if generation.colocated.enabled:
        vllm_engine.check_installed(world.device)
    else:
        vllm_engine.check_servers(policy)
    rank, _ = vllm_engine.planned_slots(policy, world)
    if generation.colocated.enabled:
        vllm_engine.check_request(policy, world, vllm_engine.base_config(policy), rank)
    else:
        vllm_engine.check_rank(policy, rank)
