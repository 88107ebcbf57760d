"""One adapted linear with random tensors: what a rank holds of it, and the same by plain autograd."""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_lora.lora.arithmetic import AdapterCall, TensorParallel, column_parallel, row_parallel
from megatron_lora.lora.base_weight import DenseWeight

TOKENS, INPUTS, OUTPUTS, RANK = 12, 8, 20, 6


@dataclass(frozen=True)
class Variant:
    """kind: "column" or "row". dropout: "" or "pre" or "post". blocks: two blocks of A's rows, each with its own scale
    and its own half of B's output rows; else one scale."""

    kind: str
    dropout: str = ""
    blocks: bool = False
    all_to_all: bool = False

    def __str__(self) -> str:
        parts = (self.kind, self.dropout, "blocks" * self.blocks, "all_to_all" * self.all_to_all)
        return "_".join(part for part in parts if part)


VARIANTS = [
    Variant(kind, dropout, blocks) for kind in ("column", "row") for dropout in ("", "pre", "post") for blocks in (0, 1)
]


@dataclass
class Whole:
    """All tensors of the linear, undivided; dy is the gradient that comes in."""

    x: Tensor
    weight: Tensor
    lora_a: Tensor
    lora_b: Tensor
    dy: Tensor
    scale: float | Tensor
    b_mask: Tensor | None
    input_mask: Tensor | None
    output_mask: Tensor | None


def draw(variant: Variant) -> Whole:
    """The same tensors in every process."""
    generator = torch.Generator().manual_seed(5)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def dropout_mask(*shape: int) -> Tensor:
        return torch.bernoulli(torch.full(shape, 0.6, dtype=torch.float64), generator=generator) / 0.6

    mask = torch.zeros(OUTPUTS, RANK, dtype=torch.bool)
    mask[: OUTPUTS // 2, : RANK // 2] = True
    mask[OUTPUTS // 2 :, RANK // 2 :] = True
    b_mask = mask if variant.blocks else None
    lora_b = normal(OUTPUTS, RANK)
    return Whole(
        x=normal(TOKENS, INPUTS),
        weight=normal(OUTPUTS, INPUTS),
        lora_a=normal(RANK, INPUTS),
        lora_b=lora_b if b_mask is None else lora_b * b_mask,
        dy=normal(TOKENS, OUTPUTS),
        scale=torch.tensor([2.0] * 3 + [0.25] * 3, dtype=torch.float64) if variant.blocks else 2.0,
        b_mask=b_mask,
        input_mask=dropout_mask(TOKENS, INPUTS) if variant.dropout == "pre" else None,
        output_mask=dropout_mask(TOKENS, OUTPUTS) if variant.dropout == "post" else None,
    )


def by_autograd(whole: Whole) -> dict[str, Tensor]:
    """y = W x + dropout(B s A dropout(x)), and the gradients of x, A and B."""
    x, lora_a, lora_b = (t.clone().requires_grad_() for t in (whole.x, whole.lora_a, whole.lora_b))
    inner = x if whole.input_mask is None else x * whole.input_mask
    update = (inner @ lora_a.t() * whole.scale) @ lora_b.t()
    y = x @ whole.weight.t() + (update if whole.output_mask is None else update * whole.output_mask)
    y.backward(whole.dy)
    assert x.grad is not None and lora_a.grad is not None and lora_b.grad is not None
    db = lora_b.grad if whole.b_mask is None else lora_b.grad * whole.b_mask
    return {"y": y.detach(), "dx": x.grad, "da": lora_a.grad, "db": db}


def run_on_rank(variant: Variant, whole: Whole, tp: TensorParallel) -> dict[str, tuple[Tensor, Tensor]]:
    """This rank's part by the product, beside the same part of `by_autograd`: name -> (found, wanted)."""
    wanted = by_autograd(whole)
    column = variant.kind == "column"
    everything = slice(None)

    def part(size: int) -> slice:
        return slice(tp.rank * size // tp.size, (tp.rank + 1) * size // tp.size)

    tokens = part(TOKENS) if tp.sequence_parallel else everything
    inputs = everything if column else part(INPUTS)
    outputs = part(OUTPUTS) if column else everything
    b_rows = part(OUTPUTS) if column or variant.all_to_all else everything
    x_part = (tokens if column else everything, inputs)
    y_part = (everything if column else tokens, outputs)
    x, lora_a, lora_b = (
        tensor.clone().requires_grad_() for tensor in (whole.x[x_part], whole.lora_a[:, inputs], whole.lora_b[b_rows])
    )
    call = AdapterCall(
        parallel=tp,
        scale=whole.scale,
        b_mask=None if whole.b_mask is None else whole.b_mask[b_rows],
        input_mask=None if whole.input_mask is None else whole.input_mask[:, inputs],
        output_mask=None if whole.output_mask is None else whole.output_mask[:, b_rows],
        all_to_all=variant.all_to_all,
    )
    weight = DenseWeight(whole.weight[outputs, inputs].contiguous())
    if column:
        y = column_parallel(x, weight, None, lora_a, lora_b, call)
    else:
        y = row_parallel(x, weight, lora_a, lora_b, call)
    y.backward(whole.dy[y_part].contiguous())
    assert x.grad is not None and lora_a.grad is not None and lora_b.grad is not None
    if tp.size > 1 and not variant.all_to_all:
        # The factor that every rank holds whole is summed over TP once a step.
        torch.distributed.all_reduce(lora_a.grad if column else lora_b.grad, group=tp.group)
    return {
        "y": (y.detach(), wanted["y"][y_part]),
        "dx": (x.grad, wanted["dx"][x_part]),
        "da": (lora_a.grad, wanted["da"][:, inputs]),
        "db": (lora_b.grad, wanted["db"][b_rows]),
    }
