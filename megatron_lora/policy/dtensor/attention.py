"""Attention over packed rows for transformers models: each row sees itself only, causally, within its window.

Registered under `NAME` with transformers, whose models then build no mask of their own: nothing of size T x T exists.
"""

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface

from megatron_lora.data.batch import SharedKeys
from megatron_lora.policy.row_grid import KeptGrid
from megatron_lora.runtime.shared_attention import LARGEST_HEAD_DIM, shared_attention

NAME = "megatron_lora_packed"


@dataclass(frozen=True, eq=False)
class Packing:
    """Where rows begin and end, on the CPU and as [rows + 1] int32; shared_keys: who sees what where rows share
    prefixes; grid: of the rows, for layers that carry a state along each. An object and no list, so that a compiled
    layer does not depend on its numbers."""

    bounds: list[int]
    cu_seqlens: Tensor
    shared_keys: SharedKeys | None = None
    grid: KeptGrid = field(default_factory=KeptGrid)


@torch.compiler.disable
def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packing: Packing,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """query [1, heads, T, d], key and value [1, groups, T, d] -> [1, T, heads, d].

    sliding_window: tokens that a token sees, itself included. softcap: scores s become softcap * tanh(s / softcap)
    (Gemma 2).
    """
    shared = packing.shared_keys
    fused = query.is_cuda and query.dtype == torch.bfloat16 and softcap is None
    if fused and query.shape[-1] <= LARGEST_HEAD_DIM:
        if shared is None:
            return _varlen(query, key, value, packing, scaling, sliding_window), None
        flat_query, flat_key, flat_value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
        out = shared_attention(flat_query, flat_key, flat_value, shared, scaling, sliding_window)
        return out.unsqueeze(0), None
    key_bounds = packing.bounds
    if shared is not None:
        key, value, key_bounds = key[:, :, shared.index], value[:, :, shared.index], shared.key_bounds
    pieces = []
    for (start, stop), (first, last) in zip(pairwise(packing.bounds), pairwise(key_bounds), strict=True):
        queries, keys = slice(start, stop), slice(first, last)
        pieces.append(_row(query[:, :, queries], key[:, :, keys], value[:, :, keys], scaling, sliding_window, softcap))
    out = torch.cat(pieces, dim=2)
    return out.transpose(1, 2).contiguous(), None


def _varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    packing: Packing,
    scaling: float | None,
    sliding_window: int | None,
) -> Tensor:
    """All rows in one flash-attention kernel."""
    from torch.nn.attention.varlen import varlen_attn

    groups = query.shape[1] // key.shape[1]
    query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    longest = max(stop - start for start, stop in zip(packing.bounds[:-1], packing.bounds[1:], strict=True))
    left = -1 if sliding_window is None else sliding_window - 1
    out = varlen_attn(
        query.contiguous(),
        key.contiguous(),
        value.contiguous(),
        packing.cu_seqlens,
        packing.cu_seqlens,
        longest,
        longest,
        scale=scaling,
        window_size=(left, 0),
    )
    assert isinstance(out, Tensor)
    return out.unsqueeze(0)


def _row(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None,
    sliding_window: int | None,
    softcap: float | None,
) -> Tensor:
    """One row: query [1, heads, S, d], key and value of those S tokens and of any before them."""
    length = key.shape[2]
    windowed = sliding_window is not None and sliding_window < length
    if softcap is None and not windowed and query.shape[2] == length:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
    age = torch.arange(length, device=query.device)
    age = age[length - query.shape[2] :, None] - age[None, :]
    visible = age >= 0
    if windowed:
        assert sliding_window is not None
        visible &= age < sliding_window
    if softcap is None:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=visible, scale=scaling, enable_gqa=True)
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = (query @ key.transpose(2, 3)) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = (torch.tanh(scores / softcap) * softcap).masked_fill(~visible, float("-inf"))
    return torch.softmax(scores, -1, dtype=torch.float32).to(query.dtype) @ value


AttentionInterface.register(NAME, packed_attention)
