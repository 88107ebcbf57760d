"""Starting values: their spread, and that a name and a seed alone decide them."""

import math

import pytest
import torch

from megatron_lora.lora.init import init_factor

SHAPE = (64, 4096)


def test_xavier_has_glorots_standard_deviation():
    values = init_factor("xavier", SHAPE, 0, "a")
    assert values.std().item() == pytest.approx(math.sqrt(2 / (64 + 4096)), rel=0.01)
    assert values.abs().max() > 3 * values.std(), "normal, not uniform"


def test_uniform_has_the_kaiming_bound_of_pefts_default():
    values = init_factor("uniform", SHAPE, 0, "a")
    linear = torch.nn.Linear(4096, 64, bias=False)
    torch.nn.init.kaiming_uniform_(linear.weight, a=math.sqrt(5))
    for tensor in (values, linear.weight.detach()):
        assert tensor.abs().max().item() == pytest.approx(1 / 64, rel=1e-3)
        assert tensor.std().item() == pytest.approx(1 / 64 / math.sqrt(3), rel=0.01)


def test_normal_and_zero():
    values = init_factor("normal", SHAPE, 0, "a")
    assert values.mean().abs() < 0.01 and values.std().item() == pytest.approx(0.2, rel=0.01)
    assert not init_factor("zero", SHAPE, 0, "a").any()


def test_an_unknown_method_is_refused_with_those_there_are():
    with pytest.raises(ValueError, match="'kaiming'; wanted xavier, uniform, normal or zero"):
        init_factor("kaiming", SHAPE, 0, "a")


@pytest.mark.parametrize("method", ["xavier", "uniform", "normal"])
def test_values_follow_from_seed_and_name_alone(method):
    first = init_factor(method, (4, 8), 3, "layer")
    torch.manual_seed(12345)
    before = torch.get_rng_state()
    assert torch.equal(init_factor(method, (4, 8), 3, "layer"), first)
    assert torch.equal(torch.get_rng_state(), before), "the run's own random numbers were used"
    assert not torch.equal(init_factor(method, (4, 8), 4, "layer"), first)
    assert not torch.equal(init_factor(method, (4, 8), 3, "other"), first)
