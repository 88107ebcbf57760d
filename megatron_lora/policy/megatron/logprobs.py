"""Heads through Megatron's output layer: a frozen one's log-probabilities of targets by `policy.frozen_head`; one that
trains, and every other head, in chunks that are recomputed in the backward pass; or all logits in one piece.
"""

from typing import Any

import torch
from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megatron_lora.lora.arithmetic import AdapterCall, TensorParallel
from megatron_lora.lora.linear import LoRALinear
from megatron_lora.policy.frozen_head import FrozenHead, HeadOptions, cap_logits, padding_columns
from megatron_lora.policy.heads import TARGETS, Head


def target_logprobs(
    hidden: Tensor,
    output_layer: Any,
    weight: Tensor | None,
    wanted: Tensor,
    tp: TensorParallel,
    options: HeadOptions,
    sources: Tensor | None = None,
    head: Head = TARGETS,
) -> Tensor:
    """hidden [t, 1, h] (this rank's rows under sequence parallelism), wanted [N, ...] (`Head.wanted`) -> what the head
    gives [N, ...] fp32: with TARGETS log p(target), nats.

    sources [N]: which of the T tokens of all ranks predicts each target; None: each its own, N = T.
    weight: the head's [vocabulary / tp, h] where it is the embedding's, else None (the output layer's own).
    """
    weight = weight if weight is not None else output_layer.weight
    assert weight is not None
    adapted = isinstance(output_layer, LoRALinear) and output_layer.enabled
    if options.chunk_size == 0:
        logits = output_layer(hidden, weight=weight)[0].squeeze(1)
        return _of_logits(logits if sources is None else logits[sources], wanted, tp, options, head)
    capped = options.softcap is not None
    frozen = not (adapted or capped or weight.requires_grad or getattr(output_layer, "bias", None) is not None)
    if not frozen or head != TARGETS:
        return _recomputed(hidden, output_layer, weight, wanted, sources, tp, options, head)
    hidden = hidden.squeeze(1)
    return FrozenHead.apply(hidden, weight, wanted, sources, tp, options)  # type: ignore[return-value]


def _of_logits(logits: Tensor, wanted: Tensor, tp: TensorParallel, options: HeadOptions, head: Head) -> Tensor:
    logits = cap_logits(logits.float(), options.softcap)
    if options.temperature != 1.0:
        logits = logits / options.temperature
    padding = padding_columns(logits.shape[-1], tp, options.vocab_size)
    if padding:
        logits = torch.cat([logits[:, :-padding], logits.new_full((logits.shape[0], padding), float("-inf"))], 1)
    if options.cuts:
        targets = wanted if wanted.ndim == 1 else wanted[:, 0]
        logits = logits.masked_fill(options.cut(logits.detach(), targets, tp), float("-inf"))
    if head != TARGETS:
        return head.of_logits(logits, wanted, tp, start=tp.rank * logits.shape[1])
    return -vocab_parallel_cross_entropy(logits.unsqueeze(1), wanted.unsqueeze(1)).squeeze(1)


def _recomputed(
    hidden: Tensor,
    output_layer: Any,
    weight: Tensor,
    wanted: Tensor,
    sources: Tensor | None,
    tp: TensorParallel,
    options: HeadOptions,
    head: Head,
) -> Tensor:
    """Chunks through the output layer itself, recomputed in the backward pass."""
    if tp.sequence_parallel:
        hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True, group=tp.group)
    elif tp.size > 1:
        hidden = copy_to_tensor_model_parallel_region(hidden, group=tp.group)
    if sources is not None:
        hidden = hidden.index_select(0, sources)
    pieces = []
    chunks = zip(hidden.squeeze(1).split(options.chunk_size), wanted.split(options.chunk_size), strict=True)
    for piece, asked in chunks:
        # Recomputed dropout must draw the same mask, also from Megatron's own random states.
        call = output_layer.draw_call(piece) if isinstance(output_layer, LoRALinear) else None
        pieces.append(
            checkpoint(_head_chunk, piece, output_layer, weight, asked, call, tp, options, head, use_reentrant=False)
        )
    return torch.cat(pieces)  # type: ignore[arg-type]


def _head_chunk(
    hidden: Tensor,
    output_layer: Any,
    weight: Tensor,
    wanted: Tensor,
    call: AdapterCall | None,
    tp: TensorParallel,
    options: HeadOptions,
    head: Head,
) -> Tensor:
    if call is not None and output_layer.enabled:
        # The communication around the head is done once, outside the chunks.
        logits = output_layer.local_product(hidden, weight, call)
    else:
        logits = torch.nn.functional.linear(hidden, weight, getattr(output_layer, "bias", None))
    return _of_logits(logits, wanted, tp, options, head)
