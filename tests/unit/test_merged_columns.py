"""Columns of a merged weight against its base and factors: roundings pass, faults that hardly move it do not."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from megatron_lora.lora.methods import method_of
from megatron_lora.rollout.merged_columns import is_sum

OUT, IN, SCALE, COLUMNS = 96, 64, 2.0, (0, 32, 63)


def merge(base: Tensor, a: Tensor, b: Tensor, scale: float = SCALE) -> Tensor:
    """As both policies do it: summed in fp32, rounded to the base's dtype."""
    update = method_of("lora").update(base, {"A": a, "B": b}, scale)
    return (update + base.float()).to(base.dtype)


def holds(found: Tensor, base: Tensor, a: Tensor, b: Tensor) -> bool:
    return all(is_sum(found[:, column], base[:, column], (a, b * SCALE), column) for column in COLUMNS)


def drawn(dtype: torch.dtype, rank: int, step: float) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Base, A, B after one step of AdamW from zero."""
    for seed in range(50):
        draw = torch.Generator().manual_seed(seed)
        base = (torch.randn(OUT, IN, generator=draw) * 0.05).to(dtype)
        a = torch.randn(rank, IN, generator=draw) * IN**-0.5
        yield base, a, torch.randn(OUT, rank, generator=draw).sign() * step


@pytest.mark.parametrize("engine", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", [4, 256])
@pytest.mark.parametrize("step", [1e-5, 1e-2, 1.0])
def test_a_sound_merge_is_never_an_alarm(dtype: torch.dtype, engine: torch.dtype, rank: int, step: float) -> None:
    for base, a, b in drawn(dtype, rank, step):
        assert holds(merge(base, a, b).to(engine), base, a, b)
        # peft scales the product instead of B.
        assert holds(((b @ a) * SCALE + base.float()).to(dtype).to(engine), base, a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_small_step_is_enough_to_tell_every_fault(dtype: torch.dtype) -> None:
    for base, a, b in drawn(dtype, 16, 1e-4):
        shard = b.clone()
        shard[OUT // 2 :] = 0
        wrong = {
            "the version before": merge(base, a, b * 0),
            "scale doubled": merge(base, a, b, 2 * SCALE),
            "another linear's": merge(base, a, b.flip(0)),
            "one TP shard missing": merge(base, a, shard),
            "a base of its own": merge(base.flip(0), a, b),
        }
        assert [fault for fault, found in wrong.items() if holds(found, base, a, b)] == []


def test_a_linear_without_an_adapter_is_the_base_bit_for_bit() -> None:
    base = torch.randn(OUT, IN)
    assert is_sum(base[:, 0], base[:, 0], None, 0)
    assert not is_sum(torch.nextafter(base[:, 0], torch.tensor(9.0)), base[:, 0], None, 0)
