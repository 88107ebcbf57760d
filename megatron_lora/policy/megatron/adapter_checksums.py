"""Checksums of the adapter as it lies in the modules, under Hugging Face names, without gathering anything."""

from collections.abc import Sequence

import torch

from megatron_lora.lora.held import HeldFactor
from megatron_lora.lora.inject import Adapted
from megatron_lora.lora.layout import A, B, ModelSpec, rows_of_part, segments_of
from megatron_lora.lora.peft_format import block_of, hf_name, peft_name
from megatron_lora.policy.checksums import Pieces, checksum


def adapter_pieces(adapted: Sequence[Adapted], shapes: ModelSpec, dtype: torch.dtype) -> Pieces:
    """This rank's part of `Policy.adapter_checksums`. adapted: this rank's linears."""
    pieces: Pieces = {}
    for linear in adapted:
        pieces |= _linear_pieces(linear, shapes, dtype)
    return pieces


def _linear_pieces(linear: Adapted, shapes: ModelSpec, dtype: torch.dtype) -> Pieces:
    """This rank's parts of one fused linear's factors, HF linear by HF linear."""
    layout = linear.layout
    held = {held.factor.key: held for held in linear.held_factors}
    a, b = held["A"].value.detach(), held["B"].value.detach()
    first_column = 0 if held["A"].axis is None else linear.split.rank * a.shape[1]
    pieces: Pieces = {}
    for segment in segments_of(layout.kind, shapes):
        block = block_of(layout, segment)
        if block is None:
            continue
        rank_rows = slice(block.start, block.stop)
        scale = linear.scale if linear.scale is not None else float(linear.scales[block.start])  # type: ignore[index]
        name = hf_name(layout, segment, shapes, linear.expert)
        pieces[peft_name(name, A), 0, first_column] = checksum(a[rank_rows].to(dtype), 0, first_column)
        for rows, first_row in _rows_of_b(linear, held["B"], segment, shapes):
            scaled_b = b[rows.to(b.device), rank_rows].float() * scale
            pieces[peft_name(name, B), first_row, 0] = checksum(scaled_b.to(dtype), first_row, 0)
    return pieces


def _rows_of_b(linear: Adapted, held: HeldFactor, segment: str, shapes: ModelSpec) -> list[tuple[torch.Tensor, int]]:
    """(local rows of B that lie one after the other in an HF linear, the number of the first of them there).

    A rank's part of B is that of a linear with 1/TP of the rows; the vocabulary's padding is left out.
    """
    whole = shapes.linear(linear.layout.kind)
    if held.axis is None:
        return [(rows_of_part(whole, segment), 0)]
    is_vocabulary = whole.kind == "output_layer"
    part = whole.on_rank(linear.split.size, vocab_rows=held.value.shape[0] if is_vocabulary else None)
    rows = rows_of_part(part, segment)
    if blocks := whole.part(segment).blocks:
        # The rank has a piece of each.
        sizes = part.part(segment).blocks
        starts = [sum(blocks[:number]) + linear.split.rank * size for number, size in enumerate(sizes)]
        return list(zip(rows.split(sizes), starts, strict=True))
    first_row = linear.split.rank * rows.numel()
    if is_vocabulary:
        rows = rows[: max(0, shapes.vocab_size - first_row)]
    return [(rows, first_row)]
