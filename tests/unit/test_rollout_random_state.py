"""What a rollout engine draws: the same on every rank for one seed, and nothing of the trainer's."""

import random

import numpy as np
import pytest
import torch

from megatron_lora.rollout.vllm_engine import own_random_state

CPU = torch.device("cpu")


def draws() -> tuple[float, ...]:
    return (random.random(), float(np.random.rand()), float(torch.rand(())))


def trainer(seed: int) -> None:
    """Ranks seed torch; Python's and NumPy's generators start where they like."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(7)


@pytest.mark.parametrize("source", range(3), ids=["python", "numpy", "torch"])
def test_ranks_of_one_engine_draw_alike(source: int) -> None:
    seen = {}
    for rank in range(2):
        for seed in (11, 11, 12):
            trainer(rank)
            with own_random_state(CPU, seed):
                seen.setdefault(seed, set()).add(draws()[source])
    assert len(seen[11]) == len(seen[12]) == 1
    assert seen[11] != seen[12]


def test_the_trainers_draws_are_as_without_an_engine() -> None:
    trainer(3)
    expected = draws()
    trainer(3)
    with own_random_state(CPU, (1 << 40) + 5):
        draws()
    assert draws() == expected
