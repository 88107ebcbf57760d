"""The DTensor backend on real ranks, world sizes 1, 2 and 4, against plain transformers + peft. (Against the Megatron
backend: test_backends.py.)"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tests.distributed.cases import SP2, TP2, Case, scored_rows
from tests.support.cached_norms import assert_never_stale
from tests.support.compare import (
    assert_goes_on_alike,
    assert_same_run,
    assert_same_training,
    assert_same_update,
    assert_stored_alike,
    relative_differences,
)
from tests.support.config_sweep import all_flips, assert_honoured, sampled_flips
from tests.support.grouped import assert_same_numbers
from tests.support.models import RARE
from tests.support.peft_scores import assert_peft_scores_alike
from tests.support.reference import Training, cut_logits, of_targets, token_logps

# The first test of a world size waits for all of its cases.
pytestmark = pytest.mark.timeout(2700)

TOLERANCE = 1e-4
DORA: dict[str, Any] = {"lora_cfg": {"type": "dora"}}
NF4: dict[str, Any] = {"quantization": "nf4", "lora_dtype": "float32"}
DOUBLE = {"lora_cfg": NF4 | {"double_quantization": True}}
NF4_DORA = {"lora_cfg": NF4 | DORA["lora_cfg"]}
STORED = {"lora_cfg": {"lora_dtype": "float32"}}
RECOMPUTE = {"activation_checkpointing": True}
COMPILED = {"compile": True}
PEFT_FORWARD = {"lora_cfg": {"use_triton": False}}
DORA_BY_PEFT = {"lora_cfg": DORA["lora_cfg"] | PEFT_FORWARD["lora_cfg"]}
SAVED: dict[str, Any] = {"lora_cfg": {"modules_to_save": ["embed_tokens", "input_layernorm", "norm", "lm_head"]}}
PISSA: dict[str, Any] = {"lora_cfg": {"init_lora_weights": "pissa", "type": "canonical_lora"}}
PISSA_SAVED = {"lora_cfg": PISSA["lora_cfg"] | SAVED["lora_cfg"]}
DROPS: dict[str, Any] = {"lora_cfg": {"dropout": 0.3}}
PACKED = {"sequence_packing": {"enabled": True, "train_mb_tokens": 64}}
LONGER = {"sequence_packing": {"enabled": True, "train_mb_tokens": 96}}
BFLOAT16 = {"precision": "bfloat16"}
# `policy.optimizer` and `policy.scheduler` in NeMo RL's shape.
NAMED_OPTIMIZER = {
    "optimizer": {"name": "torch.optim.AdamW", "kwargs": {"lr": 1e-2, "weight_decay": 0.1, "betas": [0.9, 0.98]}},
    "scheduler": [
        {"name": "torch.optim.lr_scheduler.LinearLR", "kwargs": {"start_factor": 0.1, "total_iters": 4}},
        {"name": "torch.optim.lr_scheduler.ConstantLR", "kwargs": {"factor": 1.0, "total_iters": 100}},
        {"milestones": [4]},
    ],
}


def case(name: str, ranks: int, dtensor: dict | None = None, check: str = "train", **fields: Any) -> Case:
    return Case(f"dtensor_{name}", ranks, check, dtensor=dtensor or {}, **fields)


def full(name: str, ranks: int, family: str, dtensor: dict | None = None, check: str = "train", **fields: Any) -> Case:
    return case(f"{name}_full", ranks, dtensor, check, family=family, adapter=None, **fields)


def long(*cases: Case) -> list[Any]:
    """Four ranks, compiling and peft's own DoRA take a minute each."""
    return [pytest.param(case, marks=pytest.mark.long) for case in cases]


