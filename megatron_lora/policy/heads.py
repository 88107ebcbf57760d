"""What a forward pass gives for each target of a micro-batch, out of the logits that predict it.

The log-probability of the target itself has kernels of its own in both backends (`policy.frozen_head`); other heads are
functions of the logits of a chunk of tokens, of which each tensor-parallel rank holds some columns, and are computed
anew in the backward pass. Every head gives a target's log-probability first.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_lora.data.batch import MicroBatch
from megatron_lora.lora.arithmetic import TensorParallel
from megatron_lora.objectives.base import Objective
from megatron_lora.policy.tail_cut import gathered_columns


@dataclass(frozen=True)
class Head(ABC):
    """Gives numbers of each target, fp32."""

    def wanted(self, batch: MicroBatch) -> Tensor:
        """Token ids that it is asked about: [N, m], of which the first is the target."""
        return batch.targets.unsqueeze(1)

    @abstractmethod
    def of_logits(self, logits: Tensor, wanted: Tensor, tp: TensorParallel | None, start: int) -> Tensor:
        """[c, columns] fp32, [c, m] -> [c, width]. The columns are the vocabulary's from `start` on, of the
        distribution that is asked about (-inf: what it leaves out). tp: the ranks that hold the rest; None: none."""

    @abstractmethod
    def shape(self, batch: MicroBatch) -> tuple[int, ...]:
        """Of what it gives of one target: (width,), or () for a single number."""

    def logps(self, found: Tensor) -> Tensor:
        """The targets' log-probabilities, of what the head gave: [N], nats."""
        return found[:, 0]


@dataclass(frozen=True)
class TargetLogprobs(Head):
    """The log-probability of each target: [N], without a last dimension."""

    def wanted(self, batch: MicroBatch) -> Tensor:
        return batch.targets

    def of_logits(self, logits: Tensor, wanted: Tensor, tp: TensorParallel | None, start: int) -> Tensor:
        return split_logprobs(logits, wanted.unsqueeze(1), tp, start).squeeze(1)

    def shape(self, batch: MicroBatch) -> tuple[int, ...]:
        return ()

    def logps(self, found: Tensor) -> Tensor:
        return found


@dataclass(frozen=True)
class LogprobsAt(Head):
    """Log-probabilities of the target and of the tokens that a token field [T, k] names: [N, 1 + k]. with_entropy: and
    sum p log p over the whole vocabulary, the entropy with its sign turned: [N, 2 + k]."""

    field: str
    with_entropy: bool = False

    def wanted(self, batch: MicroBatch) -> Tensor:
        return torch.cat([batch.targets.unsqueeze(1), batch.token_fields[self.field].long()], 1)

    def of_logits(self, logits: Tensor, wanted: Tensor, tp: TensorParallel | None, start: int) -> Tensor:
        logps = split_logprobs(logits, wanted, tp, start)
        return torch.cat([logps, split_negative_entropy(logits, tp)], 1) if self.with_entropy else logps

    def shape(self, batch: MicroBatch) -> tuple[int, ...]:
        return (1 + batch.token_fields[self.field].shape[1] + self.with_entropy,)


