"""From the rewards of a prompt's answers to advantages."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_lora.errors import UserError
from megatron_lora.objectives.kl import KLType, kl_estimate

STD_EPSILON = 1e-6
# Rewards are sums of a few products in fp64: what differs by less than this share is one number, added up in another
# order. Normalised, the difference would be small; Adam would make a whole step of it.
ROUNDING = 1e-12
LARGE_REWARD = 1e100


@dataclass
class GroupAdvantages:
    """advantages: [groups, generations] fp32. zero_variance: [groups] bool, groups whose rewards are all equal, or of
    which fewer than two answers have one."""

    advantages: Tensor
    zero_variance: Tensor

    @property
    def num_zero_variance(self) -> int:
        return int(self.zero_variance.sum())


def check_group_size(num_generations: int, leave_one_out: bool, key: str = "grpo.num_generations_per_prompt") -> None:
    """Raises UserError where a group is too small to have a baseline."""
    if num_generations < 1:
        raise UserError(f"{key}={num_generations} must be at least 1")
    if num_generations > 1:
        return
    if leave_one_out:
        raise UserError(
            f"{key}=1 leaves no other answer for grpo.use_leave_one_out_baseline=true to take the mean of; "
            f"set {key} to 2 or more"
        )
    raise UserError(
        f"{key}=1 makes every answer its own baseline, so all advantages are 0 and nothing trains; "
        f"set {key} to 2 or more"
    )


def group_advantages(rewards: Tensor, normalize: bool = True, leave_one_out: bool = True) -> GroupAdvantages:
    """A = r - baseline, divided by (std + 1e-6) with `normalize` (Shao et al. 2024, section 4.1.2).

    The baseline and the (unbiased) std are those of the group; with `leave_one_out` those of the *other* answers
    (RLOO, Ahmadian et al. 2024). An advantage whose std is 0, or undefined because only one other answer is
    left, is not divided. normalize=False, leave_one_out=False is Dr. GRPO (Liu et al. 2025).

    An answer whose reward is NaN has none (every reward abstained): its advantage is 0, and it is nobody's peer.

    rewards: [groups, generations], generations >= 2 (see `check_group_size`). Raises ValueError for an infinite one.
    """
    values = rewards.double()
    if bool(values.isinf().any()):
        raise ValueError("a reward is infinite, so its group has no advantages")
    given = ~values.isnan()
    # Squares of huge rewards overflow; the division below is the same at any scale.
    scale = values.nan_to_num(0.0).abs().amax(1, keepdim=True)
    scale = torch.where(scale > LARGE_REWARD, scale, torch.ones_like(scale))
    values = values.nan_to_num(0.0) / scale
    num_generations = values.shape[1]
    peers = given.unsqueeze(1).expand(-1, num_generations, -1)  # [groups, generations, generations]: whose peer is who
    if leave_one_out:
        peers = peers & ~torch.eye(num_generations, dtype=torch.bool, device=values.device)
    count = peers.sum(-1)
    everyone = values.unsqueeze(1).expand_as(peers)
    mean = (everyone * peers).sum(-1) / count.clamp(min=1)
    zero_variance = _equal(values, given) | (given.sum(1) < 2)
    advantages = torch.where(given & ~zero_variance.unsqueeze(1), values - mean, torch.zeros_like(values))
    if normalize:
        # Equal peers are found by comparison: the std of equal numbers can come out as a rounding error, and dividing
        # by it would make a huge advantage.
        constant = _equal(everyone, peers) | (count < 2)
        squares = (((everyone - mean.unsqueeze(-1)) * peers) ** 2).sum(-1)
        std = (squares / (count - 1).clamp(min=1)).sqrt()
        advantages = torch.where(constant, advantages * scale, advantages / (std + STD_EPSILON / scale))
    else:
        advantages = advantages * scale
    return GroupAdvantages(advantages.float(), zero_variance)


def _equal(values: Tensor, counted: Tensor) -> Tensor:
    """Whether those of `values` [..., n] that are `counted` are one number, up to the rounding of a weighted sum."""
    highest = torch.where(counted, values, float("-inf")).amax(-1)
    lowest = torch.where(counted, values, float("inf")).amin(-1)
    return ~(highest - lowest > ROUNDING * torch.maximum(highest.abs(), lowest.abs()))


def all_equal(values: Tensor) -> Tensor:
    """Whether values [n] are one number, up to the rounding of a weighted sum."""
    return _equal(values, torch.ones_like(values, dtype=torch.bool))


def clip_advantages(advantages: Tensor, low: float | None, high: float | None) -> Tensor:
    """Advantages clamped to [low, high]; None: open on that side."""
    if low is None and high is None:
        return advantages
    return advantages.clamp(low, high)


def informative_groups(rewards: Tensor) -> Tensor:
    """DAPO's dynamic sampling (Yu et al. 2025, eq. 11): which groups have answers of different reward.

    rewards: [groups, generations], before shaping, so that a length penalty does not make a group informative.
    Returns [groups] bool; a group that is False has no advantage and is to be sampled anew.
    """
    values = rewards.double()
    return ~_equal(values.nan_to_num(0.0), ~values.isnan())


def subtract_kl(
    advantages: Sequence[Tensor],
    old_logps: Sequence[Tensor],
    reference_logps: Sequence[Tensor],
    penalty: float,
    kl_type: KLType = "k3",
) -> list[Tensor]:
    """use_kl_in_reward: A_t - penalty * KL_t, per token (REINFORCE++, Hu et al. 2025).

    Each sequence holds one [S] tensor a row; log-probabilities in nats. KL is clamped as NeMo RL does (20 and 10 nats).
    """
    rows = zip(advantages, old_logps, reference_logps, strict=True)
    return [a - penalty * kl_estimate(old, reference, kl_type, 20.0, 10.0) for a, old, reference in rows]


def normalize_over_tokens(advantages: Sequence[Tensor], target_masks: Sequence[Tensor]) -> list[Tensor]:
    """REINFORCE++'s global normalisation (Hu et al. 2025): (A - mean) / std over all target tokens of the batch,
    variance at least 1e-8.

    advantages, target_masks: one [S] tensor a row. Positions without a target get 0, and so does everything where the
    targets' advantages are all equal: their computed difference from the mean is rounding.
    """
    targets = torch.cat([a[mask] for a, mask in zip(advantages, target_masks, strict=True)]).double()
    if targets.numel() == 0 or bool(all_equal(targets)):
        return [torch.zeros_like(a) for a in advantages]
    mean, variance = targets.mean(), targets.var(correction=0)
    scale = variance.clamp(min=1e-8).rsqrt()
    return [
        torch.where(mask, (a.double() - mean) * scale, 0.0).float()
        for a, mask in zip(advantages, target_masks, strict=True)
    ]
