"""From packed tokens to what a head gives: the module that FSDP calls, and the head in chunks, over TP ranks or whole.

Full logits [T, vocabulary] never exist: the output layer is applied to chunks of tokens, and a frozen one's gradient of
log-probabilities is taken in the forward pass (`policy.frozen_head`); one that trains, and every other head, is
recomputed in the backward pass.
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
from megatron_lora.policy.dtensor.adapter import AdaptedLinear
from megatron_lora.policy.dtensor.attention import Packing
from megatron_lora.policy.dtensor.factor_sets import gives_values
from megatron_lora.policy.frozen_head import FrozenHead, HeadOptions
from megatron_lora.policy.heads import TARGETS, Head


class PolicyModule(nn.Module):
    """A transformers causal language model called for what a head gives of a micro-batch's targets."""

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

    def forward(self, batch: MicroBatch, head: Head = TARGETS, after: int | None = None) -> Tensor:
        """What the head gives of each of the batch's targets, on every TP rank; a value for each while a critic is in
        use. after: instead of these the most likely token behind that place of the batch."""
        hidden = self.model.model(
            input_ids=batch.tokens.unsqueeze(0),
            position_ids=batch.positions.unsqueeze(0),
            use_cache=False,
            packing=Packing(batch.bounds, batch.cu_seqlens, batch.shared_keys),
        ).last_hidden_state
        if gives_values(self.model):
            return self._values(hidden, batch.sources)
        layer = self.model.lm_head
        if after is not None:
            return self._most_likely(hidden, layer, after)
        adapted = isinstance(layer, AdaptedLinear) and not layer.disable_adapters
        weight, bias = _weight_and_bias(layer)
        if head != TARGETS or adapted or weight.requires_grad or bias is not None or self.softcap is not None:
            return self._recomputed(hidden, layer, head, head.wanted(batch), batch.sources)
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

    def _recomputed(
        self, hidden: Tensor, layer: nn.Module, head: Head, wanted: Tensor, sources: Tensor | None
    ) -> Tensor:
        hidden = self._whole(hidden)
        if sources is not None:
            hidden = hidden.index_select(1, sources)
        size = self.head.chunk_size
        chunks = zip(hidden.split(size, dim=1), wanted.split(size), strict=True)
        pieces = [checkpoint(self._chunk, piece, layer, head, asked, use_reentrant=False) for piece, asked in chunks]
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

    def _chunk(self, hidden: Tensor, layer: nn.Module, head: Head, wanted: Tensor) -> Tensor:
        logits = layer(hidden).squeeze(0).float()
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        if self.head.temperature != 1.0:
            logits = logits / self.head.temperature
        weight, _ = _weight_and_bias(layer)
        split = isinstance(weight, DTensor)
        columns = -(-self.head.vocab_size // self.tp.size) if split else self.head.vocab_size
        if self.head.cuts:
            # The last ranks may have fewer columns.
            full = F.pad(logits.detach(), (0, columns - logits.shape[1]), value=float("-inf"))
            targets = wanted if wanted.ndim == 1 else wanted[:, 0]
            cut = self.head.cut(full, targets, self.tp if split else None)
            logits = logits.masked_fill(cut[:, : logits.shape[1]], float("-inf"))
        if split:
            return head.of_logits(logits, wanted, self.tp, start=self.tp.rank * columns)
        return head.of_logits(logits, wanted, None, start=0)


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
