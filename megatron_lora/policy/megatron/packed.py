"""How Megatron's layers are told of a packed micro-batch: plain rows, or rows that share prefixes."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_lora.data.batch import MicroBatch
from megatron_lora.policy.row_grid import KeptGrid
from megatron_lora.runtime.native_layers import RoutedParams, SharedPrefixParams, layer_window
from megatron_lora.runtime.rotary import picked, rotary_modules
from megatron_lora.runtime.shared_attention import shared_attention


@dataclass
class PackedRows(RoutedParams):
    """Plain rows. grid: of them, for layers that carry a state along each."""

    grid: KeptGrid = field(default_factory=KeptGrid)


def packed_params(batch: MicroBatch, experts: Tensor | None = None) -> PackedSeqParams:
    """What attention, rotary embeddings and routers are to know of a micro-batch on the device. experts: to which
    the tokens of this rank go."""
    if batch.shared_keys is None:
        return PackedRows(
            qkv_format="thd",
            cu_seqlens_q=batch.cu_seqlens,
            cu_seqlens_kv=batch.cu_seqlens,
            max_seqlen_q=batch.max_seqlen,
            max_seqlen_kv=batch.max_seqlen,
            routed_experts=experts,
        )
    whole = torch.stack([batch.cu_seqlens[0], batch.cu_seqlens[-1]])
    return SharedPrefixParams(
        qkv_format="thd",
        cu_seqlens_q=whole,
        cu_seqlens_kv=whole,
        max_seqlen_q=batch.max_seqlen,
        max_seqlen_kv=batch.max_seqlen,
        shared_keys=batch.shared_keys,
        routed_experts=experts,
    )


class RotaryPositions:
    """Rotary embeddings of tokens whose positions do not begin at 0 in each segment.

    Megatron counts positions from where a packed sequence begins. Within `at` a micro-batch with shared prefixes, what
    the stages' rotary modules give for positions 0, 1, ... is picked for each token by its own position instead.
    """

    def __init__(self, chunks: Sequence[GPTModel]):
        self._positions: Tensor | None = None
        self._kept: list[Any] | None = None
        for chunk in chunks:
            for module in rotary_modules(chunk):
                module.register_forward_hook(self._pick)

    @contextmanager
    def at(self, batch: MicroBatch) -> Iterator[None]:
        self._positions = batch.positions if batch.shared_keys is not None else None
        try:
            yield
        finally:
            self._positions = None

    @contextmanager
    def keeping(self) -> Iterator[list[Any]]:
        """What the rotary modules give within, which they cache and forget: for a graph that goes on reading it."""
        self._kept = []
        try:
            yield self._kept
        finally:
            self._kept = None

    def _pick(self, module: Any, arguments: Any, output: Any) -> Any:
        if self._kept is not None:
            self._kept.append(output)
        return None if self._positions is None else picked(output, self._positions)


def with_shared_prefixes(core_attention: type) -> type:
    """Transformer Engine's core attention, which hands micro-batches with shared prefixes to `shared_attention`."""

    class SharedPrefixAttention(core_attention):
        def __init__(self, config: Any, layer_number: int, *arguments: Any, **options: Any):
            super().__init__(config, layer_number, *arguments, **options)
            scale = options.get("softmax_scale")
            self.shared_scale = config.softmax_scale if scale is None else scale
            self.shared_window = layer_window(config, layer_number)

        def forward(self, query: Tensor, key: Tensor, value: Tensor, *arguments: Any, **options: Any) -> Tensor:
            params = options.get("packed_seq_params")
            if not isinstance(params, SharedPrefixParams):
                return super().forward(query, key, value, *arguments, **options)
            out = shared_attention(query, key, value, params.shared_keys, self.shared_scale, self.shared_window)
            return out.flatten(1)

    return SharedPrefixAttention