@dataclass(frozen=True)
class MostLikely(Head):
    """The target's log-probability, then those of the k most likely tokens, then their ids: [N, 1 + 2 k]. No gradients.
    fp32 holds the ids of vocabularies up to 16 million tokens."""

    k: int

    def of_logits(self, logits: Tensor, wanted: Tensor, tp: TensorParallel | None, start: int) -> Tensor:
        here = min(self.k, logits.shape[1])
        best, places = logits.topk(here, dim=1)
        best = torch.nn.functional.pad(best, (0, self.k - here), value=float("-inf"))
        ids = torch.nn.functional.pad(places + start, (0, self.k - here))
        if tp is not None and tp.size > 1:
            best, ids = gathered_columns(best, tp), gathered_columns(ids, tp)
            best, order = best.topk(self.k, dim=1)
            ids = ids.gather(1, order)
        logps = split_logprobs(logits, torch.cat([wanted, ids], 1), tp, start)
        return torch.cat([logps, ids.float()], 1)

    def shape(self, batch: MicroBatch) -> tuple[int, ...]:
        return (1 + 2 * self.k,)

    def parts(self, found: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(the targets' log-probabilities [...], those of the most likely tokens [..., k], their ids [..., k])."""
        first, logps, ids = found.split([1, self.k, self.k], dim=-1)
        return first.squeeze(-1), logps, ids


TARGETS = TargetLogprobs()


def head_of(objective: Objective) -> Head:
    """What an objective is called with."""
    field: str | None = getattr(objective, "candidates", None)
    return TARGETS if field is None else LogprobsAt(field, getattr(objective, "reads_entropy", False))


def split_logprobs(logits: Tensor, wanted: Tensor, tp: TensorParallel | None, start: int) -> Tensor:
    """Log-softmax of [c, columns from `start` on] fp32 at global columns [c, m], differentiable: [c, m]. Collective."""
    return _SplitLogprobs.apply(logits, wanted, tp if tp is not None and tp.size > 1 else None, start)  # type: ignore[return-value]


class _SplitLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, wanted: Tensor, tp: TensorParallel | None, start: int) -> Tensor:  # type: ignore[override]
        highest = _highest(logits, tp)
        local = wanted - start
        mine = (local >= 0) & (local < logits.shape[1])
        local = torch.where(mine, local, torch.zeros_like(local))
        there = logits.gather(1, local) if logits.shape[1] else logits.new_zeros(local.shape)
        there = torch.where(mine, there, torch.zeros_like(there))
        sums = torch.cat([(logits - highest[:, None]).exp().sum(1, keepdim=True), there], 1)
        if tp is not None:
            dist.all_reduce(sums, group=tp.group)
        log_normalizer = highest + sums[:, 0].log()
        ctx.save_for_backward(logits, log_normalizer, local, mine)
        return sums[:, 1:] - log_normalizer[:, None]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        logits, log_normalizer, local, mine = ctx.saved_tensors
        dlogits = (logits - log_normalizer[:, None]).exp().mul_(-grad.sum(1, keepdim=True))
        if logits.shape[1]:
            dlogits.scatter_add_(1, local, grad * mine)
        return dlogits, None, None, None


def split_negative_entropy(logits: Tensor, tp: TensorParallel | None) -> Tensor:
    """sum p log p of the softmax of [c, columns] fp32, differentiable: [c, 1]. Collective."""
    return _SplitNegativeEntropy.apply(logits, tp if tp is not None and tp.size > 1 else None)  # type: ignore[return-value]


class _SplitNegativeEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, tp: TensorParallel | None) -> Tensor:  # type: ignore[override]
        highest = _highest(logits, tp)
        sums = (logits - highest[:, None]).exp().sum(1)
        if tp is not None:
            dist.all_reduce(sums, group=tp.group)
        log_normalizer = highest + sums.log()
        logps = logits - log_normalizer[:, None]
        found = torch.where(logps == float("-inf"), 0.0, logps.exp() * logps).sum(1, keepdim=True)
        if tp is not None:
            dist.all_reduce(found, group=tp.group)
        ctx.save_for_backward(logits, log_normalizer, found)
        return found

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """d sum p log p / d z_j = p_j (log p_j - sum p log p)."""
        logits, log_normalizer, found = ctx.saved_tensors
        logps = logits - log_normalizer[:, None]
        return torch.where(logps == float("-inf"), 0.0, logps.exp() * (logps - found)) * grad, None


def _highest(logits: Tensor, tp: TensorParallel | None) -> Tensor:
    """Of each row, over the columns of all ranks: [c]."""
    highest = logits.amax(1) if logits.shape[1] else logits.new_full((logits.shape[0],), float("-inf"))
    if tp is not None:
        dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=tp.group)
    return highest
