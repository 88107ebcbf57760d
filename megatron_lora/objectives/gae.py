"""Generalized advantage estimation (Schulman et al. 2016, arXiv:1506.02438) over the tokens of answers, and the
whitening of what goes into it and comes out.

A row's steps are its target tokens, one after the other: what an environment said between them is no action and takes
no step. An answer ends its episode, whatever ended it, so that behind its last token every value is 0.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_lora.objectives.advantages import all_equal

VARIANCE_EPSILON = 1e-8


@dataclass(frozen=True)
class GAE:
    """gamma: discount a token. lam: lambda, the weight of longer estimates: 0 is r + gamma V' - V, 1 the discounted sum
    of rewards less V. whiten_rewards: divide the tokens' rewards by their deviation, their mean kept.
    whiten_advantages: (A - mean) / deviation. Both over all target tokens of the step."""

    gamma: float = 1.0
    lam: float = 1.0
    whiten_rewards: bool = False
    whiten_advantages: bool = True

    def __call__(
        self, rewards: Sequence[Tensor], values: Sequence[Tensor], masks: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """(advantages, returns), one [S] fp32 tensor a row, 0 where no target is.

        rewards, values: of each target token and of the state in front of it; masks: bool, which tokens are targets.
        One [S] tensor a row each. The returns are those of the estimate as it was: whitening changes the advantages
        alone.
        """
        if self.whiten_rewards:
            rewards = whiten(rewards, masks, keeps_mean=True)
        estimates = [
            row_advantages(reward, value, mask, self.gamma, self.lam)
            for reward, value, mask in zip(rewards, values, masks, strict=True)
        ]
        returns = [
            torch.where(mask, advantage + value.double(), 0.0).float()
            for advantage, value, mask in zip(estimates, values, masks, strict=True)
        ]
        advantages = [estimate.float() for estimate in estimates]
        return (whiten(advantages, masks) if self.whiten_advantages else advantages), returns


def row_advantages(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> Tensor:
    """A_t = delta_t + gamma lam A_{t+1}, delta_t = r_t + gamma V_{t+1} - V_t (eqs. 11 and 16). [S] each; fp64, 0 where
    the mask is False."""
    steps = mask.nonzero().flatten()
    reward, value = rewards.double()[steps].tolist(), values.double()[steps].tolist()
    found = [0.0] * len(reward)
    following = next_value = 0.0
    for t in reversed(range(len(reward))):
        following = reward[t] + gamma * next_value - value[t] + gamma * lam * following
        found[t], next_value = following, value[t]
    advantages = torch.zeros(mask.numel(), dtype=torch.float64)
    advantages[steps] = torch.tensor(found, dtype=torch.float64)
    return advantages


def reward_at_the_end(reward: float, mask: Tensor) -> Tensor:
    """[S] fp32: an answer's reward at its last target token, 0 elsewhere; all 0 where it has none."""
    rewards = torch.zeros(mask.numel())
    if bool(mask.any()):
        rewards[int(mask.nonzero().max())] = reward
    return rewards


def whiten(values: Sequence[Tensor], masks: Sequence[Tensor], *, keeps_mean: bool = False) -> list[Tensor]:
    """(x - mean) / sqrt(variance + 1e-8) over all target tokens, the mean added again with `keeps_mean` (as TRL and
    verl whiten; the variance is the unbiased one). One [S] tensor a row each; 0 where no target is.

    Numbers that are all equal have no deviation to divide by: their computed one is rounding. They keep their mean, or
    become 0.
    """
    targets = torch.cat([value[mask] for value, mask in zip(values, masks, strict=True)]).double()
    if targets.numel() == 0:
        return [torch.zeros_like(value) for value in values]
    mean = targets.mean()
    scale = torch.zeros((), dtype=torch.float64)
    if not bool(all_equal(targets)):
        scale = (targets.var(correction=1) + VARIANCE_EPSILON).rsqrt()
    kept = mean if keeps_mean else torch.zeros_like(mean)
    return [
        torch.where(mask, (value.double() - mean) * scale + kept, 0.0).float()
        for value, mask in zip(values, masks, strict=True)
    ]


def explained_variance(values: Sequence[Tensor], returns: Sequence[Tensor], masks: Sequence[Tensor]) -> float:
    """1 - Var(R - V) / Var(R) over all target tokens: 1 for a critic that foretells every return, 0 for one that knows
    their mean alone. 0 where the returns are all equal."""
    value, found = (
        torch.cat([one[mask] for one, mask in zip(rows, masks, strict=True)]).double() for rows in (values, returns)
    )
    if found.numel() == 0 or bool(all_equal(found)):
        return 0.0
    return float(1 - (found - value).var(correction=0) / found.var(correction=0))
