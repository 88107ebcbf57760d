"""Ten AdamW steps in every layout equal transformers + peft: losses, gradient norms, the adapter at the end (fp32)."""

from collections.abc import Callable
from typing import Any

import pytest

from tests.distributed.cases import CP, EP, FULL_RECOMPUTE, PLAIN_LOGPROBS, PP, SP, TP, VPP, Case
from tests.support.compare import assert_same_training, largest_difference, relative_differences
from tests.support.reference import Training

pytestmark = pytest.mark.timeout(2700)

TOLERANCE = 1e-4
PACKED = {"sequence_packing": {"enabled": True, "train_mb_tokens": 64}}
DYNAMIC = {"dynamic_batching": {"enabled": True, "train_mb_tokens": 64}}
SELECTIVE = FULL_RECOMPUTE | {"recompute_granularity": "selective"}
ALL_TO_ALL = SP | {"peft": {"a2a_experimental": True}}
WHOLE_OPTIMIZER = {"optimizer": {"use_distributed_optimizer": False}}


def case(name: str, ranks: int, megatron: dict | None = None, **fields: Any) -> Case:
    return Case(f"train_{name}", ranks, "train", megatron=megatron or {}, **fields)


def dora_case(name: str, ranks: int, megatron: dict, adapter: str = "dora", **fields: Any) -> Case:
    return case(f"dora_{name}", ranks, megatron | {"peft": {"type": "dora"}}, adapter=adapter, **fields)


def nf4_case(name: str, ranks: int, megatron: dict, type: str = "lora", double: bool = False, **fields: Any) -> Case:
    """QLoRA and QDoRA, against peft over the same quantized values."""
    adapter = fields.pop("adapter", "dora" if type == "dora" else "shared")
    base = {"quantization": "nf4", "double_quantization": double, "lora_dtype": "float32"}
    peft = {"peft": {"type": type} | base}
    family = fields.pop("family", "qwen3_even")
    return case(f"nf4_{type}_{name}", ranks, megatron | peft, adapter=adapter, family=family, **fields)


def stored_case(name: str, ranks: int, megatron: dict, **fields: Any) -> Case:
    """Over a folder that bitsandbytes wrote, against peft over that folder."""
    peft = {"peft": {"lora_dtype": "float32"}}
    return case(f"stored_nf4_{name}", ranks, megatron | peft, family="qwen3_even_nf4", **fields)


CASES = [
    case("tp1", 1),
    case("plain_logprobs", 1, PLAIN_LOGPROBS),
    case("packing", 1, policy=PACKED),
    case("dynamic_batching", 1, policy=DYNAMIC),
    case("single_rows", 1, policy={"train_micro_batch_size": 1}),
    case("full_recompute", 1, FULL_RECOMPUTE),
    case("selective_recompute", 1, SELECTIVE),
    case("whole_optimizer", 1, WHOLE_OPTIMIZER),
    case("own_a", 1, adapter="own"),
    case("unlike", 1, adapter="unlike"),
    case("head", 1, adapter="head"),
    case("head_plain_logprobs", 1, PLAIN_LOGPROBS, adapter="head"),
    case("tp", 2, TP),
    case("sp", 2, SP),
    case("sp_packing", 2, SP, policy=PACKED),
    case("sp_full_recompute", 2, SP | FULL_RECOMPUTE),
    case("all_to_all", 2, ALL_TO_ALL),
    case("pp", 2, PP),
    case("pp_full_recompute_packing", 2, PP | FULL_RECOMPUTE, policy=PACKED),
    case("vpp", 2, VPP),
    case("uneven_last", 2, PP | {"num_layers_in_last_pipeline_stage": 1}),
    case("cp", 2, CP),
    case("dp", 2),
    case("dp_dynamic_batching", 2, policy=DYNAMIC),
    case("pp_unlike", 2, PP, adapter="unlike"),
    case("pp_head", 2, PP, adapter="head"),
    dora_case("tp1", 1, {}),
    dora_case("tp", 2, TP),
    dora_case("sp_full_recompute", 2, SP | FULL_RECOMPUTE),
    dora_case("pp", 2, PP, adapter="dora_own"),
    dora_case("query_value_head", 1, {}, adapter="dora_query_value_head"),
    dora_case("sp_query_value_head", 2, SP, adapter="dora_query_value_head"),
    nf4_case("tp1", 1, {}),
    nf4_case("qwen3_5", 1, {}, family="qwen3_5_even", adapter="delta"),
    nf4_case("sp_full_recompute", 2, SP | FULL_RECOMPUTE, "dora", double=True),
    stored_case("tp", 2, TP),
    case("sp_qwen2", 2, SP, family="qwen2"),
    case("sp_gemma3_tower", 2, SP, family="gemma3_tower"),
    case("sp_llama_biases", 2, SP, family="llama_biases"),
    case("vpp_qwen2", 2, VPP, family="qwen2"),
    case("cp_llama3", 2, CP, family="llama3"),
]


