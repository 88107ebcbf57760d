"""The adapter's products on one rank: equal to autograd, and no more work than they need."""

import pytest
import torch
from torch import Tensor

from megatron_lora.lora.arithmetic import AdapterCall, TensorParallel, column_parallel, row_parallel
from megatron_lora.lora.base_weight import DenseWeight
from tests.support.adapted_linear import INPUTS, OUTPUTS, RANK, TOKENS, VARIANTS, Variant, draw, run_on_rank
from tests.support.recorder import Recorder, kept_for_backward

ALONE = TensorParallel(None, 1, 0, False)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_forward_and_gradients_equal_autograd(variant: Variant) -> None:
    for name, (found, wanted) in run_on_rank(variant, draw(variant), ALONE).items():
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10, msg=lambda text, n=name: f"{n}: {text}")


@pytest.fixture(params=["column", "row"])
def ran(request: pytest.FixtureRequest) -> tuple[Recorder, Recorder, list[Tensor], dict[str, Tensor]]:
    """(forward's operations, backward's operations, what was kept in between, the tensors)."""
    whole = draw(Variant(request.param))
    x, lora_a, lora_b = (t.requires_grad_() for t in (whole.x, whole.lora_a, whole.lora_b))
    # As in a model: a product of an input that is itself no leaf.
    call = AdapterCall(parallel=ALONE, scale=2.0)
    given = x * 1.0
    with kept_for_backward() as kept, Recorder() as forward:
        if request.param == "column":
            y = column_parallel(given, DenseWeight(whole.weight), None, lora_a, lora_b, call)
        else:
            y = row_parallel(given, DenseWeight(whole.weight), lora_a, lora_b, call)
    with Recorder() as backward:
        torch.autograd.grad(y, (given, lora_a, lora_b), whole.dy)
    return forward, backward, kept, {"x": given, "weight": whole.weight, "a": lora_a, "b": lora_b}


def test_the_update_is_accumulated_into_the_bases_output(ran) -> None:
    forward = ran[0]
    full_width = [op for op in forward.operations if op.shape == (TOKENS, OUTPUTS) and op.writes]
    # One product with W; the update's product adds to it in place.
    assert [(op.name, op.new) for op in full_width] == [("mm", True), ("addmm_", False)]
    assert sorted(forward.products()) == sorted([(TOKENS, OUTPUTS), (TOKENS, OUTPUTS), (TOKENS, RANK)])


def test_the_backward_pass_has_five_products_and_none_for_the_frozen_weight(ran) -> None:
    backward = ran[1]
    wanted = [(TOKENS, RANK), (OUTPUTS, RANK), (RANK, INPUTS), (TOKENS, INPUTS), (TOKENS, INPUTS)]
    assert sorted(backward.products()) == sorted(wanted)
    full_width = [op for op in backward.operations if op.shape == (TOKENS, INPUTS) and op.writes]
    assert [(op.name, op.new) for op in full_width] == [("mm", True), ("addmm_", False)]


def test_the_input_is_kept_once_and_besides_only_the_rank_wide_product(ran) -> None:
    _, _, kept, tensors = ran
    parameters = {tensors[name].data_ptr() for name in ("weight", "a", "b")}
    others = [tensor for tensor in kept if tensor.data_ptr() not in parameters]
    assert sorted(tuple(tensor.shape) for tensor in others) == sorted([(TOKENS, INPUTS), (TOKENS, RANK)])
    assert [tensor.data_ptr() for tensor in others].count(tensors["x"].data_ptr()) == 1
