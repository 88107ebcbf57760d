"""Which tokens of a packed micro-batch a context-parallel rank holds."""

import torch
from torch import Tensor


def local_token_indices(cu_seqlens: Tensor, cp_size: int, cp_rank: int) -> Tensor:
    """Flat indices, in order, of the tokens of `cp_rank`.

    Each sequence is cut into 2 * cp_size equal chunks; rank i holds chunks i and 2 * cp_size - 1 - i, so that causal
    attention costs every rank the same (Transformer Engine's layout for packed sequences). Every sequence length
    must be a multiple of 2 * cp_size. Returns [T / cp_size] int64.
    """
    if cp_size == 1:
        return torch.arange(int(cu_seqlens[-1]), device=cu_seqlens.device)
    pieces = []
    bounds = cu_seqlens.tolist()
    for start, end in zip(bounds, bounds[1:], strict=False):
        length = end - start
        assert length % (2 * cp_size) == 0, f"sequence of {length} tokens is not a multiple of {2 * cp_size}"
        chunk = length // (2 * cp_size)
        for which in (cp_rank, 2 * cp_size - 1 - cp_rank):
            first = start + which * chunk
            pieces.append(torch.arange(first, first + chunk, device=cu_seqlens.device))
    return torch.cat(pieces)
