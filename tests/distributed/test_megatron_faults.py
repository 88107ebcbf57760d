"""Planted faults: the comparisons of these tests, made once more with the code broken by hand, must tell each fault."""

from collections.abc import Callable
from typing import Any

import pytest

from tests.distributed.cases import Case
from tests.distributed.fault_checks import TOLERANCE, assert_checkpoint_tells, assert_training_tells
from tests.support.compare import largest_difference
from tests.support.reference import Training

pytestmark = pytest.mark.timeout(1800)

CASE = Case("faults", 2, "faults")
DORA = Case("faults_dora", 2, "faults", adapter="dora")
EXPERTS = Case("faults_experts", 2, "faults", family="qwen3_moe", adapter="experts")
SHARED_EXPERTS = Case("faults_shared_experts", 2, "faults", family="qwen3_moe", adapter="shared_experts")
TRAINED = [
    (CASE, "none"),
    (CASE, "none, data parallel"),
    (CASE, "row-parallel reduction skipped"),
    (CASE, "row-parallel reduction averaged"),
    (CASE, "A not synchronized"),
    (CASE, "B not synchronized"),
    (CASE, "local token count"),
    (CASE, "adapter scale doubled"),
    (DORA, "none, dora"),
    (DORA, "stale cached norm"),
    (EXPERTS, "none, experts"),
    (EXPERTS, "factors not summed over ETP"),
    (EXPERTS, "expert gradients of the wrong DP size"),
    (EXPERTS, "local token count, experts"),
    (EXPERTS, "expert scale doubled"),
    (SHARED_EXPERTS, "none, shared experts"),
    (SHARED_EXPERTS, "shared factors not summed over EP"),
]
SAVED = [
    (CASE, "none, saved"),
    (CASE, "shard dropped at save"),
    (CASE, "shard doubled at save"),
    (EXPERTS, "none, experts saved"),
    (EXPERTS, "experts swapped at save"),
]


@pytest.mark.parametrize(("case", "fault"), TRAINED, ids=str)
def test_training_is_told_from_peft(
    case: Case, fault: str, ranks_found: list[dict[str, Any]], reference: Callable[..., Training]
) -> None:
    assert_training_tells(fault, ranks_found, reference(case))


@pytest.mark.parametrize(("case", "fault"), SAVED, ids=str)
def test_a_checkpoint_is_told_from_the_run(case: Case, fault: str, ranks_found: list[dict[str, Any]]) -> None:
    assert_checkpoint_tells(fault, ranks_found)


@pytest.mark.parametrize("case", [CASE, DORA, EXPERTS, SHARED_EXPERTS], ids=str)
def test_every_fault_is_looked_at(case: Case, found: dict[str, Any]) -> None:
    assert set(found) == {fault for of, fault in TRAINED + SAVED if of is case}


@pytest.mark.parametrize("case", [CASE], ids=str)
def test_copies_that_are_not_synchronized_drift_apart(case: Case, found: dict[str, Any]) -> None:
    # Factors that are not synchronized drift apart only slowly: their copies differ from rank to rank.
    assert largest_difference(found["A not synchronized"]["adapter"], found["none"]["adapter"]) > 3 * TOLERANCE
    assert largest_difference(found["B not synchronized"]["adapter"], found["none"]["adapter"]) > 3 * TOLERANCE
