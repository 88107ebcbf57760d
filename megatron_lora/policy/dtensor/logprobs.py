"""From packed tokens to log-probabilities: the module that FSDP calls, and the head in chunks, over TP ranks or whole.

Full logits [T, vocabulary] never exist: the head is applied to chunks of tokens, and a frozen head's gradient is taken
in the forward pass (`policy.frozen_head`); a head that trains is recomputed in the backward pass.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from megatron_lora.config.schema import PolicyConfig
from megatron_lora.data.batch import MicroBatch
from megatron_lora.lora.arithmetic import TensorParallel
from megatron_lora.lora.layout import ModelSpec
from megatron_lora.policy.dtensor.adapter import AdaptedLinear, gives_values
from megatron_lora.policy.dtensor.attention import Packing
from megatron_lora.policy.frozen_head import FrozenHead, HeadOptions


class PolicyModule(nn.Module):
    """A transformers causal language model called for the log-probabilities of a micro-batch's targets."""

    def __init__(self, model: Any, policy: PolicyConfig, tp_mesh: DeviceMesh, shapes: ModelSpec, softcap: float | None):
        super().__init__()
        self.model = model
        self.tp_mesh = tp_mesh
        size = tp_mesh.size()
        self.tp = TensorParallel(
            group=tp_mesh.get_group(),
            size=size,
            rank=tp_mesh.get_local_rank(),
            sequence_parallel=policy.dtensor_cfg.sequence_parallel and size > 1,
        )
        self.head = HeadOptions(
            chunk_size=policy.megatron_cfg.fused_linear_logprobs_chunk_size, vocab_size=shapes.vocab_size
        )
        self.softcap = softcap

    def forward(self, batch: MicroBatch, after: int | None = None) -> Tensor:
        """A log-probability for each of the batch's targets, fp32 nats, on every TP rank; a value for each while a
        critic is in use. after: instead of these the most likely token behind that place of the batch."""
        hidden = self.model.model(
            input_ids=batch.tokens.unsqueeze(0),
            position_ids=batch.positions.unsqueeze(0),
            use_cache=False,
            packing=Packing(batch.bounds, batch.cu_seqlens, batch.shared_keys),
        ).last_hidden_state
        if gives_values(self.model):
            return self._values(hidden, batch.sources)
        head = self.model.lm_head
        if after is not None:
            return self._most_likely(hidden, head, after)
        adapted = isinstance(head, AdaptedLinear) and not head.disable_adapters
        weight, bias = _weight_and_bias(head)
        if adapted or weight.requires_grad or bias is not None or self.softcap is not None:
            return self._recomputed(hidden, head, batch.targets, batch.sources)
        local = _rows_of_rank(weight, self.tp)
        return FrozenHead.apply(  # type: ignore[return-value]
            hidden.squeeze(0), local, batch.targets, batch.sources, self.tp, self.head
        )

    def _values(self, hidden: Tensor, sources: Tensor | None) -> Tensor:
        """[N] fp32. Every TP rank computes all of them, so each has the head's whole gradient."""
        hidden = self._whole(hidden).squeeze(0)
        if sources is not None:
            hidden = hidden.index_select(0, sources)
        return F.linear(hidden.float(), self.model.score.weight.float()).squeeze(1)

    def _recomputed(self, hidden: Tensor, head: nn.Module, targets: Tensor, sources: Tensor | None) -> Tensor:
        hidden = self._whole(hidden)
        if sources is not None:
            hidden = hidden.index_select(1, sources)
        size = self.head.chunk_size
        chunks = zip(hidden.split(size, dim=1), targets.split(size), strict=True)
        pieces = [checkpoint(self._chunk, piece, head, wanted, use_reentrant=False) for piece, wanted in chunks]
        return torch.cat(pieces)  # type: ignore[arg-type]

    def _whole(self, hidden: Tensor) -> Tensor:
        """The hidden states of all tokens, which sequence parallelism divides."""
        if not self.tp.sequence_parallel:
            return hidden
        part = DTensor.from_local(hidden, self.tp_mesh, [Shard(1)], run_check=False)
        return part.redistribute(self.tp_mesh, [Replicate()]).to_local()

    def _most_likely(self, hidden: Tensor, head: nn.Module, place: int) -> Tensor:
        """A softcap does not change which token it is."""
        logits = head(self._whole(hidden)[:, place : place + 1]).flatten().float()
        weight, _ = _weight_and_bias(head)
        if not isinstance(weight, DTensor):
            return logits.argmax()
        start = self.tp.rank * -(-self.head.vocab_size // self.tp.size)
        best = logits.argmax() if logits.numel() else torch.zeros((), dtype=torch.int64, device=logits.device)
        value = logits[best] if logits.numel() else logits.new_tensor(float("-inf"))
        everyone = [torch.empty(2, dtype=torch.float64, device=logits.device) for _ in range(self.tp.size)]
        dist.all_gather(everyone, torch.stack([value.double(), (best + start).double()]), group=self.tp.group)
        return max(everyone, key=lambda found: float(found[0]))[1].long()

    def _chunk(self, hidden: Tensor, head: nn.Module, targets: Tensor) -> Tensor:
        logits = head(hidden).squeeze(0).float()
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        if self.head.temperature != 1.0:
            logits = logits / self.head.temperature
        weight, _ = _weight_and_bias(head)
        split = isinstance(weight, DTensor)
        columns = -(-self.head.vocab_size // self.tp.size) if split else self.head.vocab_size
        if self.head.cuts:
            # The last ranks may have fewer columns.
            full = F.pad(logits.detach(), (0, columns - logits.shape[1]), value=float("-inf"))
            cut = self.head.cut(full, targets, self.tp if split else None)
            logits = logits.masked_fill(cut[:, : logits.shape[1]], float("-inf"))
        if not split:
            return -F.cross_entropy(logits, targets, reduction="none")
        start = self.tp.rank * columns
        return _SplitLogprobs.apply(logits, targets, start, self.tp)  # type: ignore[return-value]


def _weight_and_bias(head: Any) -> tuple[Tensor, Tensor | None]:
    base: Any = head.base_layer if isinstance(head, AdaptedLinear) else head
    return base.weight, base.bias


def _rows_of_rank(weight: Tensor, tp: TensorParallel) -> Tensor:
    """A frozen head's rows for this TP rank, the same number on each: the last ones are filled up with zeros."""
    if tp.size == 1:
        return weight
    rows = -(-weight.shape[0] // tp.size)
    if isinstance(weight, DTensor):
        local = weight.to_local()
    else:
        # Tied to the embedding, which every rank holds whole.
        local = weight[tp.rank * rows : (tp.rank + 1) * rows]
    return local if local.shape[0] == rows else F.pad(local, (0, 0, 0, rows - local.shape[0]))


class _SplitLogprobs(torch.autograd.Function):
    """Log-softmax at the targets over logits [c, columns of this rank], which begin at column `start`."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, start: int, tp: TensorParallel) -> Tensor:  # type: ignore[override]
        highest = logits.amax(1) if logits.shape[1] else logits.new_full((logits.shape[0],), float("-inf"))
        dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=tp.group)
        local = targets - start
        mine = (local >= 0) & (local < logits.shape[1])
        local = torch.where(mine, local, torch.zeros_like(local))
        wanted = torch.where(mine, logits.gather(1, local[:, None]).squeeze(1), 0.0)
        sums = torch.stack([(logits - highest[:, None]).exp().sum(1), wanted])
        dist.all_reduce(sums, group=tp.group)
        log_normalizer = highest + sums[0].log()
        ctx.save_for_backward(logits, log_normalizer, local, mine)
        return sums[1] - log_normalizer

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        logits, log_normalizer, local, mine = ctx.saved_tensors
        dlogits = (logits - log_normalizer[:, None]).exp().neg_()
        dlogits.scatter_add_(1, local[:, None], mine.to(dlogits.dtype)[:, None])
        return dlogits.mul_(grad[:, None]), None, None, None
