"""Adapters that change more than factors, against peft's own: PiSSA, whose base keeps the residual, and modules that
train whole."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from megatron_lora.conversion.export import write_peft_folder
from tests.distributed.megatron_case import PP, SP, TP, Case, scored_rows, training_rows
from tests.support.compare import assert_same_training, largest_difference, relative_differences
from tests.support.reference import Training, changes_of, token_logps, train

pytestmark = pytest.mark.timeout(1800)

TOLERANCE = 1e-4
PISSA = {"peft": {"type": "canonical_lora", "init_lora_weights": "pissa"}}
SAVED = {"peft": {"modules_to_save": ["embed_tokens", "input_layernorm", "norm", "lm_head"]}}
FRESH = {"pissa": {"init_lora_weights": "pissa"}}


def trained(kind: str, name: str, ranks: int, megatron: dict, adapter: str = "drawn", **fields: Any) -> Case:
    options = {"kind": kind}
    return Case(f"{kind}_{name}", ranks, "kind", adapter=adapter, megatron=megatron, options=options, **fields)


def layouts(kind: str, keys: dict, **fields: Any) -> list[Any]:
    """TP=2 in the daily suite, the rest in the long one."""
    found = [("tp", 2, TP), ("tp1", 1, {}), ("sp", 2, SP), ("pp", 2, PP)]
    cases = [trained(kind, name, ranks, layout | keys, **fields) for name, ranks, layout in found]
    return [cases[0], *(pytest.param(case, marks=pytest.mark.long) for case in cases[1:])]


@pytest.fixture(scope="session")
def fresh_reference(room: Any) -> Callable[[Case], Training]:
    """Ten steps of an adapter that peft starts itself."""
    known: dict[tuple[str, str], Training] = {}

    def trained(case: Case) -> Training:
        key = (case.family, case.options["kind"])
        if key not in known:
            torch.set_num_threads(1)
            options = {
                "lr": case.learning_rate,
                "eps": case.adam_eps,
                "share_a": False,
                "fresh": FRESH[case.options["kind"]],
            }
            known[key] = train(room.base(case.family), None, training_rows(), **options)
        return known[key]

    return trained


@pytest.mark.parametrize("case", layouts("pissa", PISSA), ids=str)
def test_ten_steps_equal_pefts_own(
    case: Case, ranks_found: list[dict[str, Any]], fresh_reference: Callable[[Case], Training]
) -> None:
    wanted = fresh_reference(case)
    for found in ranks_found:
        assert max(relative_differences(found["losses"], wanted.losses)) < TOLERANCE
        assert max(relative_differences(found["grad_norms"], wanted.grad_norms)) < TOLERANCE
        assert largest_difference(changes_of(found["config"], found["adapter"]), wanted.adapter) < 10 * TOLERANCE
        assert all(in_modules == exported for in_modules, exported in found["fingerprints"])


@pytest.mark.parametrize("case", layouts("pissa", PISSA), ids=str)
def test_a_stock_peft_loads_what_is_exported(case: Case, found: dict[str, Any], room: Any, tmp_path: Path) -> None:
    """Also where the checkpoint's start is not the one that this machine computes."""
    for which in ("trained", "other_start"):
        assert_peft_scores_alike(found[which], room.base(case.family), tmp_path / which, None)
    assert found["other_start"]["far"] > 1e-3


@pytest.mark.parametrize("case", layouts("saved", SAVED, adapter="saved"), ids=str)
def test_whole_modules_train_as_pefts_do(
    case: Case, ranks_found: list[dict[str, Any]], reference: Callable[..., Training], room: Any, tmp_path: Path
) -> None:
    wanted = reference(case)
    for found in ranks_found:
        assert_same_training(found, wanted, "adapter", TOLERANCE)
        assert {"model.embed_tokens", "model.norm", "lm_head"} < set(found["config"]["modules_to_save"])
        assert all(in_modules == exported for in_modules, exported in found["fingerprints"])
    start = room.adapter(case.family, case.adapter)
    assert_peft_scores_alike(ranks_found[0]["trained"], room.base(case.family), tmp_path / "out", start)


def assert_peft_scores_alike(found: dict[str, Any], base: Path, folder: Path, start: Path | None) -> None:
    """start: the adapter of the reference policy; None: the base alone is."""
    model: Any = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
    with torch.no_grad():
        plain = [token_logps(model, row) for row in scored_rows()]
    beginning = PeftModel.from_pretrained(model, start) if start is not None else model
    with torch.no_grad():
        begun = [token_logps(beginning, row) for row in scored_rows()]
    model = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
    model = PeftModel.from_pretrained(model, folder_of(found["exported"], folder))
    merged = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
    merged.load_state_dict(found["merged"], strict=False)
    with torch.no_grad():
        columns = (scored_rows(), found["scores"], plain, found["base"], begun, found["reference"])
        for row, scores, unadapted, without, wanted, reference in zip(*columns, strict=True):
            assert (token_logps(model, row) - scores[1:]).abs().max() < TOLERANCE
            assert (token_logps(merged, row) - scores[1:]).abs().max() < TOLERANCE
            assert (unadapted - without[1:]).abs().max() < TOLERANCE
            assert (wanted - reference[1:]).abs().max() < TOLERANCE


def folder_of(exported: tuple[dict[str, Any], dict[str, Any]], folder: Path) -> Path:
    write_peft_folder(folder, *exported)
    return folder
