"""Checksums of the adapter as it lies in the modules, under Hugging Face names, without gathering anything."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from megatron_lora.lora.layout import A, B, ModelShapes, segment_rows, segments_of
from megatron_lora.lora.linear import HeldFactor, LoRALinear
from megatron_lora.lora.peft_format import block_of, hf_name, peft_name
from megatron_lora.policy.checksums import Pieces, checksum, join_ranks, to_numbers


def adapter_checksums(adapted: Sequence[LoRALinear], shapes: ModelShapes, dtype: torch.dtype) -> dict[str, int]:
    """See `Policy.adapter_checksums`. adapted: this rank's linears. Collective over all ranks."""
    pieces: Pieces = {}
    for linear in adapted:
        pieces |= _linear_pieces(linear, shapes, dtype)
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, to_numbers(pieces))
    return join_ranks(everyone)


def _linear_pieces(linear: LoRALinear, shapes: ModelShapes, dtype: torch.dtype) -> Pieces:
    """This rank's parts of one fused linear's factors, HF linear by HF linear."""
    layout = linear.layout
    held = {held.factor.key: held for held in linear.held_factors}
    a, b = held["A"].parameter.detach(), held["B"].parameter.detach()
    first_column = 0 if held["A"].axis is None else linear.tp.rank * a.shape[1]
    pieces: Pieces = {}
    for segment in segments_of(layout.kind, shapes):
        block = block_of(layout, segment)
        if block is None:
            continue
        rank_rows = slice(block.start, block.stop)
        scale = linear.scale if linear.scale is not None else float(linear.scales[block.start])  # type: ignore[index]
        rows, first_row = _rows_of_b(linear, held["B"], segment, shapes)
        scaled_b = b[rows.to(b.device), rank_rows].float() * scale
        name = hf_name(segment, layout.layer)
        pieces[peft_name(name, A), 0, first_column] = checksum(a[rank_rows].to(dtype), 0, first_column)
        pieces[peft_name(name, B), first_row, 0] = checksum(scaled_b.to(dtype), first_row, 0)
    return pieces


def _rows_of_b(linear: LoRALinear, held: HeldFactor, segment: str, shapes: ModelShapes) -> tuple[torch.Tensor, int]:
    """(the local rows of B that belong to an HF linear, the number of the first of them there).

    A rank's part of B is that of a model with 1/TP of the heads and features; the vocabulary's padding is left out.
    """
    kind = linear.layout.kind
    if held.axis is None:
        return segment_rows(kind, shapes, segment), 0
    size, rank = linear.tp.size, linear.tp.rank
    part = replace(
        shapes,
        hidden_size=shapes.hidden_size // size,
        ffn_hidden_size=shapes.ffn_hidden_size // size,
        num_attention_heads=shapes.num_attention_heads // size,
        num_query_groups=shapes.num_query_groups // size,
        vocab_size=held.parameter.shape[0],
    )
    rows = segment_rows(kind, part, segment)
    first_row = rank * rows.numel()
    if kind == "output_layer":
        rows = rows[: max(0, shapes.vocab_size - first_row)]
    return rows, first_row
