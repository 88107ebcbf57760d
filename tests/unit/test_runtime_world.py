"""Who a process is, from torchrun's variables."""

import pytest
import torch

from megatron_lora.runtime.world import environment_world

VARIABLES = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}


def test_a_process_of_torchrun_knows_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in VARIABLES.items():
        monkeypatch.setenv(name, value)
    world = environment_world()
    assert (world.rank, world.size, world.local_rank, world.is_main) == (5, 8, 1, False)
    assert world.device == (torch.device("cuda", 1) if torch.cuda.is_available() else torch.device("cpu"))


def test_a_process_started_alone_is_a_world_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    world = environment_world()
    assert (world.rank, world.size, world.local_rank, world.is_main) == (0, 1, 0, True)
