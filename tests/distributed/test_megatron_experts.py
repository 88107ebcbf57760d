"""Mixture-of-experts models: ten AdamW steps of adapters on attention equal transformers + peft in every layout (fp32),
and what is merged for a rollout engine is the whole model."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.megatron_case import CP, EP, ETP, FULL_RECOMPUTE, PP, SP, Case
from tests.support.compare import assert_same_training
from tests.support.reference import ALPHA, RANK, Training

pytestmark = pytest.mark.timeout(1800)

TOLERANCE = 1e-4
PACKED = {"sequence_packing": {"enabled": True, "train_mb_tokens": 64}}
MERGED = {"merged": True}


def case(name: str, ranks: int, megatron: dict | None = None, **fields: Any) -> Case:
    return Case(f"experts_{name}", ranks, "train", "qwen3_moe", "attention", megatron=megatron or {}, **fields)


CASES = [
    case("tp1", 1, options=MERGED),
    case("dp", 2),
    case("ep", 2, EP, options=MERGED),
    case("ep_packing", 2, EP | FULL_RECOMPUTE, policy=PACKED),
    case("sp", 2, SP),
    case("etp", 2, ETP, options=MERGED),
    case("pp", 2, PP, options=MERGED),
    case("cp", 2, CP),
    pytest.param(case("sp_ep", 4, SP | EP, options=MERGED), marks=pytest.mark.long),
    pytest.param(case("pp_ep", 4, PP | EP, options=MERGED), marks=pytest.mark.long),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_ten_steps_equal_transformers_and_peft(
    case: Case, ranks_found: list[dict[str, Any]], reference: Callable[..., Training], room: Any
) -> None:
    wanted = reference(case)
    assert len(wanted.adapter) == 4 * 4 * 2  # layers, linears of attention, factors
    base = load_file(room.base(case.family) / "model.safetensors")
    for found in ranks_found:
        assert_same_training(found, wanted, "adapter", TOLERANCE)
        assert all(in_modules == exported for in_modules, exported in found["fingerprints"])
        if case.options.get("merged"):
            assert_merged(found["merged"], base, found["adapter"])


def assert_merged(merged: dict[str, torch.Tensor], base: dict[str, torch.Tensor], adapter: dict) -> None:
    """Every tensor of the base under its own name: adapted ones with their update, the rest bit for bit."""
    assert merged.keys() == base.keys()
    for name, value in base.items():
        prefix = f"base_model.model.{name.removesuffix('.weight')}"
        a, b = (adapter.get(f"{prefix}.lora_{letter}.weight") for letter in "AB")
        if a is None or b is None:
            assert torch.equal(merged[name], value), name
        else:
            assert torch.allclose(merged[name], value + ALPHA / RANK * b @ a, atol=1e-5), name
            assert not torch.equal(merged[name], value)
