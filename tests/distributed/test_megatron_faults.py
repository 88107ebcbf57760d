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
]
SAVED = ("none, saved", "shard dropped at save", "shard doubled at save")


@pytest.mark.parametrize(("case", "fault"), TRAINED, ids=str)
def test_training_is_told_from_peft(
    case: Case, fault: str, ranks_found: list[dict[str, Any]], reference: Callable[..., Training]
) -> None:
    assert_training_tells(fault, ranks_found, reference(case))


@pytest.mark.parametrize("case", [CASE], ids=str)
@pytest.mark.parametrize("fault", SAVED)
def test_a_checkpoint_is_told_from_the_run(fault: str, case: Case, ranks_found: list[dict[str, Any]]) -> None:
    assert_checkpoint_tells(fault, ranks_found)


@pytest.mark.parametrize("case", [CASE], ids=str)
def test_every_fault_is_looked_at(case: Case, found: dict[str, Any]) -> None:
    assert set(found) == {*(fault for of, fault in TRAINED if of is CASE), *SAVED}
    # Factors that are not synchronized drift apart only slowly: their copies differ from rank to rank.
    assert largest_difference(found["A not synchronized"]["adapter"], found["none"]["adapter"]) > 3 * TOLERANCE
    assert largest_difference(found["B not synchronized"]["adapter"], found["none"]["adapter"]) > 3 * TOLERANCE
