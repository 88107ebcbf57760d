"""The adapter's arithmetic: y = W x + s B A x for a frozen W, forward and backward, in one place.

Hu et al. 2021 (LoRA), eq. 3. W stays frozen, so neither its gradient nor the input it would need is kept; the input is
kept once, for A's gradient, or computed again there (`Again`); the update is accumulated into the base's output (a
product with beta = 1) and the scale is applied to the rank-r activation, so the adapter adds no pass over a full-width
tensor.

Collectives (see docs/architecture.md for where the factors live): column-parallel adds none. Under sequence parallelism
the rank-r gradient dh rides in the same reduce-scatter as dx, so A's gradient is taken on this rank's shard of the
sequence and the gathered input need not be kept. Row-parallel adds none: the partial B h rides in the base's own
reduction. With `all_to_all` (row-parallel under sequence parallelism) B is split over TP: two rank-r all-reduces and
one all-to-all replace B's replicated product.

All tensors here are [tokens, features].
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_lora.lora.base_weight import BaseWeight

# Of the kernels of `adapter_kernels`: ranks above take more registers than a program has.
HIGHEST_RANK = 128


@dataclass(frozen=True)
class TensorParallel:
    """How a linear talks to its tensor-parallel peers."""

    group: dist.ProcessGroup | None
    size: int
    rank: int
    sequence_parallel: bool

    def without_communication(self) -> "TensorParallel":
        """Of a linear whose input is on every rank and whose output stays partial."""
        return TensorParallel(self.group, 1, 0, False)

    def all_gather(self, shard: Tensor) -> Tensor:
        """[t / size, f] -> [t, f]."""
        out = shard.new_empty(shard.shape[0] * self.size, *shard.shape[1:])
        dist.all_gather_into_tensor(out, shard.contiguous(), group=self.group)
        return out

    def reduce_scatter(self, full: Tensor, async_op: bool = False) -> tuple[Tensor, Any]:
        """Sum over ranks of [t, f], this rank's rows: [t / size, f]; with the handle of an asynchronous call."""
        out = full.new_empty(full.shape[0] // self.size, *full.shape[1:])
        handle = dist.reduce_scatter_tensor(out, full.contiguous(), group=self.group, async_op=async_op)
        return out, handle

    def all_reduce(self, value: Tensor, async_op: bool = False) -> Any:
        return dist.all_reduce(value, group=self.group, async_op=async_op)

    def shard(self, full: Tensor) -> Tensor:
        """This rank's rows of [t, f]."""
        rows = full.shape[0] // self.size
        return full.narrow(0, self.rank * rows, rows)

    def hidden_to_sequence(self, value: Tensor) -> Tensor:
        """All-to-all from features split to sequence split: [t, f / size] -> [t / size, f]."""
        rows, columns = value.shape[0] // self.size, value.shape[1]
        received = torch.empty_like(value)
        dist.all_to_all_single(received, value.contiguous(), group=self.group)
        return received.view(self.size, rows, columns).transpose(0, 1).reshape(rows, self.size * columns)


@dataclass(frozen=True)
class Again:
    """How a linear's input [..., in] comes about: function(*sources), of tensors that are kept for the backward pass in
    any case, so that the input need not be."""

    function: Callable[..., Tensor]
    sources: tuple[Tensor, ...]


@dataclass(frozen=True)
class AdapterCall:
    """What one call of an adapted linear needs besides its tensors.

    scale: a number, or [R] where blocks differ. b_mask: which entries of B train, or None for all. input_mask,
    output_mask: dropout masks already divided by the keep probability (on A's input, on B's output), or None. again:
    how the input is computed again for A's gradient; None: it is kept. gate: of a row-parallel linear, the SwiGLU in
    front of it: x is [gate | up] [T, 2 in / tp] then, and A's gradient comes out of the SwiGLU's own backward pass (on
    a GPU, `adapter_kernels.gated_backward`), so that its output is not kept.
    """

    parallel: TensorParallel
    scale: float | Tensor
    b_mask: Tensor | None = None
    input_mask: Tensor | None = None
    output_mask: Tensor | None = None
    all_to_all: bool = False
    again: Again | None = field(default=None, repr=False)
    gate: Callable[[Tensor], Tensor] | None = None


def column_parallel(
    x: Tensor, weight: BaseWeight, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, call: AdapterCall
) -> Tensor:
    """x [t, in] (this rank's rows under sequence parallelism), weight [out / tp, in], lora_a [R, in],
    lora_b [out / tp, R] -> [T, out / tp]."""
    return _ColumnParallel.apply(x, weight, bias, lora_a, lora_b, call)  # type: ignore[return-value]


def row_parallel(x: Tensor, weight: BaseWeight, lora_a: Tensor, lora_b: Tensor, call: AdapterCall) -> Tensor:
    """x [T, in / tp], weight [out, in / tp], lora_a [R, in / tp], lora_b [out, R] (or [out / tp, R] with all_to_all)
    -> [t, out], reduced over TP (this rank's rows under sequence parallelism)."""
    return _RowParallel.apply(x, weight, lora_a, lora_b, call)  # type: ignore[return-value]


def frozen_column_parallel(x: Tensor, weight: BaseWeight, bias: Tensor | None, parallel: TensorParallel) -> Tensor:
    """`column_parallel` of the base alone."""
    return _FrozenColumnParallel.apply(x, weight, bias, parallel)  # type: ignore[return-value]


def frozen_row_parallel(x: Tensor, weight: BaseWeight, parallel: TensorParallel) -> Tensor:
    """`row_parallel` of the base alone."""
    return _FrozenRowParallel.apply(x, weight, parallel)  # type: ignore[return-value]


def _project_down(x: Tensor, lora_a: Tensor, scale: float | Tensor, input_mask: Tensor | None) -> Tensor:
    """h = s A x, in x's dtype: [T, R]."""
    if input_mask is not None:
        x = x * input_mask
    return scaled(x @ lora_a.to(x.dtype).t(), scale)


def scaled(h: Tensor, scale: float | Tensor) -> Tensor:
    """h times scale, in place."""
    return h.mul_(scale.to(h.dtype) if isinstance(scale, Tensor) else scale)


def _add_up(y: Tensor, h: Tensor, lora_b: Tensor, output_mask: Tensor | None) -> None:
    """y += B h, in place."""
    factor = lora_b.to(y.dtype).t()
    if output_mask is None:
        y.addmm_(h, factor)
    else:
        y.add_((h @ factor).mul_(output_mask))


def _grad_b(dy: Tensor, h: Tensor, lora_b: Tensor, b_mask: Tensor | None) -> Tensor:
    grad = (dy.t() @ h).to(lora_b.dtype)
    return grad if b_mask is None else grad.mul_(b_mask)


def _grad_a(dh: Tensor, x: Tensor, input_mask: Tensor | None, lora_a: Tensor) -> Tensor:
    return (dh.t() @ (x if input_mask is None else x * input_mask)).to(lora_a.dtype)


def _grads_through_gate(given: Tensor, dy: Tensor, dh: Tensor, lora_a: Tensor) -> tuple[Tensor, Tensor]:
    """(gradient of the SwiGLU's input, A's gradient) from that of its output."""
    # Triton is there with PyTorch for GPUs alone.
    from megatron_lora.lora.adapter_kernels import gated_backward

    gradient, da = gated_backward(given, dy, dh)
    return gradient, da.to(lora_a.dtype)


def _add_input_grad(dx: Tensor, dh: Tensor, lora_a: Tensor, input_mask: Tensor | None) -> Tensor:
    """dx + A^T dh, in place where dx is contiguous."""
    factor = lora_a.to(dx.dtype)
    if input_mask is not None:
        return dx + (dh @ factor).mul_(input_mask)
    if dx.is_contiguous():
        return dx.addmm_(dh, factor)
    return torch.addmm(dx, dh, factor)


def _keep(ctx: Any, call: AdapterCall, x: Tensor, *others: Tensor) -> None:
    """Save for the backward pass what gives x, and the others."""
    again = call.again
    ctx.again = None if again is None else again.function
    # Tensors in the context's attributes would outlive the backward pass.
    ctx.call = replace(call, again=None)
    ctx.save_for_backward(*others, *([x] if again is None else again.sources))


def _kept(ctx: Any, others: int) -> tuple[Callable[[], Tensor], tuple[Tensor, ...]]:
    """(what gives x [t, in], the other tensors that were saved)."""
    saved = ctx.saved_tensors
    again, sources = ctx.again, saved[others:]
    return (lambda: sources[0] if again is None else again(*sources).flatten(0, -2)), saved[:others]


class _ColumnParallel(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, weight: BaseWeight, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, call: AdapterCall
    ) -> Tensor:
        full = call.parallel.all_gather(x) if call.parallel.sequence_parallel else x
        h = _project_down(full, lora_a, call.scale, call.input_mask)
        y = weight.product(full, bias)
        _add_up(y, h, lora_b, call.output_mask)
        _keep(ctx, call, x, lora_a, lora_b, h)
        ctx.weight = weight
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        given, (lora_a, lora_b, h) = _kept(ctx, 3)
        weight: BaseWeight = ctx.weight
        call: AdapterCall = ctx.call
        dz = dy if call.output_mask is None else dy * call.output_mask
        if call.parallel.sequence_parallel:
            dx, dh, db = _column_backward_sequence(ctx.needs_input_grad[0], dy, dz, weight, lora_b, h, call)
            mask = None if call.input_mask is None else call.parallel.shard(call.input_mask)
            da = _grad_a(dh, given(), mask, lora_a)
            if dx is not None:
                dx = _add_input_grad(dx, dh, lora_a, mask)
            return dx, None, None, da, db, None
        # Partial over TP: dx is summed by the base's own all-reduce, A's gradient once a step.
        dh = scaled(dz @ lora_b.to(dy.dtype), call.scale)
        dx, handle = None, None
        if ctx.needs_input_grad[0]:
            dx = _add_input_grad(weight.input_gradient(dy), dh, lora_a, call.input_mask)
            if call.parallel.size > 1:
                handle = call.parallel.all_reduce(dx, async_op=True)
        da = _grad_a(dh, given(), call.input_mask, lora_a)
        db = _grad_b(dz, h, lora_b, call.b_mask)
        if handle is not None:
            handle.wait()
        return dx, None, None, da, db, None


def _column_backward_sequence(
    needs_dx: bool, dy: Tensor, dz: Tensor, weight: BaseWeight, lora_b: Tensor, h: Tensor, call: AdapterCall
) -> tuple[Tensor | None, Tensor, Tensor]:
    """(dx, dh) on this rank's rows from one reduce-scatter of [dx | dh], and dB computed meanwhile."""
    width, rank = (weight.shape[1] if needs_dx else 0), lora_b.shape[1]
    both = dy.new_empty(dy.shape[0], width + rank)
    if needs_dx:
        weight.input_gradient(dy, out=both[:, :width])
    torch.mm(dz, lora_b.to(dy.dtype), out=both[:, width:])
    reduced, handle = call.parallel.reduce_scatter(both, async_op=True)
    db = _grad_b(dz, h, lora_b, call.b_mask)
    handle.wait()
    dh = scaled(reduced[:, width:].contiguous(), call.scale)
    return (reduced[:, :width] if needs_dx else None), dh, db


class _RowParallel(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, weight: BaseWeight, lora_a: Tensor, lora_b: Tensor, call: AdapterCall
    ) -> Tensor:
        parallel = call.parallel
        given = x
        if call.gate is not None:
            x = call.gate(given)
        h = _project_down(x, lora_a, call.scale, call.input_mask)
        handle = parallel.all_reduce(h, async_op=True) if call.all_to_all else None
        y = weight.product(x)
        if not call.all_to_all:
            _add_up(y, h, lora_b, call.output_mask)
        if parallel.sequence_parallel:
            y, _ = parallel.reduce_scatter(y)
        elif parallel.size > 1:
            parallel.all_reduce(y)
        if handle is not None:
            handle.wait()
            z = h @ lora_b.to(y.dtype).t()
            if call.output_mask is not None:
                z.mul_(call.output_mask)
            y.add_(parallel.hidden_to_sequence(z))
        _keep(ctx, call, given, lora_a, lora_b, h)
        ctx.weight = weight
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        given, (lora_a, lora_b, h) = _kept(ctx, 3)
        weight: BaseWeight = ctx.weight
        call: AdapterCall = ctx.call
        parallel = call.parallel
        if parallel.sequence_parallel:
            dy = parallel.all_gather(dy)
        dz = dy
        if call.all_to_all:
            width = lora_b.shape[0]
            dz = dy[:, parallel.rank * width : (parallel.rank + 1) * width]
        if call.output_mask is not None:
            dz = dz * call.output_mask
        dh = scaled(dz @ lora_b.to(dy.dtype), call.scale)
        handle = parallel.all_reduce(dh, async_op=True) if call.all_to_all else None
        db = _grad_b(dz, h, lora_b, call.b_mask)
        dx = weight.input_gradient(dy) if ctx.needs_input_grad[0] else None
        if handle is not None:
            handle.wait()
        if dx is not None:
            dx = _add_input_grad(dx, dh, lora_a, call.input_mask)
        if call.gate is None:
            da = _grad_a(dh, given(), call.input_mask, lora_a)
        else:
            assert dx is not None
            dx, da = _grads_through_gate(given(), dx, dh, lora_a)
        return dx, None, da, db, None


class _FrozenColumnParallel(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, weight: BaseWeight, bias: Tensor | None, parallel: TensorParallel
    ) -> Tensor:
        ctx.weight, ctx.parallel = weight, parallel
        return weight.product(parallel.all_gather(x) if parallel.sequence_parallel else x, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        parallel: TensorParallel = ctx.parallel
        dx = ctx.weight.input_gradient(dy)
        if parallel.sequence_parallel:
            dx, _ = parallel.reduce_scatter(dx)
        elif parallel.size > 1:
            parallel.all_reduce(dx)
        return dx, None, None, None


class _FrozenRowParallel(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: BaseWeight, parallel: TensorParallel) -> Tensor:  # type: ignore[override]
        ctx.weight, ctx.parallel = weight, parallel
        y = weight.product(x)
        if parallel.sequence_parallel:
            y, _ = parallel.reduce_scatter(y)
        elif parallel.size > 1:
            parallel.all_reduce(y)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if ctx.parallel.sequence_parallel:
            dy = ctx.parallel.all_gather(dy)
        return ctx.weight.input_gradient(dy), None, None
