"""What happens to a batch of rewards before advantages are computed."""

import torch
from torch import Tensor

from megatron_lora.errors import UserError


def scale_rewards(
    rewards: Tensor, source_min: float, source_max: float, target_min: float, target_max: float
) -> Tensor:
    """`grpo.reward_scaling`: clamp to [source_min, source_max], then map that range linearly onto the target's.

    Raises UserError for an empty source range.
    """
    if source_max <= source_min:
        raise UserError(
            f"grpo.reward_scaling.source_max={source_max} must be above grpo.reward_scaling.source_min={source_min}"
        )
    share = (rewards.clamp(source_min, source_max) - source_min) / (source_max - source_min)
    return target_min + share * (target_max - target_min)


def soft_overlong_penalty(
    response_lengths: Tensor, max_response_length: int, buffer_length: int, penalty: float
) -> Tensor:
    """DAPO's soft overlong punishment (Yu et al. 2025, eq. 13), to be added to the rewards.

    0 up to max_response_length - buffer_length tokens, then falling linearly to -penalty at max_response_length and
    staying there. response_lengths: [N] tokens; returns [N] fp32. Raises UserError for a buffer outside
    (0, max_response_length] or a negative penalty.
    """
    if not 0 < buffer_length <= max_response_length:
        raise UserError(
            f"grpo.reward_shaping.overlong_buffer_length={buffer_length} must be between 1 and "
            f"grpo.reward_shaping.max_response_length={max_response_length}"
        )
    if penalty < 0:
        raise UserError(f"grpo.reward_shaping.overlong_buffer_penalty={penalty} must not be negative")
    exceeded = response_lengths.float() - (max_response_length - buffer_length)
    return -(exceeded / buffer_length).clamp(0, 1) * penalty


def stop_properly_penalty(rewards: Tensor, truncated: Tensor, coef: float) -> Tensor:
    """`grpo.reward_shaping.stop_properly_penalty_coef`: the rewards of answers cut off by the limit, times coef.

    rewards: [N]; truncated: [N] bool. coef in [0, 1]: 0 takes the reward away, 1 changes nothing.
    """
    if not 0 <= coef <= 1:
        raise UserError(f"grpo.reward_shaping.stop_properly_penalty_coef={coef} must be in [0, 1]")
    return torch.where(truncated, rewards * coef, rewards)
