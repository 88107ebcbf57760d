"""A frozen weight in FP8, one scale a row, and products in FP8 (Micikevicius et al. 2022, FP8 formats).

Tensor cores multiply FP8 matrices along rows of both, so W is held twice: by its rows for x W^T, and by its columns for
dy W. Both are quantized once, when the base is loaded; x and dy are quantized row by row as they come. A row's scale
takes its largest value to the largest number of the format, and products are scaled back in fp32. What adapters add is
computed from x and dy as they were.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_lora.errors import UserError
from megatron_lora.lora.base_weight import BaseWeight

WEIGHTS = torch.float8_e4m3fn
# The kernels take matrices whose sides are multiples of this.
MULTIPLE = 16
# cuBLAS lacks some products of few tokens (a decoded one, say) with a bias and a long inner side; zeros are added.
FEWEST_ROWS = 256
# The earliest compute capability with FP8 tensor cores (Ada).
CAPABILITY = (8, 9)
# The smallest number that a row's largest is taken for: a row of zeros has a scale, too.
FLOOR = 1e-30
# A product of drawn matrices is 4 % off; a wrong scale or a matrix the wrong way round much more.
MOST_ERROR = 0.1


@dataclass(frozen=True)
class Fp8Matrix:
    """values [rows, columns] in FP8, contiguous. scales [rows, 1] fp32: what a row's values are multiplied by."""

    values: Tensor
    scales: Tensor

    @property
    def num_bytes(self) -> int:
        return self.values.nbytes + self.scales.nbytes

    def dense(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows [start, stop), fp32."""
        return self.values[start:stop].float() * self.scales[start:stop]


def quantize_rows(x: Tensor, dtype: torch.dtype = WEIGHTS) -> Fp8Matrix:
    """x [rows, columns] of any floating-point dtype. A row with a value that is not finite has such values again."""
    if x.is_cuda:
        from megatron_lora.lora.fp8_kernel import quantize_rows_on_gpu

        return Fp8Matrix(*quantize_rows_on_gpu(x, dtype, FLOOR))
    largest = torch.finfo(dtype).max
    wide = x.float()
    reach = wide.abs().amax(dim=1, keepdim=True).clamp_min(FLOOR)
    return Fp8Matrix((wide * (largest / reach)).to(dtype), reach / largest)


def padded(a: Fp8Matrix, fewest: int) -> Fp8Matrix:
    """With rows of zeros at the end, where it has fewer rows."""
    if (more := fewest - len(a.values)) <= 0:
        return a
    codes = torch.nn.functional.pad(a.values.view(torch.uint8), (0, 0, 0, more))
    return Fp8Matrix(codes.view(a.values.dtype), torch.nn.functional.pad(a.scales, (0, 0, 0, more), value=1.0))


def product(
    a: Fp8Matrix, b: Fp8Matrix, dtype: torch.dtype, bias: Tensor | None = None, fewest: int = FEWEST_ROWS
) -> Tensor:
    """a [t, k], b [n, k] -> a b^T + bias [t, n], in `dtype`. On a CPU the same numbers multiplied in fp32."""
    if a.values.is_cuda:
        rows = len(a.values)
        a = padded(a, fewest)
        return torch._scaled_mm(
            a.values,
            b.values.t(),
            scale_a=a.scales,
            scale_b=b.scales.t(),
            bias=bias,
            out_dtype=dtype,
            use_fast_accum=True,
        )[:rows]
    y = (a.dense() @ b.dense().t()).to(dtype)
    return y if bias is None else y + bias


class Fp8Weight(BaseWeight):
    """W [out, in] in FP8. weight: W in the dtype of products and outputs. gradients: the format of dy, e4m3, or e5m2,
    which reaches further and is coarser."""

    def __init__(self, weight: Tensor, gradients: torch.dtype = WEIGHTS):
        self.rows = quantize_rows(weight)
        self.columns = quantize_rows(weight.t().contiguous())
        self.gradients = gradients
        self._dtype = weight.dtype

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.rows.values.shape
        return rows, columns

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype

    @property
    def device(self) -> torch.device:
        return self.rows.values.device

    @property
    def num_bytes(self) -> int:
        return self.rows.num_bytes + self.columns.num_bytes

    def dense(self, start: int = 0, stop: int | None = None) -> Tensor:
        return self.rows.dense(start, stop).to(self._dtype)

    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return product(quantize_rows(x), self.rows, self._dtype, bias)

    def input_gradient(self, dy: Tensor, out: Tensor | None = None) -> Tensor:
        dx = product(quantize_rows(dy, self.gradients), self.columns, self._dtype)
        return dx if out is None else out.copy_(dx)


def check_card(device: torch.device, key: str) -> None:
    """Raise UserError where this process's card has no FP8 products by row. key: what asks for them, as the recipe
    says it."""
    needs = f"{key} needs a GPU with FP8 tensor cores (compute capability {_version(CAPABILITY)} or higher: L40S, H100)"
    if device.type != "cuda":
        raise UserError(f"{needs}, and this process has no GPU; run it on such a machine, or set it to false")
    capability = torch.cuda.get_device_capability(device)
    name = torch.cuda.get_device_name(device)
    if capability < CAPABILITY:
        raise UserError(f"{needs}, and {name} has {_version(capability)}; use such a card, or set it to false")
    try:
        off = measured_error(device)
    except Exception as error:  # PyTorch's, or the compiler's of the kernel: each of its own kind
        reason = f"{type(error).__name__}: {(str(error).strip() or 'no reason given').splitlines()[0]}"
        raise UserError(
            f"{key}, but PyTorch {torch.__version__} has no FP8 product with a scale a row for {name} ({reason}); set "
            "it to false"
        ) from error
    if not off < MOST_ERROR:
        raise UserError(
            f"{key}, but FP8 products on {name} are {off:.0%} off, wanted below {MOST_ERROR:.0%}; set it to false"
        )


def measured_error(device: torch.device) -> float:
    """|found - exact| / |exact| of a product and an input gradient of drawn matrices, the larger one."""
    generator = torch.Generator().manual_seed(0)
    w, x, dy = (torch.randn(rows, columns, generator=generator) for rows, columns in ((64, 32), (48, 32), (48, 64)))
    weight = Fp8Weight(w.to(device, torch.bfloat16))
    found = weight.product(x.to(device, torch.bfloat16)), weight.input_gradient(dy.to(device, torch.bfloat16))
    exact = x @ w.t(), dy @ w
    return max(float((ours.cpu() - true).norm() / true.norm()) for ours, true in zip(found, exact, strict=True))


def _version(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))
