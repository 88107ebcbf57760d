"""Named estimators of the advantage (`grpo.adv_estimator.name`): which baseline, and what is divided by what."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from megatron_lora.objectives.advantages import (
    GroupAdvantages,
    check_group_size,
    group_advantages,
    normalize_over_tokens,
)
from megatron_lora.objectives.gae import GAE

Baseline = Literal["group", "others", "none"]


class EstimatorOptions(Protocol):
    """`grpo.adv_estimator`, every key filled in."""

    @property
    def name(self) -> str: ...
    @property
    def normalize_rewards(self) -> bool | None: ...
    @property
    def use_leave_one_out_baseline(self) -> bool | None: ...
    @property
    def minus_baseline(self) -> bool: ...
    @property
    def gae_gamma(self) -> float: ...
    @property
    def gae_lambda(self) -> float: ...
    @property
    def whiten_rewards(self) -> bool: ...
    @property
    def whiten_advantages(self) -> bool: ...


@dataclass(frozen=True)
class Estimator:
    """From a step's rewards to advantages: within each group, then over the batch.

    baseline: mean reward of the group, of the group's other answers, or 0. divides: by the standard deviation of the
    same answers. over_batch: (A - mean) / std over all target tokens of the step at the end, after a KL penalty in the
    reward. gae: advantages are those of each token, by a critic's values; the rewards are taken as they are.

    | name | within a group | over the batch | source |
    |---|---|---|---|
    | `grpo` | as the two keys say | | Shao et al. 2024, section 4.1.2 |
    | `rloo` | r - mean of the others | | Ahmadian et al. 2024 |
    | `dr_grpo` | r - mean | | Liu et al. 2025, section 3.2 |
    | `reinforce_plus_plus` | r - mean, or r | (A - mean) / std | Hu et al. 2025 |
    | `gae` | r | token by token (`objectives.gae`) | Schulman et al. 2016 |
    """

    baseline: Baseline
    divides: bool = False
    over_batch: bool = False
    gae: GAE | None = None

    @classmethod
    def from_config(cls, options: EstimatorOptions) -> "Estimator":
        if options.name == "reinforce_plus_plus":
            return cls("group" if options.minus_baseline else "none", over_batch=True)
        if options.name == "gae":
            gae = GAE(options.gae_gamma, options.gae_lambda, options.whiten_rewards, options.whiten_advantages)
            return cls("none", gae=gae)
        return cls("others" if options.use_leave_one_out_baseline else "group", divides=bool(options.normalize_rewards))

    def check_group_size(self, num_generations: int) -> None:
        """Raises UserError where a group is too small to have this baseline."""
        if self.baseline != "none":
            check_group_size(num_generations, self.baseline == "others")

    def within_groups(self, rewards: Tensor) -> GroupAdvantages:
        """rewards: [groups, generations], NaN where an answer has none: its advantage is 0."""
        found = group_advantages(rewards, normalize=self.divides, leave_one_out=self.baseline == "others")
        if self.baseline == "none":
            return GroupAdvantages(rewards.nan_to_num(0.0).float(), found.zero_variance)
        return found

    def over_tokens(
        self, advantages: Sequence[Tensor], target_masks: Sequence[Tensor], rewarded: Sequence[bool]
    ) -> list[Tensor]:
        """advantages, target_masks: one [S] tensor a row; rewarded: whether the row has a reward. Rows without one keep
        advantage 0 and have no say in mean and std."""
        if not self.over_batch:
            return list(advantages)
        masks = [mask if has else torch.zeros_like(mask) for mask, has in zip(target_masks, rewarded, strict=True)]
        return normalize_over_tokens(advantages, masks)
