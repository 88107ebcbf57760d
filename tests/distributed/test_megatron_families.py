"""Families with experts, shared experts or latent attention: ten AdamW steps of adapters on their attention equal
transformers + peft (fp32), and what is merged for a rollout engine is the whole model."""

from collections.abc import Callable
from typing import Any

import pytest

from megatron_lora.conversion.inventory import open_model
from tests.distributed.cases import EP, PP, SP, Case
from tests.distributed.test_megatron_experts import assert_merged
from tests.support.compare import assert_same_training
from tests.support.models import EXPERTS, LATENT, RARE
from tests.support.reference import Training

pytestmark = pytest.mark.timeout(1800)

TOLERANCE = 1e-4
LAYOUTS = {"tp1": (1, {}), "sp": (2, SP), "pp": (2, PP), "ep": (2, EP)}
WITH_MLP = ("glm4_moe", "exaone4", "exaone_moe", "ernie4_5_moe", "hy_v3")
SHORT = [("tp1", "deepseek_v3"), ("tp1", "glm4_moe"), ("tp1", "gpt_oss")]


def case(layout: str, family: str) -> Case:
    ranks, megatron = LAYOUTS[layout]
    latent = LATENT.items() <= (EXPERTS | RARE)[family][1].items()
    # All linears but the routed experts': the shared experts' too.
    adapter = "latent" if latent else "shared" if family in WITH_MLP else "attention"
    merged = {"merged": True}
    return Case(f"family_{layout}_{family}", ranks, "train", family, adapter, megatron=megatron, options=merged)


CASES = [case(*short) for short in SHORT]
CASES += [
    pytest.param(case(layout, family), marks=pytest.mark.long)
    for layout in LAYOUTS
    for family in (*EXPERTS, *RARE)
    if (layout, family) not in (*SHORT, ("ep", "exaone4"))
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_ten_steps_equal_transformers_and_peft(
    case: Case, ranks_found: list[dict[str, Any]], reference: Callable[..., Training], room: Any
) -> None:
    wanted = reference(case)
    # Under the names of transformers' model; files may have others.
    _, weights = open_model(case.family, room.base(case.family))
    base = {name: weights.read(name) for name in weights.entries}
    for found in ranks_found:
        assert_same_training(found, wanted, TOLERANCE)
        assert all(in_modules == exported for in_modules, exported in found["fingerprints"])
        assert_merged(found["merged"], base, found["each"])
