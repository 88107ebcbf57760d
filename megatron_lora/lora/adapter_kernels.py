"""The backward pass of an adapted linear with fewer passes over memory (Triton).

Products of rank r are bound by reading their wide factor. `gated_backward` takes A's gradient of the linear behind a
SwiGLU from what the SwiGLU's own backward pass has at hand, so the SwiGLU's output is neither kept nor written again.
`output_gradients` reads dy once for both dB and dh.

Sums over many rows are taken in fp32 in parts whose number depends on the shape alone, and the parts are added in one
order: a run gives the same bits again.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_lora.lora.arithmetic import HIGHEST_RANK

# Parts of a sum over rows: enough programs for every multiprocessor, few enough that adding them up costs nothing.
MOST_PARTS = 16
ROWS, COLUMNS = 64, 64
OUTPUTS = 256


def gated_backward(given: Tensor, dy: Tensor, dh: Tensor) -> tuple[Tensor, Tensor]:
    """Of y = silu(gate) * up and h = A y. given [t, 2 f]: [gate | up]. dy [t, f], dh [t, r], all of one dtype.

    Returns the gradient of `given` [t, 2 f] and that of A [r, f] in fp32.
    """
    given, dy, dh = given.contiguous(), dy.contiguous(), dh.contiguous()
    tokens, width, rank = dy.shape[0], dy.shape[1], dh.shape[1]
    assert given.shape == (tokens, 2 * width) and rank <= HIGHEST_RANK
    parts, rows_of_part = _parts(tokens)
    gradient = torch.empty_like(given)
    sums = torch.empty(parts, rank, width, dtype=torch.float32, device=given.device)
    kernel: Any = _gated_backward[(_ceil_div(width, COLUMNS), parts)]
    kernel(
        given, dy, dh, gradient, sums, tokens, width, rank, rows_of_part,
        ROWS=ROWS, COLUMNS=COLUMNS, RANK=_power_of_two(rank), num_warps=4,
    )  # fmt: skip
    return gradient, sums.sum(0)


def output_gradients(dy: Tensor, h: Tensor, lora_b: Tensor) -> tuple[Tensor, Tensor]:
    """Of y = B h. dy [t, out], h [t, r], lora_b [out, r], all of one dtype -> dh [t, r] and dB [out, r], both fp32."""
    h, lora_b = h.contiguous(), lora_b.contiguous()
    dy = dy if dy.stride(1) == 1 else dy.contiguous()
    tokens, outputs, rank = dy.shape[0], dy.shape[1], h.shape[1]
    assert lora_b.shape == (outputs, rank) and rank <= HIGHEST_RANK
    parts, rows_of_part = _parts(tokens)
    blocks = _ceil_div(outputs, OUTPUTS)
    dh = torch.empty(blocks, tokens, rank, dtype=torch.float32, device=dy.device)
    db = torch.empty(parts, outputs, rank, dtype=torch.float32, device=dy.device)
    kernel: Any = _output_gradients[(blocks, parts)]
    kernel(
        dy, h, lora_b, dh, db, dy.stride(0), tokens, outputs, rank, rows_of_part,
        ROWS=ROWS, OUTPUTS=OUTPUTS, RANK=_power_of_two(rank), num_warps=8,
    )  # fmt: skip
    return dh.sum(0), db.sum(0)


def _ceil_div(number: int, divisor: int) -> int:
    return -(-number // divisor)


def _parts(tokens: int) -> tuple[int, int]:
    """(parts of the rows, rows of a part, a multiple of ROWS)."""
    tiles = _ceil_div(tokens, ROWS)
    tiles_of_part = _ceil_div(tiles, MOST_PARTS)
    return _ceil_div(tiles, tiles_of_part), tiles_of_part * ROWS


def _power_of_two(rank: int) -> int:
    """Tensor cores take no fewer than 16."""
    return max(16, 1 << (rank - 1).bit_length())


# Triton reads annotations, too: it takes none but its own.
@triton.jit
def _gated_backward(
    given_ptr,
    dy_ptr,
    dh_ptr,
    gradient_ptr,
    sums_ptr,
    tokens,
    width,
    rank,
    rows_of_part,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANK: tl.constexpr,
):
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    part = tl.program_id(1)
    ranks = tl.arange(0, RANK)
    dtype = dy_ptr.dtype.element_ty
    sums = tl.zeros([RANK, COLUMNS], dtype=tl.float32)
    first = part * rows_of_part
    for start in range(first, tl.minimum(first + rows_of_part, tokens), ROWS):
        rows = (start + tl.arange(0, ROWS)).to(tl.int64)
        inside = (rows < tokens)[:, None] & (columns < width)[None, :]
        at = rows[:, None] * (2 * width) + columns[None, :]
        gate = tl.load(given_ptr + at, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(given_ptr + at + width, mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + rows[:, None] * width + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        sigmoid = 1.0 / (1.0 + tl.exp(-gate))
        silu = gate * sigmoid
        tl.store(gradient_ptr + at, (dy * sigmoid * (1.0 + gate * (1.0 - sigmoid)) * up).to(dtype), mask=inside)
        tl.store(gradient_ptr + at + width, (dy * silu).to(dtype), mask=inside)
        # Rows and columns that are not there are zero.
        there = (rows < tokens)[None, :] & (ranks < rank)[:, None]
        dh = tl.load(dh_ptr + rows[None, :] * rank + ranks[:, None], mask=there, other=0.0)
        sums += tl.dot(dh, (silu * up).to(dtype), input_precision="ieee")
    at = (part * rank + ranks)[:, None] * width + columns[None, :]
    tl.store(sums_ptr + at, sums, mask=(ranks < rank)[:, None] & (columns < width)[None, :])


@triton.jit
def _output_gradients(
    dy_ptr,
    h_ptr,
    b_ptr,
    dh_ptr,
    db_ptr,
    stride,
    tokens,
    outputs,
    rank,
    rows_of_part,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    RANK: tl.constexpr,
):
    block = tl.program_id(0)
    columns = block * OUTPUTS + tl.arange(0, OUTPUTS)
    part = tl.program_id(1)
    ranks = tl.arange(0, RANK)
    of_b = (columns < outputs)[:, None] & (ranks < rank)[None, :]
    b = tl.load(b_ptr + columns[:, None] * rank + ranks[None, :], mask=of_b, other=0.0)
    db = tl.zeros([OUTPUTS, RANK], dtype=tl.float32)
    first = part * rows_of_part
    for start in range(first, tl.minimum(first + rows_of_part, tokens), ROWS):
        rows = (start + tl.arange(0, ROWS)).to(tl.int64)
        inside = (rows < tokens)[:, None] & (columns < outputs)[None, :]
        dy = tl.load(dy_ptr + rows[:, None] * stride + columns[None, :], mask=inside, other=0.0)
        of_rows = (rows < tokens)[:, None] & (ranks < rank)[None, :]
        h = tl.load(h_ptr + rows[:, None] * rank + ranks[None, :], mask=of_rows, other=0.0)
        db += tl.dot(tl.trans(dy), h, input_precision="ieee")
        dh = tl.dot(dy, b, input_precision="ieee")
        tl.store(dh_ptr + (block * tokens + rows)[:, None] * rank + ranks[None, :], dh, mask=of_rows)
    tl.store(db_ptr + (part * outputs + columns)[:, None] * rank + ranks[None, :], db, mask=of_b)
