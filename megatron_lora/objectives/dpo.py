"""Direct preference optimization: sigmoid DPO, its label-smoothed form, and IPO."""

from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from megatron_lora.data.batch import MicroBatch, Row, sum_by_row
from megatron_lora.errors import UserError
from megatron_lora.objectives.base import LossSum

DPOLossType = Literal["sigmoid", "ipo"]


@dataclass(frozen=True)
class DPOConfig:
    """NeMo RL's keys of the `dpo:` section that the loss reads, and this project's loss_type and label_smoothing.

    reference_policy_kl_penalty is beta (tau for IPO). *_average_log_probs: a row's log-probability is the mean over
    its target tokens, not the sum. label_smoothing: probability that a preference label is wrong, in [0, 0.5).
    """

    reference_policy_kl_penalty: float = 0.05
    preference_average_log_probs: bool = False
    sft_average_log_probs: bool = False
    sft_loss_weight: float = 0.0
    preference_loss_weight: float = 1.0
    loss_type: DPOLossType = "sigmoid"
    label_smoothing: float = 0.0

    @classmethod
    def from_config(cls, dpo: Any) -> "DPOConfig":
        """From the recipe's `dpo` section, which has the same names."""
        return cls(**{field.name: getattr(dpo, field.name) for field in fields(cls)})

    def __post_init__(self) -> None:
        if self.reference_policy_kl_penalty <= 0:
            raise UserError(
                f"dpo.reference_policy_kl_penalty={self.reference_policy_kl_penalty} (beta) must be above 0; try 0.05"
            )
        if self.loss_type not in ("sigmoid", "ipo"):
            raise UserError(f"dpo.loss_type={self.loss_type!r} is unknown; use 'sigmoid' or 'ipo'")
        if not 0 <= self.label_smoothing < 0.5:
            raise UserError(
                f"dpo.label_smoothing={self.label_smoothing} must be in [0, 0.5): it is the share of wrong labels"
            )
        if self.label_smoothing and self.loss_type == "ipo":
            raise UserError("dpo.label_smoothing applies to dpo.loss_type=sigmoid only; set it to 0 for ipo")
        if self.sft_loss_weight < 0 or self.preference_loss_weight < 0:
            raise UserError(
                f"dpo.sft_loss_weight={self.sft_loss_weight} and dpo.preference_loss_weight="
                f"{self.preference_loss_weight} must not be negative"
            )
        if self.sft_loss_weight == 0 and self.preference_loss_weight == 0:
            raise UserError("dpo.sft_loss_weight and dpo.preference_loss_weight are both 0; set one above 0")


def dpo_loss(
    policy_logps: Tensor,
    reference_logps: Tensor,
    beta: float,
    loss_type: DPOLossType = "sigmoid",
    label_smoothing: float = 0.0,
) -> Tensor:
    """Loss of each pair, from m = log(pi/pi_ref)(chosen) - log(pi/pi_ref)(rejected).

    sigmoid: -log sigmoid(beta m) (Rafailov et al. 2023, eq. 7); with label smoothing e,
    -(1-e) log sigmoid(beta m) - e log sigmoid(-beta m) (Mitchell 2023, "A note on DPO with noisy preferences").
    ipo: (m - 1/(2 beta))^2 (Azar et al. 2023, eq. 17, tau = beta).

    policy_logps, reference_logps: [pairs, 2] fp32, nats, a row's target tokens summed (or averaged, the caller's
    choice); column 0 is the chosen answer. Returns [pairs]. Raises ValueError where the two shapes differ.
    """
    if policy_logps.shape != reference_logps.shape or policy_logps.shape[-1] != 2:
        raise ValueError(
            f"want two tensors [pairs, 2], got {list(policy_logps.shape)} and {list(reference_logps.shape)}"
        )
    chosen, rejected = (policy_logps - reference_logps).unbind(-1)
    margin = chosen - rejected
    if loss_type == "ipo":
        return (margin - 1 / (2 * beta)).square()
    kept = -(1 - label_smoothing) * F.logsigmoid(beta * margin)
    return kept - label_smoothing * F.logsigmoid(-beta * margin)


class DPOObjective:
    """DPO over pairs of rows; counts pairs.

    Rows stand in pairs, chosen then rejected, within a micro-batch; padding rows (index -1) may stand between or
    after pairs. A pair in which either row has no target token carries no preference: it adds neither loss nor count.
    Reads `batch.token_fields["reference_logps"]` [T], nats. The loss of a pair is
    preference_loss_weight * dpo_loss + sft_loss_weight * (negative log-likelihood of the chosen row, summed over its
    tokens, or averaged with sft_average_log_probs); the SFT part is a mean over pairs like the preference part.
    IPO always averages over a row's tokens, which is the form that its authors evaluated.
    """

    required_token_fields = frozenset({"reference_logps"})

    def __init__(self, config: DPOConfig):
        self.config = config

    def count(self, rows: list[Row]) -> float:
        """Pairs in `rows`, which hold whole pairs in order. Raises ValueError for an odd number of rows."""
        real = [row for row in rows if row.index != -1]
        if len(real) % 2:
            raise ValueError(f"DPO rows come in pairs, got {len(real)} rows")
        pairs = zip(real[::2], real[1::2], strict=True)
        return float(sum(chosen.num_targets > 0 and rejected.num_targets > 0 for chosen, rejected in pairs))

    def __call__(self, logps: Tensor, batch: MicroBatch) -> LossSum:
        config, beta = self.config, self.config.reference_policy_kl_penalty
        pairs = _pair_rows(batch, logps.device)
        lengths = sum_by_row(torch.ones_like(logps), batch)[pairs]
        valid = (lengths > 0).all(-1)
        lengths = lengths.clamp(min=1)
        policy = sum_by_row(logps, batch)[pairs]
        reference = sum_by_row(batch.token_fields["reference_logps"].to(logps.dtype), batch)[pairs]

        average = config.preference_average_log_probs or config.loss_type == "ipo"
        scale = 1 / lengths if average else torch.ones_like(lengths)
        preference = dpo_loss(policy * scale, reference * scale, beta, config.loss_type, config.label_smoothing)
        sft = -policy[:, 0] / lengths[:, 0] if config.sft_average_log_probs else -policy[:, 0]

        def total(values: Tensor) -> Tensor:
            return torch.where(valid, values, torch.zeros_like(values)).sum()

        preference_sum, sft_sum = total(preference), total(sft)
        with torch.no_grad():
            rewards = beta * (policy - reference) * scale
            metrics = {
                "preference_loss": preference_sum.detach(),
                "sft_loss": sft_sum.detach(),
                "accuracy": total((rewards[:, 0] > rewards[:, 1]).to(logps.dtype)),
                "rewards_chosen": total(rewards[:, 0]),
                "rewards_rejected": total(rewards[:, 1]),
                "reward_margin": total(rewards[:, 0] - rewards[:, 1]),
            }
        loss = config.preference_loss_weight * preference_sum + config.sft_loss_weight * sft_sum
        return LossSum(loss=loss, metrics=metrics)


def _pair_rows(batch: MicroBatch, device: torch.device) -> Tensor:
    """Row numbers [pairs, 2] of the micro-batch's pairs, padding rows left out."""
    real = [row for row, index in enumerate(batch.row_indices) if index != -1]
    if len(real) % 2:
        raise ValueError(f"a DPO micro-batch holds whole pairs, got {len(real)} rows")
    return torch.tensor(real, dtype=torch.int64, device=device).view(-1, 2)
