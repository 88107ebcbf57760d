"""Rows that share a prefix, sent through the model once: the same numbers as each row whole, in every layout (fp32)."""

from typing import Any

import pytest

from tests.distributed.cases import FULL_RECOMPUTE, PLAIN_LOGPROBS, PP, SP, TP, VPP, Case
from tests.support.grouped import assert_same_numbers

pytestmark = pytest.mark.timeout(2700)

PACKED = {"sequence_packing": {"enabled": True, "train_mb_tokens": 96}}
DYNAMIC = {"dynamic_batching": {"enabled": True, "train_mb_tokens": 128}}
SELECTIVE = FULL_RECOMPUTE | {"recompute_granularity": "selective"}


def case(name: str, ranks: int, megatron: dict | None = None, **fields: Any) -> Case:
    fields.setdefault("policy", PACKED)
    return Case(f"shared_{name}", ranks, "shared_prefix", megatron=megatron or {}, **fields)


CASES = [
    case("tp1", 1),
    case("stretched", 1, options={"stretched": True}),
    case("single_rows", 1, policy={"train_micro_batch_size": 4}),
    case("plain_logprobs_recompute", 1, PLAIN_LOGPROBS | FULL_RECOMPUTE),
    case("head_selective_recompute", 1, SELECTIVE, adapter="head"),
    case("gemma3", 1, family="gemma3"),
    case("sp", 2, SP),
    case("sp_head", 2, SP, adapter="head"),
    case("sp_plain_logprobs", 2, SP | PLAIN_LOGPROBS),
    case("tp_mistral", 2, TP, family="mistral"),
    case("pp", 2, PP, family="llama3"),
    case("vpp", 2, VPP, family="qwen2"),
    case("dp_dynamic", 2, policy=DYNAMIC),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_shared_prefixes_change_no_number(case: Case, ranks_found: list[dict[str, Any]]) -> None:
    for found in ranks_found:
        assert_same_numbers(found["shared"], found["whole"])
