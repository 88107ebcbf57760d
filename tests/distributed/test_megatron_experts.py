"""Mixture-of-experts models: ten AdamW steps of adapters on attention and experts equal transformers + peft in every
layout (fp32), and what is merged for a rollout engine is the whole model."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.cases import CP, EP, ETP, FULL_RECOMPUTE, PP, SP, Case
from tests.support.compare import assert_same_training
from tests.support.reference import ALPHA, RANK, Training

pytestmark = pytest.mark.timeout(1800)

TOLERANCE = 1e-4
PACKED = {"sequence_packing": {"enabled": True, "train_mb_tokens": 64}}
MERGED = {"merged": True}


def case(name: str, ranks: int, megatron: dict | None = None, adapter: str = "experts", **fields: Any) -> Case:
    fields = {"family": "qwen3_moe"} | fields
    return Case(f"experts_{name}", ranks, "train", adapter=adapter, megatron=megatron or {}, **fields)


def nf4_case(name: str, ranks: int, megatron: dict | None = None, adapter: str = "experts", **fields: Any) -> Case:
    """QLoRA, experts in 4 bits, against peft over the same quantized values."""
    fields = {"family": "qwen3_moe_even", "options": MERGED} | fields
    megatron = megatron or {}
    peft = {"quantization": "nf4", "lora_dtype": "float32"} | megatron.get("peft", {})
    return case(f"nf4_{name}", ranks, megatron | {"peft": peft}, adapter, **fields)


SHARED = {"peft": {"share_expert_adapters": True}}
DOUBLE = {"peft": {"double_quantization": True}}
STORED = {"peft": {"lora_dtype": "float32"}}
ONE_BY_ONE = {"moe_grouped_gemm": False}
# Tensors of adapters: layers, linears of attention or tensors of experts, factors.
NUM_TENSORS = {"attention": 4 * 4 * 2, "experts": 4 * 6 * 2, "shared_experts": 4 * 6 * 2}
CASES = [
    case("tp1", 1, options=MERGED),
    case("dp", 2),
    case("ep", 2, EP, options=MERGED),
    case("ep_packing", 2, EP | FULL_RECOMPUTE, policy=PACKED),
    case("ep_shared", 2, EP | SHARED, "shared_experts", options=MERGED),
    case("etp", 2, ETP, options=MERGED),
    case("pp", 2, PP, options=MERGED),
    nf4_case("tp1", 1, DOUBLE),
    nf4_case("etp", 2, ETP),
    *(
        pytest.param(one, marks=pytest.mark.long)
        for one in (
            nf4_case("one_by_one", 1, ONE_BY_ONE),
            nf4_case("ep", 2, EP | DOUBLE),
            nf4_case("ep_attention", 2, EP, "attention"),
            nf4_case("ep_shared", 2, EP | SHARED, "shared_experts"),
            nf4_case("sp", 2, SP),
            nf4_case("pp_recompute", 2, PP | FULL_RECOMPUTE),
            nf4_case("etp_ep", 4, ETP | EP | DOUBLE),
            nf4_case("gpt_oss", 1, DOUBLE, family="gpt_oss_even"),
            nf4_case("gpt_oss_ep", 2, EP, family="gpt_oss_even"),
            # transformers 5 leaves the experts of what it quantizes dense.
            case("stored_nf4", 1, STORED, family="qwen3_moe_even_nf4"),
            case("stored_nf4_ep", 2, EP | STORED, family="qwen3_moe_even_nf4"),
            case("attention", 2, EP, "attention", options=MERGED),
            case("sp", 2, SP, "attention"),
            case("cp", 2, CP, "attention"),
            case("etp_shared", 2, ETP | SHARED, "shared_experts", options=MERGED),
            case("dp_shared", 2, SHARED, "shared_experts"),
            case("sp_shared", 2, SP | SHARED, "shared_experts"),
            case("sp_adapted", 2, SP),
            case("cp_adapted", 2, CP),
            case("sp_ep", 4, SP | EP, options=MERGED),
            case("sp_ep_shared", 4, SP | EP | SHARED, "shared_experts"),
            case("etp_ep", 4, ETP | EP, options=MERGED),
            case("etp_ep_shared", 4, ETP | EP | SHARED, "shared_experts"),
            case("pp_ep", 4, PP | EP, options=MERGED),
            case("gpt_oss_tp1", 1, family="gpt_oss", options=MERGED),
            case("gpt_oss_ep", 2, EP, family="gpt_oss", options=MERGED),
            case("gpt_oss_ep_shared", 2, EP | SHARED, "shared_experts", family="gpt_oss"),
        )
    ),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_ten_steps_equal_transformers_and_peft(
    case: Case, ranks_found: list[dict[str, Any]], reference: Callable[..., Training], room: Any
) -> None:
    wanted = reference(case)
    assert len(wanted.adapter) == NUM_TENSORS[str(case.adapter)]
    # Over 4 bits what is merged is what was trained over.
    base = load_file(room.trained_base(case) / "model.safetensors")
    started = load_file(room.adapter(case.family, case.adapter) / "adapter_model.safetensors")
    for found in ranks_found:
        assert_same_training(found, wanted, TOLERANCE)
        assert all(in_modules == exported for in_modules, exported in found["fingerprints"])
        assert not [name for name, value in started.items() if torch.equal(found["adapter"][name], value)]
        if case.options.get("merged") and case.family.startswith("gpt_oss"):
            assert_packed_merged(found["merged"], base, found["adapter"])
        elif case.options.get("merged"):
            assert_merged(found["merged"], base, found["each"])


def assert_packed_merged(merged: dict[str, torch.Tensor], base: dict[str, torch.Tensor], adapter: dict) -> None:
    """Tensors of all experts [experts, in, out] with what peft adds to them; in its files gate_up_proj's factors are
    those of the inner wrapper."""
    assert merged.keys() == base.keys()
    holders = {".mlp.experts.gate_up_proj": ".mlp.experts.base_layer", ".mlp.experts.down_proj": ".mlp.experts"}
    for end, holder in holders.items():
        names = [name for name in base if name.endswith(end)]
        assert names
        for name in names:
            experts, inputs, outputs = base[name].shape
            a, b = (adapter[f"base_model.model.{name.removesuffix(end)}{holder}.lora_{x}.weight"] for x in "AB")
            update = torch.einsum("ore,eri->eio", b.view(outputs, RANK, experts), a.view(experts, RANK, inputs))
            assert torch.allclose(merged[name], base[name] + ALPHA / RANK * update, atol=1e-5), name
            assert not torch.equal(merged[name], base[name])


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
