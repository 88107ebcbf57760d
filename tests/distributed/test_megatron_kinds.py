"""Adapters that change more than factors, against peft's own: PiSSA, whose base keeps the residual, and modules that
train whole."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.cases import PP, SP, TP, Case
from tests.support.compare import assert_same_training, assert_same_update
from tests.support.peft_scores import assert_peft_scores_alike
from tests.support.reference import Training

pytestmark = pytest.mark.timeout(1800)

TOLERANCE = 1e-4
PISSA = {"peft": {"type": "canonical_lora", "init_lora_weights": "pissa"}}
SAVED = {"peft": {"modules_to_save": ["embed_tokens", "input_layernorm", "norm", "lm_head"]}}
FRESH = {"pissa": {"init_lora_weights": "pissa"}}


def trained(kind: str, name: str, ranks: int, megatron: dict, adapter: str = "drawn", **fields: Any) -> Case:
    options = {"fresh": FRESH.get(kind)}
    return Case(f"{kind}_{name}", ranks, "kind", adapter=adapter, megatron=megatron, options=options, **fields)


def layouts(kind: str, keys: dict, **fields: Any) -> list[Any]:
    """TP=2 in the daily suite, the rest in the long one."""
    found = [("tp", 2, TP), ("tp1", 1, {}), ("sp", 2, SP), ("pp", 2, PP)]
    cases = [trained(kind, name, ranks, layout | keys, **fields) for name, ranks, layout in found]
    return [cases[0], *(pytest.param(case, marks=pytest.mark.long) for case in cases[1:])]


@pytest.mark.parametrize("case", layouts("pissa", PISSA), ids=str)
def test_ten_steps_equal_pefts_own(
    case: Case, ranks_found: list[dict[str, Any]], reference: Callable[..., Training]
) -> None:
    wanted = reference(case)
    for found in ranks_found:
        assert_same_update(found, wanted, TOLERANCE)
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
        assert_same_training(found, wanted, TOLERANCE)
        assert {"model.embed_tokens", "model.norm", "lm_head"} < set(found["config"]["modules_to_save"])
        assert all(in_modules == exported for in_modules, exported in found["fingerprints"])
    start = room.adapter(case.family, case.adapter)
    assert_peft_scores_alike(ranks_found[0]["trained"], room.base(case.family), tmp_path / "out", start)
