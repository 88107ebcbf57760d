"""The arithmetic of a layer's experts, all at once: `arithmetic.py`'s y = W x + s B A x, where each row of x goes
through the matrices of its own expert.

Rows stand expert after expert ([t, features]); `ends` [experts] int32 says where each expert's rows end, and an expert
may have none. Matrices of all experts are one tensor [experts, ...]; an adapter that all experts share has no such axis
and is a plain product. A product over all experts is one kernel on a GPU (`torch.nn.functional.grouped_mm`), whose
splits stay there: nothing waits for the host.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm

from megatron_lora.lora.arithmetic import scaled
from megatron_lora.lora.base_weight import ExpertWeight

ALIGNMENT_BYTES = 16


@dataclass(frozen=True)
class GroupedCall:
    """What one call of the experts' adapted linear needs besides its tensors.

    ends: where each expert's rows end. scale: a number, or [R] where blocks differ. b_mask: [out, R], which entries of
    each expert's B train, or None for all. input_mask, output_mask: dropout masks as in `arithmetic.AdapterCall`.
    one_by_one: each expert's product is a kernel of its own.
    """

    ends: Tensor
    scale: float | Tensor
    b_mask: Tensor | None = None
    input_mask: Tensor | None = None
    output_mask: Tensor | None = None
    one_by_one: bool = False


def row_ends(rows_per_expert: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor(list(accumulate(rows_per_expert)), dtype=torch.int32, device=device)


def grouped_linear(
    x: Tensor, weight: ExpertWeight, bias: Tensor | None, ends: Tensor, *, one_by_one: bool = False
) -> Tensor:
    """x [t, in], frozen weight [experts, out, in], bias [experts, out] -> [t, out]."""
    return _Frozen.apply(x, weight, bias, ends, one_by_one)  # type: ignore[return-value]


def adapted_grouped_linear(
    x: Tensor, weight: ExpertWeight, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, call: GroupedCall
) -> Tensor:
    """`grouped_linear` with adapters: lora_a [experts, R, in], lora_b [experts, out, R], or [R, in] and [out, R] that
    all experts share. No gradient of weight and bias."""
    return _Adapted.apply(x, weight, bias, lora_a, lora_b, call)  # type: ignore[return-value]


def times(rows: Tensor, matrices: Tensor, ends: Tensor, one_by_one: bool = False) -> Tensor:
    """rows [t, k], matrices [experts, k, n] (or [k, n], all experts') -> [t, n]."""
    if matrices.dim() == 2:
        return rows @ matrices
    if rows.shape[0] == 0:
        return rows.new_zeros(0, matrices.shape[-1])
    if one_by_one:
        return torch.cat([own @ matrix for own, matrix in zip(_by_expert(rows, ends), matrices, strict=True)])
    return grouped_mm(_aligned(rows), _aligned(matrices), offs=ends)


def _outputs(x: Tensor, weight: ExpertWeight, ends: Tensor, one_by_one: bool) -> Tensor:
    """x [t, in] -> x W^T [t, out]."""
    if one_by_one:
        parts = enumerate(_by_expert(x, ends))
        return _joined([weight.expert(n).product(own) for n, own in parts if own.shape[0]], x, weight.shape[1])
    return times(x, _transposed(weight.dense()), ends)


def _input_gradients(dy: Tensor, weight: ExpertWeight, ends: Tensor, one_by_one: bool) -> Tensor:
    """dy [t, out] -> dy W [t, in]."""
    if one_by_one:
        parts = enumerate(_by_expert(dy, ends))
        return _joined([weight.expert(n).input_gradient(own) for n, own in parts if own.shape[0]], dy, weight.shape[2])
    return times(dy, weight.dense(), ends)


def _joined(parts: Sequence[Tensor], like: Tensor, columns: int) -> Tensor:
    """Of no experts with rows: none."""
    return torch.cat(list(parts)) if parts else like.new_zeros(0, columns)


def outer_sums(left: Tensor, right: Tensor, ends: Tensor, *, shared: bool, one_by_one: bool = False) -> Tensor:
    """left [t, m], right [t, n] -> [experts, m, n]: each expert's left^T right, zero where it has no rows; over all
    rows [m, n] where `shared`."""
    if shared:
        return left.t() @ right
    if left.shape[0] == 0:
        return left.new_zeros(ends.numel(), left.shape[1], right.shape[1])
    if one_by_one:
        pairs = zip(_by_expert(left, ends), _by_expert(right, ends), strict=True)
        return torch.stack([own.t() @ others for own, others in pairs])
    sums = grouped_mm(_aligned(left).t(), _aligned(right), offs=ends)
    # What a kernel leaves in the place of an empty sum is not said anywhere.
    empty = torch.diff(ends, prepend=ends.new_zeros(1)) == 0
    return sums.masked_fill_(empty[:, None, None], 0)


def _by_expert(rows: Tensor, ends: Tensor) -> Sequence[Tensor]:
    return rows.split(torch.diff(ends, prepend=ends.new_zeros(1)).tolist())


def _aligned(tensor: Tensor) -> Tensor:
    """The tensor, copied where its rows (or columns) do not start at multiples of 16 bytes, as the kernel wants."""
    unit = ALIGNMENT_BYTES // tensor.element_size()
    rows, columns = tensor.shape[-2:]
    for near, far, length in ((-1, -2, columns), (-2, -1, rows)):
        apart = tensor.stride(far)
        if tensor.stride(near) == 1 and apart >= max(1, length) and apart % unit == 0:
            return tensor
    padded = tensor.new_empty(*tensor.shape[:-1], -(-columns // unit) * unit)
    return padded[..., :columns].copy_(tensor)


def _transposed(matrices: Tensor) -> Tensor:
    return matrices.transpose(-2, -1)


def _add_bias(y: Tensor, bias: Tensor | None, ends: Tensor) -> Tensor:
    if bias is None:
        return y
    expert = torch.searchsorted(ends, torch.arange(y.shape[0], dtype=ends.dtype, device=ends.device), right=True)
    return y.add_(bias[expert])


def _masked(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else x * mask


def _accumulate(total: Tensor, rows: Tensor, matrices: Tensor, mask: Tensor | None, call: GroupedCall) -> Tensor:
    """total + (rows through matrices) * mask, in place."""
    if matrices.dim() == 2 and mask is None:
        return total.addmm_(rows, matrices)
    update = times(rows, matrices, call.ends, call.one_by_one)
    return total.add_(update if mask is None else update.mul_(mask))


class _Adapted(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x: Tensor,
        weight: ExpertWeight,
        bias: Tensor | None,
        lora_a: Tensor,
        lora_b: Tensor,
        call: GroupedCall,
    ) -> Tensor:
        a, b = lora_a.to(x.dtype), lora_b.to(x.dtype)
        h = scaled(times(_masked(x, call.input_mask), _transposed(a), call.ends, call.one_by_one), call.scale)
        y = _outputs(x, weight, call.ends, call.one_by_one)
        _accumulate(y, h, _transposed(b), call.output_mask, call)
        ctx.save_for_backward(x, lora_a, lora_b, h)
        ctx.weight, ctx.call = weight, call
        return _add_bias(y, bias, call.ends)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, lora_a, lora_b, h = ctx.saved_tensors
        call: GroupedCall = ctx.call
        ends, shared, one_by_one = call.ends, lora_a.dim() == 2, call.one_by_one
        a, b = lora_a.to(dy.dtype), lora_b.to(dy.dtype)
        dz = _masked(dy, call.output_mask)
        dh = scaled(times(dz, b, ends, one_by_one), call.scale)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = _accumulate(_input_gradients(dy, ctx.weight, ends, one_by_one), dh, a, call.input_mask, call)
        da = outer_sums(dh, _masked(x, call.input_mask), ends, shared=shared, one_by_one=one_by_one).to(lora_a.dtype)
        db = outer_sums(dz, h, ends, shared=shared, one_by_one=one_by_one).to(lora_b.dtype)
        return dx, None, None, da, db if call.b_mask is None else db.mul_(call.b_mask), None


class _Frozen(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, weight: ExpertWeight, bias: Tensor | None, ends: Tensor, one_by_one: bool
    ) -> Tensor:
        ctx.weight, ctx.ends, ctx.one_by_one = weight, ends, one_by_one
        return _add_bias(_outputs(x, weight, ends, one_by_one), bias, ends)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return _input_gradients(dy, ctx.weight, ctx.ends, ctx.one_by_one), None, None, None, None
