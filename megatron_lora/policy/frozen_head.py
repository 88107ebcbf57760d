"""Log-probabilities of target tokens straight from hidden states, over a frozen head divided by vocabulary.

Full logits [T, vocabulary] never exist: the head is applied to chunks of tokens. The gradient of each token's
log-probability with respect to its hidden state, J_t = W[y_t] - sum_v p_tv W[v], does not depend on what is done with
it later, so it is computed in the forward pass, from the same chunk of logits, and the backward pass is one
multiplication by the incoming gradient: two products with W in all, no recomputation, for every objective.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_lora.lora.arithmetic import TensorParallel
from megatron_lora.policy.tail_cut import cut_around_targets


@dataclass(frozen=True)
class HeadOptions:
    """chunk_size: tokens a chunk; 0: all logits in one piece (the plain path). vocab_size: without padding.
    temperature: logits are divided by it; top_k, top_p: then the tail is cut (`policy.tail_cut`), -1 and 1 for all.
    softcap: c, where logits x become c tanh(x / c) before all that."""

    chunk_size: int
    vocab_size: int
    temperature: float = 1.0
    top_k: int = -1
    top_p: float = 1.0
    softcap: float | None = None

    @property
    def cuts(self) -> bool:
        """Whether log-probabilities are those of a part of the vocabulary."""
        return self.top_p < 1.0 or 0 < self.top_k < self.vocab_size

    def cut(self, logits: Tensor, targets: Tensor, tp: TensorParallel | None) -> Tensor:
        """What is left out, see `cut_around_targets`. logits: fp32, divided by the temperature."""
        return cut_around_targets(logits, targets, tp, vocab_size=self.vocab_size, top_k=self.top_k, top_p=self.top_p)


def cap_logits(logits: Tensor, softcap: float | None) -> Tensor:
    """Logits kept within +-softcap (Gemma 2, eq. in section 2); None: as they are."""
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap


def padding_columns(columns: int, tp: TensorParallel, vocab_size: int) -> int:
    """How many of this rank's last columns are vocabulary padding."""
    return min(columns, max(0, (tp.rank + 1) * columns - vocab_size))


class FrozenHead(torch.autograd.Function):
    """(hidden [t, h], weight [vocabulary / tp, h], targets [N], sources [N] or None) -> log p(target) [N] fp32, nats.

    hidden: this rank's rows under sequence parallelism. sources: which of the T tokens predicts each target; None: each
    its own. Kept for the backward pass is one [N, h] tensor, the gradient of each log-probability.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        sources: Tensor | None,
        tp: TensorParallel,
        options: HeadOptions,
    ) -> Tensor:
        needs_grad = ctx.needs_input_grad[0]
        full = tp.all_gather(hidden) if tp.sequence_parallel else hidden
        ctx.sources, ctx.num_tokens = sources, full.shape[0]
        if sources is not None:
            full = full.index_select(0, sources)
        logps = torch.empty(full.shape[0], dtype=torch.float32, device=full.device)
        jacobian = torch.empty_like(full) if needs_grad else None
        for start in range(0, full.shape[0], options.chunk_size):
            rows = slice(start, min(start + options.chunk_size, full.shape[0]))
            logps[rows], probabilities = _chunk_forward(full[rows], weight, targets[rows], tp, options, needs_grad)
            if jacobian is not None:
                torch.mm(probabilities, weight, out=jacobian[rows])
        ctx.tp = tp
        if jacobian is not None:
            ctx.save_for_backward(jacobian)
        return logps

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (jacobian,) = ctx.saved_tensors
        dhidden = jacobian * grad.to(jacobian.dtype).unsqueeze(1)
        if ctx.sources is not None:
            # In fp32: a prefix's last token sums over all rows that follow it.
            zeros = dhidden.new_zeros((ctx.num_tokens, dhidden.shape[1]), dtype=torch.float32)
            dhidden = zeros.index_add_(0, ctx.sources, dhidden.float()).to(dhidden.dtype)
        if ctx.tp.sequence_parallel:
            dhidden, _ = ctx.tp.reduce_scatter(dhidden)
        elif ctx.tp.size > 1:
            ctx.tp.all_reduce(dhidden)
        return dhidden, None, None, None, None, None


def _chunk_forward(
    hidden: Tensor, weight: Tensor, targets: Tensor, tp: TensorParallel, options: HeadOptions, needs_grad: bool
) -> tuple[Tensor, Tensor]:
    """([c] log-probabilities, [c, vocabulary / tp] (onehot - p) / temperature in hidden's dtype)."""
    logits = hidden @ weight.t()
    columns = logits.shape[1]
    padding = padding_columns(columns, tp, options.vocab_size)
    if padding:
        logits[:, -padding:] = float("-inf")
    if options.cuts:
        logits.masked_fill_(options.cut(logits.float() / options.temperature, targets, tp), float("-inf"))
    scale = 1.0 / options.temperature
    local = targets - tp.rank * columns
    mine = (local >= 0) & (local < columns)
    local = local.clamp(0, columns - 1)
    target_logit = torch.where(mine, logits.gather(1, local[:, None]).squeeze(1).float() * scale, 0.0)
    lse = _log_sum_exp(logits, scale)
    if tp.size > 1:
        lse, target_logit = _combine_over_ranks(lse, target_logit, tp)
    if needs_grad:
        logits = _softmax_gradient(logits, lse, scale)
        logits.scatter_add_(1, local[:, None], (mine * scale).to(logits.dtype)[:, None])
    return target_logit - lse, logits


def _combine_over_ranks(lse: Tensor, target_logit: Tensor, tp: TensorParallel) -> tuple[Tensor, Tensor]:
    highest = lse.clone()
    dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=tp.group)
    sums = torch.stack([(lse - highest).exp(), target_logit])
    tp.all_reduce(sums)
    return highest + sums[0].log(), sums[1]


def _log_sum_exp_eager(logits: Tensor, scale: float) -> Tensor:
    return torch.logsumexp(logits.float() * scale, dim=1)


def _softmax_gradient_eager(logits: Tensor, lse: Tensor, scale: float) -> Tensor:
    return (torch.exp(logits.float() * scale - lse[:, None]) * -scale).to(logits.dtype)


if torch.cuda.is_available():
    # One pass over the chunk's logits each, instead of one for every elementwise operation.
    _log_sum_exp = torch.compile(_log_sum_exp_eager, dynamic=True)
    _softmax_gradient = torch.compile(_softmax_gradient_eager, dynamic=True)
else:
    _log_sum_exp = _log_sum_exp_eager
    _softmax_gradient = _softmax_gradient_eager
