"""Checksums of the start that an adapter of the base's residual (PiSSA) is handed over with."""

from collections.abc import Mapping

import torch
from torch import Tensor

from megatron_lora.lora.layout import A, AdapterSpec, B
from megatron_lora.lora.peft_format import hf_name, peft_name, segment_part
from megatron_lora.policy.checksums import Pieces, checksum


def principal_pieces(spec: AdapterSpec, start: Mapping[str, Tensor], dtype: torch.dtype) -> Pieces:
    """What `principal.against_the_base` puts below A and, with the scale, beside B of each HF linear, rounded to
    `dtype`: these places follow on the adapter's own. Every rank has all of it."""
    pieces: Pieces = {}
    for module in spec.modules:
        for block in module.blocks:
            for segment in block.segments:
                name = hf_name(module, segment, spec.shapes)
                a, b = (
                    segment_part(factor, module, segment, start[f"{module.name}.{factor.name}"], spec.shapes)
                    for factor in (A, B)
                )
                scaled_b = (b.float() * block.scale).neg_()
                pieces[peft_name(name, A), block.rank, 0] = checksum(a.to(dtype), first_row=block.rank)
                pieces[peft_name(name, B), 0, block.rank] = checksum(scaled_b.to(dtype), first_column=block.rank)
    return pieces
