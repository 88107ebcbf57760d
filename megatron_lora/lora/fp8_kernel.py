"""Quantizing rows to FP8 in one pass over memory (Triton); `fp8.quantize_rows` says what it computes."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Values of a row that a program holds at once.
WIDEST = 4096


def quantize_rows_on_gpu(x: Tensor, dtype: torch.dtype, floor: float) -> tuple[Tensor, Tensor]:
    """x [rows, columns] -> (values in `dtype`, contiguous, scales [rows, 1] fp32). floor: the least that a row's
    largest value is taken for."""
    x = x if x.stride(1) == 1 else x.contiguous()
    rows, columns = x.shape
    values = torch.empty(rows, columns, dtype=dtype, device=x.device)
    scales = torch.empty(rows, 1, dtype=torch.float32, device=x.device)
    block = min(WIDEST, triton.next_power_of_2(columns))
    if rows:
        kernel: Any = _quantize_rows[(rows,)]
        kernel(
            x, values, scales, x.stride(0), columns, floor,
            LARGEST=torch.finfo(dtype).max, BLOCK=block, num_warps=4 if block < WIDEST else 8,
        )  # fmt: skip
    return values, scales


# Triton reads annotations, too: it takes none but its own.
@triton.jit
def _quantize_rows(
    x_ptr,
    values_ptr,
    scales_ptr,
    stride,
    columns,
    floor,
    LARGEST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * stride
    values_ptr += row * columns
    lanes = tl.arange(0, BLOCK)
    reach = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, columns, BLOCK):
        at = start + lanes
        x = tl.load(x_ptr + at, mask=at < columns, other=0.0).to(tl.float32)
        reach = tl.maximum(reach, tl.abs(x))
    largest = tl.maximum(tl.max(reach, axis=0), floor)
    tl.store(scales_ptr + row, largest / LARGEST)
    factor = LARGEST / largest
    # What was read comes from the cache now. Nothing exceeds the format, so nothing is cut off; NaN stays NaN.
    for start in range(0, columns, BLOCK):
        at = start + lanes
        x = tl.load(x_ptr + at, mask=at < columns, other=0.0).to(tl.float32)
        tl.store(values_ptr + at, (x * factor).to(values_ptr.dtype.element_ty), mask=at < columns)
