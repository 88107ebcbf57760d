"""On-policy distillation: a policy learns a teacher's distribution on answers of its own.

The reverse KL divergence of the next token's distributions, D(pi || teacher) = E_{y ~ pi}[log pi(y) - log teacher(y)],
summed over the answer's tokens, is what on-policy distillation brings down (Gu et al. 2024, MiniLLM, eq. 1; Agarwal et
al. 2024, GKD, eq. 4 with beta 1). Its gradient at a token, the prefix held fixed, is E[(log pi - log teacher) grad log
pi]: REINFORCE with -(log pi - log teacher) as the drawn token's advantage.

Or the divergence is summed over the teacher's k most likely tokens of each place, which gives its gradient without
sampling noise and allows for the forward divergence D(teacher || pi), whose expectation is the teacher's.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from megatron_lora.data.batch import MicroBatch
from megatron_lora.objectives.base import CountsTargets, LossSum
from megatron_lora.objectives.grpo import clipped_policy_loss
from megatron_lora.objectives.kl import kl_estimate

TEACHER, OLD, ROLLOUT = "teacher_logps", "old_logps", "rollout_logps"
# The teacher's k most likely tokens in each token's place, and their log-probabilities.
CANDIDATES, CANDIDATE_LOGPS = "teacher_ids", "teacher_candidate_logps"
# What NeMo RL takes for the teacher's log-probability of a token outside its most likely ones.
OUTSIDE = -100.0
KLType = Literal["forward", "reverse", "mixed"]


@dataclass(frozen=True)
class DistillationObjective(CountsTargets):
    """Token fields, each [T]: "teacher_logps"; "old_logps", the policy's as training on the answers
    starts, unless on_policy; nats.

    on_policy: the first update on answers of the policy as it is, whose ratio is exactly 1; where "old_logps" is
    missing its old policy is this very forward pass. clip_low, clip_high, dual_clip: as of `clipped_policy_loss`, for
    later updates.
    """

    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    on_policy: bool = False

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
        metrics = _of_drawn_tokens(current, teacher) | {"clip_fraction": clipped.to(logps.dtype)}
        return _summed(loss, metrics, mask)


@dataclass(frozen=True)
class CandidatesObjective(CountsTargets):
    """The divergence over the teacher's k most likely tokens (NeMo RL's `kl_type` with `topk_logits_k`).

    Token fields: "teacher_ids" and "teacher_candidate_logps" [T, k], "teacher_logps" [T]; nats. Both distributions are
    taken over the k tokens alone, each divided by its sum there; with `whole` the policy's is that of the whole
    vocabulary, and the teacher gives every token outside the k a log-probability of `OUTSIDE`. forward_weight: of
    D(teacher || policy); the rest is D(policy || teacher)'s. No ratio: the gradient is that of the divergence at the
    places that the answers reached, whichever policy drew them.
    """

    candidates: ClassVar[str] = CANDIDATES

    forward_weight: float = 0.0
    whole: bool = False

    @property
    def reads_entropy(self) -> bool:
        """Whether it is called with sum p log p of the policy as a last column."""
        return self.whole and self.forward_weight < 1

    @classmethod
    def of(cls, kl_type: KLType, mixed_weight: float, *, whole: bool) -> "CandidatesObjective":
        return cls({"forward": 1.0, "reverse": 0.0, "mixed": mixed_weight}[kl_type], whole)

    def __call__(self, logps: Tensor, batch: MicroBatch) -> LossSum:
        """logps: [T, 1 + k], of the target and of the teacher's tokens in its place; [T, 2 + k] where it
        `reads_entropy`."""
        mask = batch.target_mask
        logps = torch.where(mask[:, None], logps, torch.zeros_like(logps))
        here = torch.where(mask[:, None], batch.token_fields[CANDIDATE_LOGPS].to(logps.dtype), 0.0)
        teacher = here.log_softmax(-1)
        policy = logps[:, 1 : 1 + here.shape[1]]
        policy = policy if self.whole else policy.log_softmax(-1)
        forward = (teacher.exp() * (teacher - policy)).sum(-1)
        reverse = (policy.exp() * (policy - teacher)).sum(-1)
        if self.reads_entropy:
            # Of the tokens outside: sum p log p, less their probability times the teacher's.
            reverse = reverse + logps[:, -1] - (policy.exp() * policy).sum(-1) - OUTSIDE * (1 - policy.exp().sum(-1))
        loss = self.forward_weight * forward
        if self.forward_weight < 1:
            loss = loss + (1 - self.forward_weight) * reverse
        drawn = _of_drawn_tokens(logps.detach()[:, 0], batch.token_fields[TEACHER].to(logps.dtype))
        metrics = drawn | {
            "forward_kl": forward.detach(),
            "reverse_kl": reverse.detach(),
            "teacher_candidate_mass": here.exp().sum(-1),
        }
        return _summed(loss, metrics, mask)


def _of_drawn_tokens(policy: Tensor, teacher: Tensor) -> dict[str, Tensor]:
    return {
        "teacher_kl": policy - teacher,
        "teacher_kl_k3": kl_estimate(policy, teacher, "k3"),
        "teacher_nll": -teacher,
    }


def _summed(loss: Tensor, metrics: dict[str, Tensor], mask: Tensor) -> LossSum:
    kept = {name: torch.where(mask, value, torch.zeros_like(value)).sum() for name, value in metrics.items()}
    return LossSum(loss=torch.where(mask, loss, torch.zeros_like(loss)).sum(), metrics=kept)
