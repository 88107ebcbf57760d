"""The products of a layer's experts all at once: equal to autograd expert by expert, also where some have no rows."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from megatron_lora.lora.base_weight import DenseExperts, ExpertWeight
from megatron_lora.lora.four_bit import FourBitExperts, quantize
from megatron_lora.lora.grouped import GroupedCall, adapted_grouped_linear, grouped_linear, row_ends
from tests.support.recorder import kept_for_backward

INPUTS, OUTPUTS = 12, 20
SPLITS = {"even": [4, 4, 4], "gaps": [0, 7, 0, 0, 5, 0], "one": [9], "none": [0, 0]}


@dataclass(frozen=True)
class Variant:
    """dropout: "" or "pre" or "post". blocks: two scales, and a B of which half trains. one_by_one: without the
    product of all experts at once."""

    shared: bool = False
    dropout: str = ""
    blocks: bool = False
    bias: bool = False
    rank: int = 6
    one_by_one: bool = False


VARIANTS = [
    Variant(),
    Variant(rank=1),
    Variant(rank=8, bias=True),
    Variant(dropout="pre"),
    Variant(dropout="post", bias=True),
    Variant(blocks=True),
    Variant(shared=True),
    Variant(shared=True, dropout="post", blocks=True),
    Variant(shared=True, dropout="pre", bias=True),
    Variant(one_by_one=True, dropout="post", bias=True),
    Variant(one_by_one=True, shared=True, dropout="pre"),
]


@dataclass
class Drawn:
    splits: list[int]
    x: Tensor
    weight: Tensor
    bias: Tensor | None
    a: Tensor
    b: Tensor
    dy: Tensor
    call: GroupedCall


def draw(variant: Variant, splits: list[int], device: str = "cpu", dtype: torch.dtype = torch.float32) -> Drawn:
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    def mask(*shape: int) -> Tensor:
        return (torch.bernoulli(torch.full(shape, 0.6), generator=generator) / 0.6).to(device, dtype)

    experts, rows, rank = len(splits), sum(splits), variant.rank
    trains = torch.ones(OUTPUTS, rank, dtype=torch.bool, device=device)
    trains[: OUTPUTS // 2, rank // 2 :] = False
    whose = () if variant.shared else (experts,)
    return Drawn(
        splits=splits,
        x=normal(rows, INPUTS),
        weight=normal(experts, OUTPUTS, INPUTS),
        bias=normal(experts, OUTPUTS) if variant.bias else None,
        a=normal(*whose, rank, INPUTS),
        b=normal(*whose, OUTPUTS, rank),
        dy=normal(rows, OUTPUTS),
        call=GroupedCall(
            ends=row_ends(splits, torch.device(device)),
            scale=torch.tensor([2.0] * (rank // 2) + [0.5] * (rank - rank // 2), device=device)
            if variant.blocks
            else 2.0,
            b_mask=trains if variant.blocks else None,
            input_mask=mask(rows, INPUTS) if variant.dropout == "pre" else None,
            output_mask=mask(rows, OUTPUTS) if variant.dropout == "post" else None,
            one_by_one=variant.one_by_one,
        ),
    )


def by_autograd(drawn: Drawn) -> list[Tensor]:
    """y and the gradients of x, A and B: each expert's rows through its own matrices, by autograd."""
    x, a, b = (tensor.clone().requires_grad_() for tensor in (drawn.x, drawn.a, drawn.b))
    call = drawn.call
    inner = x if call.input_mask is None else x * call.input_mask
    bounds = [0, *call.ends.tolist()]
    outputs = []
    for expert, (start, stop) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        own_a, own_b = (a, b) if a.dim() == 2 else (a[expert], b[expert])
        update = (inner[start:stop] @ own_a.t() * call.scale) @ own_b.t()
        if call.output_mask is not None:
            update = update * call.output_mask[start:stop]
        y = x[start:stop] @ drawn.weight[expert].t() + update
        outputs.append(y if drawn.bias is None else y + drawn.bias[expert])
    y = torch.cat(outputs)
    y.backward(drawn.dy)
    grads = [torch.zeros_like(tensor) if tensor.grad is None else tensor.grad for tensor in (x, a, b)]
    if call.b_mask is not None:
        grads[2] = grads[2] * call.b_mask
    return [y.detach(), *grads]


