"""What GRPO refuses before any weight is loaded."""

from megatron_lora.config.schema import Recipe
from megatron_lora.errors import UserError
from megatron_lora.objectives.estimators import Estimator
from megatron_lora.objectives.grpo_config import GRPOConfig
from megatron_lora.objectives.reward_shaping import scale_rewards, soft_overlong_penalty
from megatron_lora.policy.adapter_start import planned_adapter
from megatron_lora.policy.critic import critic_spec


def check_grpo(recipe: Recipe) -> None:
    """Raise UserError for keys of `grpo` and `loss_fn` that contradict each other."""
    grpo = recipe.grpo
    assert grpo is not None
    Estimator.from_config(grpo.adv_estimator).check_group_size(grpo.num_generations_per_prompt)
    loss = loss_config(recipe)
    if grpo.skip_reference_policy_logprobs_calculation and loss.reference_policy_kl_penalty > 0:
        raise UserError(
            "grpo.skip_reference_policy_logprobs_calculation=true, but loss_fn.reference_policy_kl_penalty="
            f"{loss.reference_policy_kl_penalty} needs the reference's log-probabilities; set one to false or the "
            "other to 0"
        )
    if recipe.critic is not None:
        planned = planned_adapter(recipe.policy)
        assert planned is not None
        critic_spec(planned.spec)
    _check_shaping(recipe)


def loss_config(recipe: Recipe) -> GRPOConfig:
    """`loss_fn` as the objective reads it. Raises UserError where its keys contradict each other."""
    assert recipe.policy.generation.max_new_tokens is not None
    return GRPOConfig.from_config(recipe.loss_fn, recipe.policy.generation.max_new_tokens)


def scores_all_ahead(recipe: Recipe, loss: GRPOConfig) -> bool:
    """Whether the old policy's log-probabilities of all answers must be known before the first update."""
    assert recipe.grpo is not None
    in_reward = loss.use_kl_in_reward and loss.reference_policy_kl_penalty > 0
    dropout = recipe.policy.adapter.enabled and recipe.policy.adapter.dropout > 0
    return in_reward or dropout or recipe.grpo.seq_logprob_error_threshold is not None


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


def check_async(recipe: Recipe) -> None:
    """Raise UserError for answers drawn while the policy trains, and older than it, that the loss cannot take."""
    grpo = recipe.grpo
    assert grpo is not None
    asynchronous = grpo.async_grpo
    if not asynchronous.enabled:
        return
    if grpo.use_dynamic_sampling:
        raise UserError(
            "grpo.use_dynamic_sampling=true takes as many prompts as a step turns out to need, so those of later "
            "steps cannot be asked ahead; set it or grpo.async_grpo.enabled to false"
        )
    if asynchronous.max_trajectory_age_steps and not loss_config(recipe).corrects_rollout:
        raise UserError(
            f"grpo.async_grpo.max_trajectory_age_steps={asynchronous.max_trajectory_age_steps} trains on answers of "
            "older weights, which the loss has to correct for: set loss_fn.use_importance_sampling_correction=true "
            "(weights to the policy that drew them, beside the clipped ratio) or loss_fn.proximal_policy=rollout (the "
            "clipped ratio is to that policy itself), or the age to 0"
        )
