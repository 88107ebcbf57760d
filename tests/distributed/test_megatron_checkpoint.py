"""Save, load into a new policy, go on: bit for bit as if nothing had happened on the same layout, equal to 1e-5 on
another, the optimizer's moments included (without them the next updates would be other ones)."""

from typing import Any

import pytest

from tests.distributed.cases import CP, EP, ETP, PP, SP, TP, VPP, Case
from tests.support.compare import assert_goes_on_alike, assert_same_run, assert_stored_alike

pytestmark = pytest.mark.timeout(2700)

WHOLE_OPTIMIZER = {"optimizer": {"use_distributed_optimizer": False}}
DORA = {"peft": {"type": "dora", "lora_plus_ratio": 4.0}}
PISSA = {"peft": {"init_lora_weights": "pissa"}}
SAVED = {"peft": {"modules_to_save": ["embed_tokens", "input_layernorm", "norm", "lm_head"]}}
NF4 = {"peft": {"quantization": "nf4", "double_quantization": True, "lora_dtype": "float32"}}
DROPOUT = {"peft": {"dropout": 0.2}}


def case(name: str, ranks: int, megatron: dict, others: dict[str, dict] | None = None, **fields: Any) -> Case:
    options = {"layouts": {"same": megatron} | (others or {})} | fields.pop("options", {})
    return Case(f"checkpoint_{name}", ranks, "checkpoint", megatron=megatron, options=options, **fields)


FROM_ONE_RANK = case("one", 1, {}, options={"other_rank": True})
SAME = [
    FROM_ONE_RANK,
    case("one_dropout", 1, DROPOUT),
    case("own_a", 2, TP, {"dp": {}}, adapter="own"),
    case("unlike", 2, TP, {"pp": PP}, adapter="unlike"),
    case("sp_dropout", 2, SP | DROPOUT),
    case("pp_dropout", 2, PP | DROPOUT),
    case("dp", 2, {}, {"tp": TP, "pp": PP, "whole_optimizer": WHOLE_OPTIMIZER}),
    case("tp", 2, TP, {"dp": {}, "vpp": VPP, "cp": CP}),
    case("pp", 2, PP, {"dp": {}, "sp": SP}),
    case("head", 2, TP, {"dp": {}, "pp": PP}, adapter="head"),
    case("dora_lora_plus", 2, TP | DORA, {"dp": DORA, "pp": PP | DORA}, adapter="dora"),
    case("pissa", 2, TP | PISSA, {"dp": PISSA, "pp": PP | PISSA}, adapter="drawn"),
    case("saved", 2, TP | SAVED, {"dp": SAVED, "pp": PP | SAVED}, adapter="saved"),
    case("nf4", 2, TP | NF4, {"dp": NF4, "pp": PP | NF4}, family="qwen3_even"),
    case("asynchronous", 2, SP, {"dp": {}}, options={"asynchronous": True}),
    case("experts", 2, EP, {"dp": {}, "etp": ETP, "pp": PP}, family="qwen3_moe", adapter="router_experts"),
    case("full", 2, TP, {"dp": {}, "pp": PP}, family="qwen2", adapter=None),
]
SHARED = {"peft": {"share_expert_adapters": True}}
SHARED_EXPERTS = case(
    "shared_experts",
    2,
    EP | SHARED,
    {"dp": SHARED, "etp": ETP | SHARED, "whole_optimizer": EP | SHARED | WHOLE_OPTIMIZER},
    family="qwen3_moe",
    adapter="shared_experts",
)
EXPERTS_IN_NF4 = case(
    "nf4_experts",
    2,
    EP | NF4,
    {"dp": NF4, "etp": ETP | NF4, "pp": PP | NF4},
    family="qwen3_moe_even",
    adapter="experts",
)
ALL_TO_ALL = case("all_to_all", 2, SP | {"peft": {"a2a_experimental": True}}, {"tp": TP})
FOUR = case("four", 4, TP | PP, {"tp_dp": TP, "dp": {}})
LONG = [pytest.param(case, marks=pytest.mark.long) for case in (SHARED_EXPERTS, EXPERTS_IN_NF4, ALL_TO_ALL, FOUR)]
REFUSED = [FROM_ONE_RANK]


@pytest.mark.parametrize("case", [*SAME, *LONG], ids=str)
def test_the_same_layout_goes_on_bit_for_bit(case: Case, ranks_found: list[dict[str, Any]]) -> None:
    for found in ranks_found:
        assert_same_run(found["uninterrupted"], found["continued"]["same"])
        assert_stored_alike(found)


@pytest.mark.parametrize("case", [*(c for c in SAME if len(c.options["layouts"]) > 1), *LONG], ids=str)
def test_other_layouts_go_on_alike(case: Case, ranks_found: list[dict[str, Any]]) -> None:
    for found in ranks_found:
        for name in case.options["layouts"]:
            assert_goes_on_alike(found["uninterrupted"], found["continued"][name])


TO_MORE_RANKS = Case(
    "checkpoint_from_one_rank",
    2,
    "checkpoint",
    options={"from_case": FROM_ONE_RANK.name, "layouts": {"tp": TP, "sp": SP, "pp": PP, "dp": {}, "cp": CP}},
    needs=FROM_ONE_RANK,
)


@pytest.mark.parametrize("case", [TO_MORE_RANKS], ids=str)
def test_a_checkpoint_of_one_rank_goes_on_at_two(case: Case, found: dict[str, Any], workers: Any) -> None:
    assert case.needs is not None
    wanted = workers.found(case.needs)[0]["uninterrupted"]
    for again in found["continued"].values():
        assert_goes_on_alike(wanted, again)


@pytest.mark.parametrize("case", [case for case in SAME if case.options.get("asynchronous")], ids=str)
def test_writing_in_the_background_ends(case: Case, found: dict[str, Any]) -> None:
    assert found["all_written"] is True


@pytest.mark.parametrize("case", REFUSED, ids=str)
def test_a_checkpoint_of_other_adapters_is_refused(case: Case, found: dict[str, Any]) -> None:
    assert (
        "holds other adapters (16 linears of linear_fc1, linear_fc2, linear_proj, linear_qkv, rank 4, alpha 8)"
        in found["refused"]
    )
