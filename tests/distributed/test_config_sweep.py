"""Every field of every family's config on Megatron-Core: transformers' loss, or refused by name."""

from typing import Any

import pytest

from tests.distributed.cases import Case
from tests.support.config_sweep import all_flips, assert_honoured, sampled_flips

pytestmark = pytest.mark.timeout(1800)


def sweep_case(name: str, names: list[str]) -> Case:
    return Case(name, 1, "config_sweep", adapter=None, options={"names": names})


@pytest.mark.parametrize(
    "case",
    [
        sweep_case("config_sweep", sampled_flips()),
        pytest.param(sweep_case("config_sweep_all", list(all_flips())), marks=pytest.mark.long),
    ],
    ids=str,
)
def test_a_field_is_honoured_or_refused(case: Case, found: dict[str, Any]) -> None:
    assert list(found) == case.options["names"]
    assert_honoured(found, megatron=True)