TRAINED = [
    case("one", 1, family="llama3"),
    case("one_peft_forward", 1, PEFT_FORWARD, family="llama3"),
    case("one_packed", 1, policy=PACKED),
    case("one_recompute", 1, RECOMPUTE),
    case("one_offload", 1, {"cpu_offload": True}),
    case("one_gemma", 1, family="gemma3", policy=PACKED),
    # peft takes names of an MLP for parameters of the experts.
    case("one_experts", 1, family="qwen3_moe", adapter="attention", policy=PACKED),
    # Rows of one micro-batch must not see each other's state.
    case("one_nemotron_h", 1, family="nemotron_h", adapter="mamba", policy=PACKED),
    case("one_head", 1, family="llama3", adapter="head"),
    full("one", 1, "qwen2"),
    case("one_dora", 1, DORA, family="llama3", adapter="dora"),
    case("one_nf4", 1, {"lora_cfg": NF4}, family="qwen3_even"),
    case("one_nf4_peft_forward", 1, {"lora_cfg": NF4 | PEFT_FORWARD["lora_cfg"]}, family="qwen3_even"),
    case("one_nf4_dora_recompute", 1, NF4_DORA | RECOMPUTE, family="qwen3_even", adapter="dora"),
    case("tp_saved", 2, TP2 | SAVED, family="llama3", adapter="saved"),
    case("dp_dora", 2, DORA, family="llama3", adapter="dora"),
    case("tp_dora", 2, TP2 | DORA, family="llama3", adapter="dora"),
    case("sp_dora", 2, SP2 | DORA, family="qwen2", adapter="dora"),
    case("dp_nf4", 2, {"lora_cfg": NF4}, family="qwen3_even"),
    case("tp_nf4", 2, TP2 | DOUBLE, family="qwen3_even"),
    case("tp_stored_nf4", 2, TP2 | STORED, family="qwen3_even_nf4"),
    case("dp", 2, family="llama3"),
    full("dp", 2, "qwen3"),
    case("tp", 2, TP2),
    case("tp_head", 2, TP2, family="llama3", adapter="head"),
    case("tp_tied", 2, TP2, family="qwen2"),
    full("tp", 2, "qwen3", TP2),
    full("tp_tied", 2, "qwen2", TP2),
    case("sp", 2, SP2),
    case("sp_gemma", 2, SP2, family="gemma3", policy=PACKED),
    case("sp_head", 2, SP2, family="llama3", adapter="head"),
    full("sp", 2, "qwen3", SP2),
    full("sp_tied", 2, "qwen2", SP2),
    full("sp_biases", 2, "llama_biases", SP2),
    *long(
        *(case(f"one_{family}", 1, family=family, adapter="attention") for family in RARE),
        case("one_dora_recompute", 1, DORA | RECOMPUTE, family="qwen2", adapter="dora"),
        case("one_qwen3_5", 1, family="qwen3_5", adapter="delta", policy=PACKED),
        case("one_qwen3_next_recompute", 1, RECOMPUTE, family="qwen3_next", adapter="delta_attention"),
        full("one_qwen3_5", 1, "qwen3_5", policy=PACKED),
        case("dp_nemotron_h_recompute", 2, RECOMPUTE, family="nemotron_h", adapter="mamba"),
        case("one_saved", 1, SAVED, family="llama3", adapter="saved"),
        case("one_dora_peft_forward", 1, DORA_BY_PEFT, family="llama3", adapter="dora"),
        case("one_dora_compiled", 1, DORA | COMPILED, family="llama3", adapter="dora"),
        case("one_dora_compiled_recompute", 1, DORA | COMPILED | RECOMPUTE, family="llama3", adapter="dora"),
        case("one_nf4_dora_compiled", 1, NF4_DORA | COMPILED, family="qwen3_even", adapter="dora"),
        case("one_stored_nf4", 1, STORED, family="qwen3_even_nf4"),
        case("sp_saved", 2, SP2 | SAVED, family="llama3", adapter="saved"),
        case("sp_nf4_dora", 2, SP2 | NF4_DORA, family="qwen3_even", adapter="dora"),
        case("tp_tower", 2, TP2, family="gemma3_tower", policy=PACKED),
        case("tp_recompute", 2, TP2 | RECOMPUTE),
        case("sp_tied", 2, SP2, family="qwen2"),
        case("tp_biases", 2, TP2, family="llama_biases"),
        case("tp_dp", 4, TP2),
        case("sp_dp_packed", 4, SP2, family="llama3", policy=PACKED),
        full("tp_dp", 4, "qwen3", TP2),
        case("dp4", 4, family="qwen2"),
    ),
]