MORE_LAYOUTS = [
    case("all_to_all_own_a", 2, ALL_TO_ALL, adapter="own"),
    case("sp_head", 2, SP, adapter="head"),
    dora_case("sp_qwen2", 2, SP, family="qwen2"),
    dora_case("sp_gemma3", 2, SP, family="gemma3"),
    case("sp_gemma3_softcap", 2, SP, family="gemma3_softcap"),
    case("sp_gemma2", 2, SP, family="gemma2"),
    # Rows of one micro-batch must not see each other's state.
    case("sp_qwen3_5", 2, SP, family="qwen3_5", adapter="delta", policy=PACKED),
    case("pp_qwen3_next", 2, PP, family="qwen3_next", adapter="delta"),
    case("tp1_qwen3_5_moe", 1, family="qwen3_5_moe", adapter="delta", policy=PACKED),
    case("sp_qwen3_5_moe", 2, SP, family="qwen3_5_moe", adapter="delta", policy=PACKED),
    case("pp_qwen3_5_moe", 2, PP, family="qwen3_5_moe", adapter="delta"),
    case("ep_qwen3_5_moe", 2, EP, family="qwen3_5_moe", adapter="delta_experts"),
    case("sp_nemotron_h", 2, SP, family="nemotron_h", adapter="mamba", policy=PACKED),
    case("cp_qwen3_5", 2, CP, family="qwen3_5", adapter="delta", policy=PACKED),
    case("cp_qwen3_next", 2, CP | FULL_RECOMPUTE, family="qwen3_next", adapter="delta"),
    case("cp_nemotron_h", 2, CP, family="nemotron_h", adapter="mamba", policy=PACKED),
    case("sp_nemotron", 2, SP, family="nemotron"),
    case("pp_nemotron_h", 2, PP, family="nemotron_h", adapter="mamba_experts"),
    case("tp_plain_logprobs", 2, TP | PLAIN_LOGPROBS),
    case("sp_plain_logprobs", 2, SP | PLAIN_LOGPROBS),
    case("sp_selective_recompute", 2, SP | SELECTIVE),
    case("uneven_first", 2, PP | {"num_layers_in_first_pipeline_stage": 1}),
    case("dp_whole_optimizer", 2, WHOLE_OPTIMIZER),
    case("tp_own_a", 2, TP, adapter="own"),
    case("tp_unlike", 2, TP, adapter="unlike"),
    case("sp_unlike", 2, SP, adapter="unlike"),
    case("sp_own_a", 2, SP, adapter="own"),
    case("pp_own_a", 2, PP, adapter="own"),
    case("tp_head", 2, TP, adapter="head"),
    case("sp_head_plain_logprobs", 2, SP | PLAIN_LOGPROBS, adapter="head"),
    case("sp_llama2", 2, SP, family="llama2"),
    case("sp_llama3", 2, SP, family="llama3"),
    case("sp_mistral", 2, SP, family="mistral"),
    case("pp_gemma3", 2, PP, family="gemma3"),
    case("cp_packing", 2, CP, policy=PACKED),
    case("tp_pp", 4, TP | PP),
    case("sp_vpp_full_recompute_packing", 4, SP | VPP | FULL_RECOMPUTE, policy=PACKED),
    case("tp_dp", 4, TP),
    case("sp_cp", 4, SP | CP),
    dora_case("tp_dp", 4, TP),
    nf4_case("query_value", 1, {}, adapter="query_value"),
    nf4_case("tp", 2, TP, double=True),
    nf4_case("sp", 2, SP),
    nf4_case("pp", 2, PP),
    nf4_case("dp", 2, {}),
    nf4_case("tp1", 1, {}, "dora"),
    nf4_case("tp", 2, TP, "dora"),
    nf4_case("sp", 2, SP, "dora"),
    nf4_case("pp", 2, PP, "dora"),
    stored_case("tp1", 1, {}),
    stored_case("sp", 2, SP),
    stored_case("pp", 2, PP),
]


@pytest.mark.parametrize("case", [*CASES, *(pytest.param(c, marks=pytest.mark.long) for c in MORE_LAYOUTS)], ids=str)
def test_ten_steps_equal_transformers_and_peft(
    case: Case, ranks_found: list[dict[str, Any]], reference: Callable[..., Training]
) -> None:
    wanted = reference(case)
    for found in ranks_found:
        assert_same_training(found, wanted, TOLERANCE)
        assert all(in_modules == exported for in_modules, exported in found["fingerprints"])


LORA_PLUS = {"peft": {"lora_plus_ratio": 4.0}}


FASTER_B = [
    case("lora_plus", 1, LORA_PLUS),
    case("lora_plus_sp", 2, SP | LORA_PLUS),
    pytest.param(case("lora_plus_tp", 2, TP | LORA_PLUS), marks=pytest.mark.long),
    pytest.param(case("lora_plus_pp", 2, PP | LORA_PLUS), marks=pytest.mark.long),
]


@pytest.mark.parametrize("case", FASTER_B, ids=str)
def test_lora_plus_gives_b_a_rate_of_its_own(
    case: Case, found: dict[str, Any], reference: Callable[..., Training]
) -> None:
    wanted = reference(case, lora_plus_ratio=4.0)
    assert_same_training(found, wanted, TOLERANCE)
    assert largest_difference(reference(case).adapter, wanted.adapter) > 10 * TOLERANCE


CLIPPED = case("clipping", 1, policy={"max_grad_norm": 0.05})


@pytest.mark.parametrize("case", [CLIPPED, case("clipping_sp", 2, SP, policy={"max_grad_norm": 0.05})], ids=str)
def test_clipping_equals_torchs(case: Case, found: dict[str, Any], reference: Callable[..., Training]) -> None:
    wanted, unclipped = reference(case, max_norm=0.05), reference(case)
    assert min(wanted.grad_norms) > 0.05
    assert max(relative_differences(found["losses"], wanted.losses)) < TOLERANCE
    assert largest_difference(found["adapter"], wanted.adapter) < TOLERANCE
    # Adam forgets a common factor of all gradients; that it changed from step to step must still show.
    assert largest_difference(unclipped.adapter, wanted.adapter) > 10 * TOLERANCE
