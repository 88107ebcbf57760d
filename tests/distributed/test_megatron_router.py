"""Keys of the router and of the way to the experts: the auxiliary loss is in loss and gradients the same in every
layout, and what is about speed alone changes no number; adapters on the router (fp32, against transformers + peft)."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.cases import CP, EP, FULL_RECOMPUTE, PP, SP, Case
from tests.distributed.test_megatron_experts import assert_merged
from tests.support.compare import assert_same_training, relative_differences
from tests.support.models import SIZES
from tests.support.reference import Training

pytestmark = pytest.mark.timeout(1800)

TOLERANCE, STEPS, COEFFICIENT = 1e-4, 3, 0.5
# Adam moves entries whose gradients are near zero by rounding (tests/distributed/cases.py).
EPS = 1e-5
BALANCED = {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": COEFFICIENT}


def case(name: str, ranks: int, megatron: dict[str, Any], adapter: str = "experts", **fields: Any) -> Case:
    fields = {"family": "qwen3_moe", "options": {"steps": STEPS}} | fields
    return Case(
        f"router_{name}",
        ranks,
        "train",
        adapter=adapter,
        megatron=megatron | {"optimizer": {"adam_eps": EPS}},
        **fields,
    )


# The reference's auxiliary loss is of each row alone.
ROW_BY_ROW: dict[str, Any] = {"policy": {"train_micro_batch_size": 1}}
BALANCED_CASES = [
    case("balanced_tp1", 1, BALANCED | FULL_RECOMPUTE, **ROW_BY_ROW),
    case("balanced_ep", 2, BALANCED | EP | {"moe_per_layer_logging": True}, **ROW_BY_ROW),
    case("balanced_sp", 2, BALANCED | SP, "attention", **ROW_BY_ROW),
    case("balanced_pp", 2, BALANCED | PP, "attention", **ROW_BY_ROW),
    case("balanced_cp", 2, BALANCED | CP, "attention", **ROW_BY_ROW),
    pytest.param(case("balanced_pp_sp", 4, BALANCED | PP | SP, "attention", **ROW_BY_ROW), marks=pytest.mark.long),
]
SPEED = {"moe_token_dispatcher_type": "allgather", "moe_grouped_gemm": False, "moe_router_dtype": "fp64"}
SPEED_CASES = [
    case("speed", 2, EP | SPEED),
    case("overlap", 2, EP | {"moe_shared_expert_overlap": True}, "shared", family="glm4_moe"),
    pytest.param(case("speed_sp", 2, SP | SPEED), marks=pytest.mark.long),
]


@pytest.mark.parametrize("case", BALANCED_CASES, ids=str)
def test_the_auxiliary_loss_is_part_of_the_loss(
    case: Case, ranks_found: list[dict[str, Any]], reference: Callable[..., Training]
) -> None:
    wanted, without = (reference(case, STEPS, eps=EPS, balancing=coefficient) for coefficient in (COEFFICIENT, 0.0))
    for found in ranks_found:
        assert_same_training(found, wanted, TOLERANCE)
        # Where it shows: the loss at once, the gradients too.
        assert min(relative_differences(found["grad_norms"], without.grad_norms)) > 3 * TOLERANCE
        assert all(loss - other > COEFFICIENT for loss, other in zip(found["losses"], without.losses, strict=True))
        layers = [name for name in found["metrics"][0] if name.startswith("load_balancing_loss_layer_")]
        assert len(layers) == (SIZES["num_hidden_layers"] if "moe_per_layer_logging" in case.megatron else 0)
        for metrics in found["metrics"]:
            assert not layers or abs(metrics["load_balancing_loss"] - sum(metrics[name] for name in layers)) < 1e-6


ADAPTED_CASES = [
    case("adapted_ep", 2, EP, "router_experts", options={"steps": STEPS, "merged": True}),
    case("adapted_sp", 2, SP | FULL_RECOMPUTE, "router", options={"steps": STEPS, "merged": True}),
    *(
        pytest.param(one, marks=pytest.mark.long)
        for one in (
            case("adapted_pp", 2, PP, "router"),
            case("adapted_tp1", 1, BALANCED, "router", **ROW_BY_ROW),
            case("adapted_cp", 2, CP, "router"),
            case("adapted_sp_ep", 4, SP | EP, "router_experts"),
        )
    ),
]


@pytest.mark.parametrize("case", ADAPTED_CASES, ids=str)
def test_adapters_on_routers_train_as_pefts_on_their_parameter(
    case: Case, ranks_found: list[dict[str, Any]], reference: Callable[..., Training], room: Any
) -> None:
    balancing = COEFFICIENT if "moe_aux_loss_coeff" in case.megatron else 0.0
    wanted = reference(case, STEPS, eps=EPS, balancing=balancing)
    started = load_file(room.adapter(case.family, case.adapter) / "adapter_model.safetensors")
    assert sum(".mlp.gate.lora_" in name for name in started) == 2 * SIZES["num_hidden_layers"]
    for found in ranks_found:
        assert_same_training(found, wanted, TOLERANCE)
        assert all(in_modules == exported for in_modules, exported in found["fingerprints"])
        assert not [name for name, value in started.items() if torch.equal(found["adapter"][name], value)]
        if case.options.get("merged"):
            assert_merged(found["merged"], load_file(room.base(case.family) / "model.safetensors"), found["each"])


@pytest.mark.parametrize("case", SPEED_CASES, ids=str)
def test_keys_of_speed_change_no_number(
    case: Case, ranks_found: list[dict[str, Any]], reference: Callable[..., Training]
) -> None:
    for found in ranks_found:
        assert_same_training(found, reference(case, STEPS, eps=EPS), TOLERANCE)
