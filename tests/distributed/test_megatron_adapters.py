"""Adapters in a Megatron model: starting values, dtype, communication, frozen weights, dropout, what stops a run."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from megatron_lora.lora.init import init_factor
from tests.distributed.cases import CP, FULL_RECOMPUTE, PP, SEED, SP, TP, VPP, Case, scored_rows
from tests.distributed.megatron_failure_checks import POISONED_ROW
from tests.support.cached_norms import assert_never_stale
from tests.support.compare import largest_difference, relative_differences
from tests.support.reference import Training, token_logps

pytestmark = pytest.mark.timeout(2700)

ALL_TO_ALL = SP | {"peft": {"a2a_experimental": True}}
METHODS = [("xavier", "zero"), ("uniform", "normal"), ("normal", "uniform"), ("zero", "xavier")]
TARGETS = {"target_modules": ["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2", "output_layer"]}


def start_case(name: str, ranks: int, megatron: dict) -> Case:
    megatron = megatron | {"peft": TARGETS | megatron.get("peft", {})}
    return Case(f"start_{name}", ranks, "start", adapter="drawn", megatron=megatron, options={"methods": METHODS})


STARTS = [
    start_case("tp1", 1, {}),
    start_case("tp", 2, TP),
    start_case("all_to_all", 2, ALL_TO_ALL),
    start_case("vpp", 2, VPP),
]


@pytest.mark.parametrize("case", STARTS, ids=str)
def test_starting_values_are_the_same_in_every_layout(case: Case, ranks_found: list[dict[str, Any]]) -> None:
    for found in ranks_found:
        for a_method, b_method in METHODS:
            factors = found[f"{a_method}, {b_method}"]
            assert len(factors) == 2 * (4 * 4 + 1)
            for name, value in factors.items():
                method = a_method if name.endswith("lora_A") else b_method
                assert torch.equal(value, init_factor(method, tuple(value.shape), SEED, name)), name


def dtype_case(adapter: str, base: str) -> Case:
    return Case(
        f"{adapter}_adapter_on_{base}",
        2,
        "train",
        megatron=TP | {"peft": {"lora_dtype": adapter}},
        policy={"precision": base},
        options={"steps": 3},
    )


@pytest.mark.parametrize("case", [dtype_case("bfloat16", "float32"), dtype_case("float32", "bfloat16")], ids=str)
def test_adapters_have_their_own_dtype(case: Case, found: dict[str, Any], reference: Callable[..., Training]) -> None:
    wanted = reference(case)
    assert found["dtypes"] == [f"torch.{case.megatron['peft']['lora_dtype']}"]
    assert max(relative_differences(found["losses"], wanted.losses[:3])) < 0.02
    assert max(relative_differences(found["grad_norms"], wanted.grad_norms[:3])) < 0.05


def communication_case(name: str, megatron: dict, adapter: str = "shared") -> Case:
    return Case(f"communication_{name}", 2, "communication", adapter=adapter, megatron=megatron)


COMMUNICATION = [
    communication_case("tp", TP),
    communication_case("sp", SP),
    communication_case("own_a", SP, "own"),
    communication_case("sp_full_recompute", SP | FULL_RECOMPUTE),
]


@pytest.mark.parametrize("case", COMMUNICATION, ids=str)
def test_adapters_add_no_collective_to_the_bases_own(case: Case, ranks_found: list[dict[str, Any]]) -> None:
    for found in ranks_found:
        assert sum(found["base"].values()) >= 16, "four in each layer"
        assert found["adapters"] == found["base"]


ALL_TO_ALL_COMMUNICATION = communication_case("all_to_all", ALL_TO_ALL)


@pytest.mark.parametrize("case", [ALL_TO_ALL_COMMUNICATION], ids=str)
def test_all_to_all_adds_two_small_reductions_and_one_exchange_a_linear(case: Case, found: dict[str, Any]) -> None:
    linears = 2 * 4
    added = Counter({"c10d.allreduce_": 2 * linears, "c10d.alltoall_base_": linears})
    assert found["adapters"] - found["base"] == added
    assert not found["base"] - found["adapters"]


@pytest.mark.parametrize("case", [*COMMUNICATION, ALL_TO_ALL_COMMUNICATION], ids=str)
def test_frozen_weights_get_no_gradient_and_no_product_for_one(case: Case, ranks_found: list[dict[str, Any]]) -> None:
    for found in ranks_found:
        assert found["num_frozen"] > 30
        assert found["frozen_with_gradient"] == []
        assert found["weight_shaped_products"] == []


ARITHMETIC = Case("arithmetic", 2, "arithmetic")


@pytest.mark.parametrize("case", [ARITHMETIC], ids=str)
def test_every_variant_over_two_ranks_equals_autograd(case: Case, ranks_found: list[dict[str, Any]]) -> None:
    for found in ranks_found:
        assert len(found["errors"]) == 4 * (12 + 12 + 6)
        assert {name: error for name, error in found["errors"].items() if not error < 1e-10} == {}


def dropout_case(position: str, name: str, megatron: dict) -> Case:
    peft = megatron.get("peft", {}) | {"dropout": 0.4, "dropout_position": position}
    return Case(f"dropout_{position}_{name}", 2, "dropout", megatron=megatron | {"peft": peft})


DROPOUT = {
    position: [
        dropout_case(position, "tp", TP),
        dropout_case(position, "sp", SP),
        dropout_case(position, "all_to_all", ALL_TO_ALL),
    ]
    for position in ("pre", "post")
}


@pytest.mark.parametrize("case", [*DROPOUT["pre"], *DROPOUT["post"]], ids=str)
def test_dropout_masks_are_shared_where_ranks_hold_the_same_values(
    case: Case, ranks_found: list[dict[str, Any]], room: Any
) -> None:
    first, second = (found["masks"] for found in ranks_found)
    before = case.megatron["peft"]["dropout_position"] == "pre"
    assert len(first) == 16 and list(first) == list(second)
    drawn = []
    for name in first:
        column = name.endswith(("linear_qkv", "linear_fc1"))
        # A column-parallel A sees the whole input and a row-parallel B makes the whole output, on every rank; with
        # all-to-all each rank makes its own columns.
        shared = column if before else not column and "all_to_all" not in case.name
        assert len(first[name]) == 3, "one for each micro-batch"
        for mine, other in zip(first[name], second[name], strict=True):
            assert torch.equal(mine, other) == shared, name
            assert mine.unique().tolist() == [0.0, pytest.approx(1 / 0.6)]
            drawn.append(mine.flatten())
    kept = torch.cat(drawn).bool().float().mean().item()
    assert kept == pytest.approx(0.6, abs=0.01)
    assert len({tuple(mask[:64].tolist()) for mask in drawn}) == len(drawn), "a mask was drawn twice"


OTHER_TOKENS = [dropout_case("pre", "dp", {}), dropout_case("post", "cp", CP)]


@pytest.mark.parametrize("case", OTHER_TOKENS, ids=str)
def test_ranks_that_see_other_tokens_drop_differently(case: Case, ranks_found: list[dict[str, Any]]) -> None:
    first, second = (found["masks"] for found in ranks_found)
    starts = [{tuple(mask.flatten()[:64].tolist()) for drawn in r.values() for mask in drawn} for r in (first, second)]
    assert len(starts[0]) == len(starts[1]) == sum(map(len, first.values())) > 16
    assert not starts[0] & starts[1]


@pytest.mark.parametrize("case", [*DROPOUT["pre"], *DROPOUT["post"]], ids=str)
def test_nothing_is_dropped_outside_training(case: Case, ranks_found: list[dict[str, Any]], room: Any) -> None:
    base = AutoModelForCausalLM.from_pretrained(room.base(case.family), attn_implementation="eager")
    model = PeftModel.from_pretrained(base, room.adapter(case.family, case.adapter))
    for found in ranks_found:
        assert found["drawn_outside_training"] == 0
        for row, scores in zip(scored_rows(), found["scores"], strict=True):
            with torch.no_grad():
                assert (scores[1:] - token_logps(model, row)).abs().max() < 1e-4


def dropped_training(position: str, name: str, ranks: int, megatron: dict, adapter: str = "shared") -> Case:
    megatron = megatron | {"peft": {"dropout": 0.4, "dropout_position": position}}
    return Case(f"dropped_{position}_{name}", ranks, "train", adapter=adapter, megatron=megatron, options={"steps": 3})


SELECTIVE = FULL_RECOMPUTE | {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "mlp"]}


@pytest.mark.parametrize("case", [dropped_training(p, "tp1", 1, {}, "head") for p in ("pre", "post")], ids=str)
def test_dropout_changes_training(case: Case, found: dict[str, Any], reference: Callable[..., Training]) -> None:
    assert min(relative_differences(found["losses"], reference(case).losses[:3])) > 1e-4


def with_and_without_recomputation(name: str, ranks: int, layout: dict, adapter: str) -> list[tuple[Case, Case]]:
    return [
        (
            dropped_training(position, name, ranks, layout, adapter),
            dropped_training(position, f"{name}_{how}", ranks, layout | recompute, adapter),
        )
        for position in ("pre", "post")
        for how, recompute in (("full", FULL_RECOMPUTE), ("selective", SELECTIVE))
    ]


RECOMPUTED = [
    *with_and_without_recomputation("tp1", 1, {}, "head"),
    *with_and_without_recomputation("sp", 2, SP, "shared"),
    *with_and_without_recomputation("pp", 2, PP, "shared"),
]


@pytest.mark.parametrize(("case", "recomputed"), RECOMPUTED, ids=str)
def test_recomputation_drops_the_same(case: Case, recomputed: Case, workers: Any) -> None:
    for found, again in zip(workers.found(case), workers.found(recomputed), strict=True):
        assert again["losses"] == pytest.approx(found["losses"], rel=1e-6)
        assert again["grad_norms"] == pytest.approx(found["grad_norms"], rel=1e-5)
        assert largest_difference(again["adapter"], found["adapter"]) < 1e-5


def stop_case(name: str, ranks: int, megatron: dict, rows: int = 1) -> Case:
    return Case(f"non_finite_{name}", ranks, "non_finite", megatron=megatron, policy={"train_micro_batch_size": rows})


@pytest.mark.parametrize(
    "case",
    [
        stop_case("tp1", 1, {}),
        stop_case("tp1_pairs", 1, {}, rows=2),
        stop_case("tp", 2, TP),
        stop_case("pp", 2, PP),
        stop_case("cp", 2, CP),
        stop_case("dp", 2, {}),
    ],
    ids=str,
)
def test_a_row_that_makes_the_loss_infinite_is_named_and_nothing_updated(
    case: Case, ranks_found: list[dict[str, Any]], reference: Callable[..., Training]
) -> None:
    wanted = reference(case)
    rows = [3, 4] if case.name.endswith("pairs") else [POISONED_ROW]
    for found in ranks_found:
        assert found["loss"]["rows"] == rows
        assert "the loss is nan" in found["loss"]["message"] or "the loss is inf" in found["loss"]["message"]
        assert "the gradient norm is nan" in found["gradient"]["message"]
        # Rows are scored one by one, also where they share a micro-batch.
        assert found["score"]["rows"] == [POISONED_ROW]
        assert "log-probability of a token is " in found["score"]["message"]
        assert found["unchanged"]
        # The next steps are as if the failed ones had not been.
        assert max(relative_differences(found["losses"], wanted.losses[:2])) < 1e-4
        assert max(relative_differences(found["grad_norms"], wanted.grad_norms[:2])) < 1e-4


def no_gradient_case(name: str, ranks: int, megatron: dict) -> Case:
    peft = {"lora_A_init_method": "zero", "lora_B_init_method": "zero"}
    return Case(f"no_gradient_{name}", ranks, "no_gradient", adapter="drawn", megatron=megatron | {"peft": peft})


@pytest.mark.parametrize("case", [no_gradient_case("tp1", 1, {}), no_gradient_case("pp", 2, PP)], ids=str)
def test_adapters_that_cannot_train_stop_the_first_step(case: Case, ranks_found: list[dict[str, Any]]) -> None:
    for found in ranks_found:
        assert "16 adapters had no gradient: decoder.layers.0.mlp.linear_fc1" in found["message"]
        assert "set lora_A_init_method" in found["message"]
        assert found["unchanged"]


DORA = {"peft": {"type": "dora"}}


def kept_case(name: str, ranks: int, megatron: dict, **fields: Any) -> Case:
    return Case(f"kept_{name}", ranks, "kept", megatron=megatron, **fields)


@pytest.mark.parametrize(
    "case",
    [
        kept_case("tp1", 1, {}),
        kept_case("llama_biases", 1, {"recompute_adapter_inputs": ["activation"]}, family="llama_biases"),
        kept_case("gemma3", 1, {}, family="gemma3"),
        kept_case("dora", 1, DORA, adapter="dora"),
        kept_case("sp", 2, SP, family="qwen2"),
    ],
    ids=str,
)
def test_inputs_that_are_computed_again_are_not_kept_and_change_no_bit(
    case: Case, ranks_found: list[dict[str, Any]]
) -> None:
    for found in ranks_found:
        assert found["built"] == case.megatron.get("recompute_adapter_inputs", ["layernorm"])
        norms, activations = found["layernorm_floats"], found["activation_floats"]
        assert norms > 0 and activations > 0
        saved = {"": 0, "layernorm": norms, "activation": activations, "layernorm activation": norms + activations}
        for recomputed, floats in saved.items():
            assert found[""]["floats"] - found[recomputed]["floats"] == floats, recomputed
            pairs = zip(found[""]["gradients"], found[recomputed]["gradients"], strict=True)
            assert all(torch.equal(before, after) and before.any() for before, after in pairs), recomputed


@pytest.mark.parametrize(
    "case",
    [Case("cached_norms", 2, "cached_norms", adapter="dora", megatron=TP | FULL_RECOMPUTE | DORA)],
    ids=str,
)
def test_norms_are_kept_until_the_factors_change(case: Case, ranks_found: list[dict[Any, Any]]) -> None:
    for found in ranks_found:
        assert_never_stale(kept=found[True], anew=found[False])


NF4 = {"peft": {"quantization": "nf4", "double_quantization": True, "lora_dtype": "float32"}}
LOADING = {
    (family, name): Case(
        f"loading_{name}_{family}", 1, "loading", family=family, adapter="attention", megatron=megatron
    )
    for name, megatron in (("dense", {}), ("nf4", NF4))
    for family in ("qwen3_even", "qwen3_moe_even")
}


@pytest.mark.parametrize(
    ("case", "beside"),
    [(LOADING[family, "nf4"], LOADING[family, "dense"]) for family in ("qwen3_even", "qwen3_moe_even")],
    ids=str,
)
def test_a_base_in_four_bits_is_never_there_in_full(case: Case, beside: Case, workers: Any) -> None:
    held, dense = workers.found(case)[0], workers.found(beside)[0]
    assert dense["stored"] == 0 and held["dense_linears"] == 0
    # Half a byte a value, and what belongs to blocks and (short ones here) rows.
    assert held["dense_size"] == dense["dense_linears"] > 5.5 * held["stored"]
    # All but the passing copies of one linear at a time.
    assert dense["peak"] - held["peak"] > 0.9 * held["dense_size"]


IN_FP8: dict[str, Any] = {"fp8_cfg": {"enabled": True}}
FP8_LOADING = Case("loading_fp8", 1, "loading", megatron=IN_FP8, policy={"precision": "bfloat16"})
FP8 = Case(
    "train_fp8",
    2,
    "train",
    megatron=SP | IN_FP8,
    policy={"precision": "bfloat16"},
    options={"steps": 3, "merged": True},
)


@pytest.mark.parametrize("case", [FP8_LOADING], ids=str)
def test_a_base_in_fp8_is_held_by_rows_and_by_columns(case: Case, found: dict[str, Any]) -> None:
    assert found["dense_linears"] == 0
    # A byte a value each way, and a scale a row and a column.
    assert 1.0 < found["stored"] / (found["dense_size"] / 4 * 2) < 1.1


@pytest.mark.parametrize("case", [FP8], ids=str)
def test_training_over_fp8_is_near_and_what_leaves_it_is_exact(
    case: Case, ranks_found: list[dict[str, Any]], reference: Callable[..., Training], room: Any
) -> None:
    wanted = reference(case)
    base = AutoModelForCausalLM.from_pretrained(room.base(case.family), dtype=torch.bfloat16)
    for found in ranks_found:
        assert max(relative_differences(found["losses"], wanted.losses[:3])) < 0.02
        assert max(relative_differences(found["grad_norms"], wanted.grad_norms[:3])) < 0.1
        scale = found["config"]["lora_alpha"] / found["config"]["r"]
        for name, weight in base.state_dict().items():
            place = f"base_model.model.{name.removesuffix('.weight')}"
            factors = [found["each"].get(f"{place}.lora_{factor}.weight") for factor in "BA"]
            if factors[0] is not None:
                weight = (weight.float() + scale * factors[0].float() @ factors[1].float()).bfloat16()
            torch.testing.assert_close(found["merged"][name], weight, rtol=2**-7, atol=0, msg=name)
