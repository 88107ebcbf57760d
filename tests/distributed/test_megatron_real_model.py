"""SmolLM2-135M with word problems in its chat template (fp32): every layout trains it as transformers + peft do."""

from collections.abc import Callable
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.distributed.cases import FULL_RECOMPUTE, PP, Case
from tests.support.compare import assert_same_training, largest_difference
from tests.support.reference import Training

pytestmark = pytest.mark.timeout(1800)

TOLERANCE = 1e-4
# SmolLM2 has nine heads in three groups.
TP3: dict[str, Any] = {"tensor_model_parallel_size": 3}
SHORT = {"steps": 2, "rows": 2}
LONG = {"steps": 4, "rows": 4, "questions": 6}
PACKED = {"sequence_packing": {"enabled": True, "train_mb_tokens": 1024}}


def real_case(name: str, ranks: int, megatron: dict[str, Any], **fields: Any) -> Case:
    megatron = {"fused_linear_logprobs_chunk_size": 128} | megatron
    fields = {"options": SHORT} | fields
    return Case(f"smollm2_{name}", ranks, "train", family="smollm2", adapter="small", megatron=megatron, **fields)


LONG_TEXT = real_case("long_text", 3, TP3 | {"sequence_parallel": True} | FULL_RECOMPUTE, options=LONG, policy=PACKED)


@pytest.mark.parametrize(
    "case",
    [
        real_case("tp1", 1, {}),
        real_case("pp", 2, PP),
        pytest.param(real_case("tp3", 3, TP3), marks=pytest.mark.long),
        pytest.param(LONG_TEXT, marks=pytest.mark.long),
    ],
    ids=str,
)
def test_a_real_model_trains_as_in_transformers_and_peft(
    case: Case, ranks_found: list[dict[str, Any]], reference: Callable[..., Training], room: Any
) -> None:
    wanted = reference(case)
    assert max(wanted.losses) < 3, "real text under real weights"
    start = load_file(room.adapter(case.family, case.adapter) / "adapter_model.safetensors")
    for found in ranks_found:
        assert_same_training(found, wanted, TOLERANCE)
        # Steps are gradients here (cases.ADAM_EPS): what each tensor moved by is compared, not where it is.
        moved, should = (
            {name: value - start[name] for name, value in adapter.items()}
            for adapter in (found["adapter"], wanted.adapter)
        )
        assert largest_difference(moved, should) < 2 * TOLERANCE
        assert all(in_modules == exported for in_modules, exported in found["fingerprints"])