@pytest.mark.parametrize("case", TRAINED, ids=str)
def test_training_equals_transformers_and_peft(
    case: Case, ranks_found: list[dict[str, Any]], reference: Callable[..., Training]
) -> None:
    wanted = reference(case)
    for found in ranks_found:
        # AdamW divides by the gradients' size, which carries rounding of near-zero gradients into full steps.
        assert_same_training(found, wanted, TOLERANCE, of_what_trained=10 * TOLERANCE)
        assert all(in_modules == exported for in_modules, exported in found.get("fingerprints", []))


def saved_case(name: str, ranks: int, dtensor: dict, others: dict[str, dict] | None = None, **fields: Any) -> Case:
    layouts = {"same": dtensor} | (others or {})
    return case(f"resume_{name}", ranks, dtensor, "checkpoint", options={"layouts": layouts}, **fields)


RESUMED_TP = saved_case("tp", 2, TP2, {"dp": {}})
RESUMED = [
    saved_case("one", 1, DROPS, adapter="drawn"),
    saved_case("full", 1, {}, family="qwen2", adapter=None),
    RESUMED_TP,
    saved_case("dp_full", 2, {}, {"tp": TP2}, family="qwen2", adapter=None),
    saved_case("tp_nf4_dora", 2, TP2 | NF4_DORA, {"dp": NF4_DORA}, family="qwen3_even", adapter="dora"),
    *long(
        saved_case("tp_pissa_saved", 2, TP2 | PISSA_SAVED, {"dp": PISSA_SAVED}, family="llama3", adapter="drawn"),
        saved_case("tp_dp_full", 4, TP2, adapter=None),
    ),
]


@pytest.mark.parametrize("case", RESUMED, ids=str)
def test_resume_is_bit_identical(case: Case, ranks_found: list[dict[str, Any]]) -> None:
    for found in ranks_found:
        assert_same_run(found["uninterrupted"], found["continued"]["same"])
        assert_stored_alike(found)


@pytest.mark.parametrize("case", [c for c in RESUMED if isinstance(c, Case) and len(c.options["layouts"]) > 1], ids=str)
def test_checkpoint_goes_on_in_another_layout(case: Case, ranks_found: list[dict[str, Any]]) -> None:
    for found in ranks_found:
        for name in case.options["layouts"]:
            assert_goes_on_alike(found["uninterrupted"], found["continued"][name])


SWEEPS = [
    case("config_sweep", 1, check="config_sweep", adapter=None, options={"names": names})
    if len(names) < len(all_flips())
    else pytest.param(
        case("config_sweep_all", 1, check="config_sweep", adapter=None, options={"names": names}),
        marks=pytest.mark.long,
    )
    for names in (sampled_flips(), list(all_flips()))
]


@pytest.mark.parametrize("case", SWEEPS, ids=str)
def test_a_field_of_the_config_is_honoured_or_refused(case: Case, found: dict[str, Any]) -> None:
    assert_honoured(found, megatron=False)


SHARED = [
    case("shared_one", 1, RECOMPUTE, "shared_prefix", family="gemma3", policy=LONGER),
    case("shared_sp", 2, SP2, "shared_prefix", policy=LONGER),
    case("shared_head", 2, TP2, "shared_prefix", family="llama3", adapter="head", policy=LONGER),
    case("shared_dp", 2, {}, "shared_prefix", family="llama3", policy=LONGER),
]


@pytest.mark.parametrize("case", SHARED, ids=str)
def test_shared_prefixes_change_no_number(case: Case, ranks_found: list[dict[str, Any]]) -> None:
    for found in ranks_found:
        assert_same_numbers(found["shared"], found["whole"])