def all_at_once(drawn: Drawn, weight: ExpertWeight | None = None) -> list[Tensor]:
    """weight: in the place of the drawn one."""
    x, a, b = (tensor.clone().requires_grad_() for tensor in (drawn.x, drawn.a, drawn.b))
    y = adapted_grouped_linear(x, weight or DenseExperts(drawn.weight), drawn.bias, a, b, drawn.call)
    y.backward(drawn.dy)
    assert x.grad is not None and a.grad is not None and b.grad is not None
    return [y.detach(), x.grad, a.grad, b.grad]


@pytest.mark.parametrize("splits", SPLITS.values(), ids=SPLITS)
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_all_experts_at_once_equal_one_after_the_other(variant: Variant, splits: list[int]) -> None:
    drawn = draw(variant, splits)
    for name, found, wanted in zip("y dx da db".split(), all_at_once(drawn), by_autograd(drawn), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("splits", SPLITS.values(), ids=SPLITS)
@pytest.mark.parametrize("one_by_one", [False, True])
def test_the_frozen_product_is_the_one_of_zero_adapters(one_by_one: bool, splits: list[int]) -> None:
    drawn = draw(Variant(bias=True), splits)
    drawn.b.zero_()
    x = drawn.x.clone().requires_grad_()
    weight = DenseExperts(drawn.weight)
    y = grouped_linear(x, weight, drawn.bias, drawn.call.ends, one_by_one=one_by_one)
    y.backward(drawn.dy)
    wanted_y, wanted_dx, *_ = by_autograd(drawn)
    assert x.grad is not None
    torch.testing.assert_close(y.detach(), wanted_y, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x.grad, wanted_dx, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("splits", SPLITS.values(), ids=SPLITS)
@pytest.mark.parametrize("one_by_one", [False, True])
def test_products_over_4_bits_are_those_of_their_values_and_keep_nothing(one_by_one: bool, splits: list[int]) -> None:
    drawn = draw(Variant(one_by_one=one_by_one, bias=True), splits)
    experts, outputs, inputs = drawn.weight.shape[0], OUTPUTS, 64
    generator = torch.Generator().manual_seed(4)
    wide = torch.randn(experts, outputs, inputs, generator=generator)
    drawn.x = torch.randn(sum(splits), inputs, generator=generator)
    drawn.a = torch.randn(experts, drawn.a.shape[1], inputs, generator=generator)
    held = FourBitExperts(quantize(wide.flatten(0, 1), double=True), experts, torch.float32)
    # Half a byte a value, a byte a block of 64, and 12 bytes a row.
    assert held.matrix.num_bytes <= wide.numel() * (0.5 + 1 / 64) + experts * outputs * 12 + 4 * 256
    drawn.weight = held.dense()
    assert not torch.equal(drawn.weight, wide)
    with kept_for_backward() as kept:
        found = all_at_once(drawn, held)
    assert not any(tensor.shape[-2:] == wide.shape[-2:] for tensor in kept)
    for name, ours, wanted in zip("y dx da db".split(), found, by_autograd(drawn), strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-4, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.gpu
@pytest.mark.parametrize("splits", [[512, 0, 1, 1023, 0, 77, 0], [0, 0, 8], [0, 0]], ids=str)
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_one_kernel_on_a_gpu_equals_experts_one_after_the_other(variant: Variant, splits: list[int]) -> None:
    """bf16 products of one kernel against fp32 ones, relative to the largest number."""
    found = all_at_once(draw(variant, splits, "cuda", torch.bfloat16))
    wanted = by_autograd(draw(variant, splits, "cuda"))
    for name, ours, true in zip("y dx da db".split(), found, wanted, strict=True):
        assert bool(torch.isfinite(ours).all()), name
        if true.numel():
            worst = float((ours.float() - true).abs().max() / true.abs().max().clamp_min(1e-6))
            assert worst < 2e-2, (name, worst)
