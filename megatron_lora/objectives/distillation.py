"""On-policy distillation: a policy learns a teacher's distribution on answers of its own.

The reverse KL divergence of the next token's distributions, D(pi || teacher) = E_{y ~ pi}[log pi(y) - log teacher(y)],
summed over the answer's tokens, is what on-policy distillation brings down (Gu et al. 2024, MiniLLM, eq. 1; Agarwal et
al. 2024, GKD, eq. 4 with beta 1). Its gradient at a token, the prefix held fixed, is E[(log pi - log teacher) grad log
pi]: REINFORCE with -(log pi - log teacher) as the drawn token's advantage.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_lora.data.batch import MicroBatch, Row
from megatron_lora.objectives.base import LossSum
from megatron_lora.objectives.grpo import clipped_policy_loss
from megatron_lora.objectives.kl import kl_estimate

TEACHER, OLD, ROLLOUT = "teacher_logps", "old_logps", "rollout_logps"


@dataclass(frozen=True)
class DistillationObjective:
    """Counts tokens. Token fields, each [T]: "teacher_logps"; "old_logps", the policy's as training on the answers
    starts, unless on_policy; nats.

    on_policy: the first update on answers of the policy as it is, whose ratio is exactly 1; where "old_logps" is
    missing its old policy is this very forward pass. clip_low, clip_high, dual_clip: as of `clipped_policy_loss`, for
    later updates.
    """

    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    on_policy: bool = False

    def count(self, rows: list[Row]) -> float:
        """Target tokens."""
        return float(sum(row.num_targets for row in rows))

    def __call__(self, logps: Tensor, batch: MicroBatch) -> LossSum:
        mask = batch.target_mask
        logps = torch.where(mask, logps, torch.zeros_like(logps))
        teacher = torch.where(mask, batch.token_fields[TEACHER].to(logps.dtype), torch.zeros_like(logps))
        current = logps.detach()
        old = batch.token_fields[OLD] if OLD in batch.token_fields or not self.on_policy else current
        old = torch.where(mask, old.to(logps.dtype), torch.zeros_like(logps))
        advantages = teacher - old
        log_ratio = logps - (current if self.on_policy else old)
        loss = clipped_policy_loss(log_ratio, advantages, self.clip_low, self.clip_high, self.dual_clip)
        ratio = log_ratio.detach().exp()
        clipped = ((ratio < 1 - self.clip_low) & (advantages < 0)) | ((ratio > 1 + self.clip_high) & (advantages > 0))
        metrics = {
            "teacher_kl": current - teacher,
            "teacher_kl_k3": kl_estimate(current, teacher, "k3"),
            "teacher_nll": -teacher,
            "clip_fraction": clipped.to(logps.dtype),
        }
        kept = {name: torch.where(mask, value, torch.zeros_like(value)).sum() for name, value in metrics.items()}
        return LossSum(loss=torch.where(mask, loss, torch.zeros_like(loss)).sum(), metrics=kept)