SCORED = [
    case("scores_one", 1, {}, "scores", family="llama3"),
    case("scores_unlike", 1, {}, "scores", family="llama3", adapter="unlike"),
    case("scores_tp", 2, TP2, "scores", family="llama3"),
    case("scores_unlike_tp", 2, SP2, "scores", family="llama3", adapter="unlike"),
]


@pytest.mark.parametrize("case", SCORED, ids=str)
def test_scores(case: Case, ranks_found: list[dict[str, Any]], room: Any) -> None:
    base = AutoModelForCausalLM.from_pretrained(room.base(case.family), attn_implementation="eager")
    rows = scored_rows()
    with torch.no_grad():
        without = [token_logps(base, row) for row in rows]
        model = PeftModel.from_pretrained(base, room.adapter(case.family, str(case.adapter)))
        adapted = [token_logps(model, row) for row in rows]
        logits = [model(row.input_ids[None]).logits[0, :-1] / 0.5 for row in rows]
        answer = rows[0].input_ids[:5].tolist()
        for _ in range(9):
            answer.append(int(model(torch.tensor([answer])).logits[0, -1].argmax()))
        merged = model.merge_and_unload().state_dict()
    targets = [row.input_ids[1:] for row in rows]
    sharp = [of_targets(values, wanted) for values, wanted in zip(logits, targets, strict=True)]
    cut = [of_targets(cut_logits(v, wanted, 30, 0.6), wanted) for v, wanted in zip(logits, targets, strict=True)]
    assert min(float((c - s).min()) for c, s in zip(cut, sharp, strict=True)) > 0.1
    count = sum(row.num_targets for row in rows)
    loss = -sum(float((logps * row.target_mask[1:]).sum()) for logps, row in zip(adapted, rows, strict=True)) / count
    for got in ranks_found:
        for key, wanted in (
            ("base", without),
            ("adapted", adapted),
            ("sharp", sharp),
            ("cut", cut),
            ("again", adapted),
        ):
            for piece, reference in zip(got[key], wanted, strict=True):
                assert piece[0] == 0.0
                torch.testing.assert_close(piece[1:], reference, rtol=1e-4, atol=1e-5)
        assert got["loss"] == pytest.approx(loss, rel=1e-5)
        assert got["answer"] == answer[5:] and got["ended"] == answer[5 : 6 + answer[5:].index(answer[8])]
        assert got["poisoned"] == "the log-probability of a token is nan for data rows [5, 6, 7, 8, 9]"
        assert set(got["merged"]) == set(merged)
        for key, value in merged.items():
            torch.testing.assert_close(got["merged"][key], value, rtol=1e-4, atol=1e-6)


def residual(name: str, ranks: int, dtensor: dict) -> Case:
    options = {"fresh": {"init_lora_weights": "pissa"}}
    return case(name, ranks, dtensor | PISSA, "kind", family="llama3", adapter="drawn", options=options)


@pytest.mark.parametrize("case", [residual("pissa_tp", 2, TP2), *long(residual("pissa_one", 1, {}))], ids=str)
def test_an_adapter_of_the_residual_is_pefts_own(
    case: Case, ranks_found: list[dict[str, Any]], reference: Callable[..., Training], room: Any, tmp_path: Path
) -> None:
    wanted = reference(case)
    for found in ranks_found:
        assert_same_update(found, wanted, TOLERANCE)
        assert all(in_modules == exported for in_modules, exported in found["fingerprints"])
    for which in ("trained", "other_start"):
        assert_peft_scores_alike(ranks_found[0][which], room.base(case.family), tmp_path / which, None)
    assert ranks_found[0]["other_start"]["far"] > 1e-3


NORMS = [
    case("norms_tp", 2, TP2 | DORA, "cached_norms", family="llama3", adapter="dora"),
    *long(case("norms_one", 1, DORA | COMPILED | RECOMPUTE, "cached_norms", family="llama3", adapter="dora")),
]


