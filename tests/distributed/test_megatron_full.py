"""Ten AdamW steps of full fine-tuning in every layout equal transformers: losses, gradient norms, weights (fp32)."""

from collections.abc import Callable
from typing import Any

import pytest

from tests.distributed.cases import CP, FULL_RECOMPUTE, PLAIN_LOGPROBS, PP, SP, VPP, Case
from tests.support.compare import assert_same_training
from tests.support.reference import Training

pytestmark = pytest.mark.timeout(2700)

TOLERANCE = 1e-4
PACKED = {"sequence_packing": {"enabled": True, "train_mb_tokens": 64}}


def case(name: str, ranks: int, family: str, megatron: dict | None = None, **fields: Any) -> Case:
    return Case(f"full_{name}_{family}", ranks, "train", family, adapter=None, megatron=megatron or {}, **fields)


# Qwen2's embeddings are tied, Qwen3's are not.
CASES = [
    case("tp1", 1, "qwen2"),
    case("sp", 2, "qwen2", SP),
    case("pp", 2, "qwen2", PP),
    case("dp", 2, "qwen2"),
    case("pp", 2, "qwen3", PP),
    case("tp1_plain_logprobs_full_recompute", 1, "qwen3", PLAIN_LOGPROBS | FULL_RECOMPUTE),
    case("vpp", 2, "qwen2", VPP),
    case("cp", 2, "qwen2", CP),
    *(
        pytest.param(more, marks=pytest.mark.long)
        for more in (
            case("sp", 2, "qwen3", SP),
            # Recurrent mixers, whose norm each rank sees some heads of.
            case("tp1_packed", 1, "qwen3_5", policy=PACKED),
            case("sp", 2, "qwen3_5", SP),
            case("sp", 2, "llama_biases", SP),
            case("sp_pp", 4, "qwen2", SP | PP),
        )
    ),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_ten_steps_equal_transformers(
    case: Case, ranks_found: list[dict[str, Any]], reference: Callable[..., Training]
) -> None:
    wanted = reference(case)
    for found in ranks_found:
        assert_same_training(found, wanted, TOLERANCE)