@pytest.mark.parametrize("case", NORMS, ids=str)
def test_norms_are_kept_until_the_factors_change(case: Case, ranks_found: list[dict[Any, Any]]) -> None:
    for found in ranks_found:
        assert_never_stale(kept=found[True], anew=found[False])


def dropout_case(name: str, ranks: int, dtensor: dict, position: str, **keys: Any) -> Case:
    lora = {"lora_cfg": DROPS["lora_cfg"] | {"dropout_position": position} | keys}
    return case(f"dropout_{name}", ranks, dtensor | lora, "dropout", adapter="drawn")


DROPPED_OVER_TP = [dropout_case("tp_pre", 2, TP2, "pre"), dropout_case("tp_post", 2, SP2, "post")]
DROPPED = [
    dropout_case("pre", 1, {}, "pre"),
    dropout_case("post", 1, {}, "post"),
    dropout_case("peft_forward", 1, {}, "post", use_triton=False),
    *DROPPED_OVER_TP,
]


@pytest.mark.parametrize("case", DROPPED, ids=str)
def test_dropout(case: Case, ranks_found: list[dict[str, Any]]) -> None:
    for found in ranks_found:
        # Recomputation draws the masks again.
        assert max(relative_differences(found["recomputed"]["losses"], found["kept"]["losses"])) < 1e-5
        assert max(relative_differences(found["recomputed"]["grad_norms"], found["kept"]["grad_norms"])) < 1e-5
        evaluated, trained = found["evaluated"], found["trained"]
        assert evaluated[0] == evaluated[1]
        assert abs(trained[0] - evaluated[0]) > 1e-4 * evaluated[0]


@pytest.mark.parametrize("case", DROPPED_OVER_TP, ids=str)
def test_ranks_agree_on_the_gradient_under_dropout(case: Case, ranks_found: list[dict[str, Any]]) -> None:
    first, second = (found["kept"]["adapter"] for found in ranks_found)
    assert all(torch.equal(second[name], value) for name, value in first.items())


@pytest.mark.parametrize("case", [case("compiled", 1, COMPILED, options={"steps": 3})], ids=str)
def test_compiled_layers_give_the_same_numbers(
    case: Case, found: dict[str, Any], reference: Callable[..., Training]
) -> None:
    wanted = reference(case)
    assert max(relative_differences(found["losses"], wanted.losses[:3])) < TOLERANCE
    assert max(relative_differences(found["grad_norms"], wanted.grad_norms[:3])) < TOLERANCE


@pytest.mark.parametrize(
    "case",
    [
        case("bfloat16", 1, policy=BFLOAT16),
        full("bfloat16", 1, "qwen3", policy=BFLOAT16),
        case("bfloat16_tp", 2, TP2, policy=BFLOAT16),
    ],
    ids=str,
)
def test_bfloat16_trains_fp32_weights(
    case: Case, ranks_found: list[dict[str, Any]], reference: Callable[..., Training]
) -> None:
    wanted = reference(case)
    for found in ranks_found:
        assert found["dtypes"] == ["torch.float32"]
        assert max(relative_differences(found["losses"], wanted.losses)) < 3e-2
        assert max(relative_differences(found["grad_norms"], wanted.grad_norms)) < 1e-1


@pytest.mark.parametrize(
    "case", [case("named_optimizer", 1, family="llama3", policy=NAMED_OPTIMIZER, options={"steps": 6})], ids=str
)
def test_torch_optimizer_and_schedulers(case: Case, found: dict[str, Any], reference: Callable[..., Training]) -> None:
    assert found["learning_rates"] == pytest.approx([1e-3, 3.25e-3, 5.5e-3, 7.75e-3, 1e-2, 1e-2])
    first = reference(case, lr=1e-3, num_steps=2)
    assert max(relative_differences(found["losses"][:2], first.losses)) < TOLERANCE
