"""The heads that distillation asks for, in layouts of both backends, against transformers with peft (fp32): the most
likely tokens, and training on the divergence over a teacher's."""

from typing import Any

import pytest
import torch

from megatron_lora.policy.heads import MostLikely
from tests.distributed.cases import CP, PLAIN_LOGPROBS, PP, SP, SP2, VPP, Case, scored_rows, training_rows
from tests.distributed.conftest import Room
from tests.support.candidates import NUM_CANDIDATES, NUM_STEPS, train, whole_logps
from tests.support.compare import drift, largest_difference, relative_differences

# The first test of a world size waits for all of its cases.
pytestmark = pytest.mark.timeout(2700)

TOLERANCE = 1e-4
# The policy's distribution is that of the whole vocabulary.
WHOLE = {"whole": True}
PACKED = {"sequence_packing": {"enabled": True, "train_mb_tokens": 64}}


def case(name: str, ranks: int, **fields: Any) -> Case:
    return Case(f"candidates_{name}", ranks, "candidates", **fields)


LONG = [
    case("head", 1, adapter="head"),
    case("plain", 2, megatron=SP | PLAIN_LOGPROBS, options=WHOLE),
    case("pp", 2, megatron=PP),
    case("whole", 2, megatron=SP, options=WHOLE),
    case("vpp", 2, megatron=VPP),
    case("cp", 2, megatron=CP),
    case("dtensor_head", 1, dtensor={}, adapter="head", family="llama3"),
]
CASES = [
    case("sp", 2, megatron=SP, policy=PACKED),
    case("dtensor_sp", 2, dtensor=SP2, policy=PACKED, options=WHOLE),
    *(pytest.param(each, marks=pytest.mark.long) for each in LONG),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_heads_give_and_train_what_transformers_does(case: Case, ranks_found: list[dict[str, Any]], room: Room) -> None:
    torch.set_num_threads(1)
    base, adapter = room.base(case.family), room.adapter(case.family, str(case.adapter))
    whole = whole_logps(base, adapter, scored_rows())
    wanted = train(base, adapter, training_rows(NUM_STEPS), case.learning_rate, case.adam_eps, **case.options)
    for found in ranks_found:
        for row, scores, everything, given in zip(
            scored_rows(), found["scores"], whole, found["most_likely"], strict=True
        ):
            drawn, logps, ids = MostLikely(NUM_CANDIDATES).parts(given)
            mask = row.target_mask[1:]
            best = everything.topk(NUM_CANDIDATES, dim=1).values
            assert (drawn - scores).abs().max() < TOLERANCE
            assert (logps[1:] - best)[mask].abs().max() < TOLERANCE
            assert (everything.gather(1, ids[1:].long()) - best)[mask].abs().max() < TOLERANCE
        assert max(relative_differences(found["losses"], wanted.losses)) < TOLERANCE
        assert max(relative_differences(found["grad_norms"], wanted.grad_norms)) < TOLERANCE
        assert drift(found["losses"], wanted.losses) < TOLERANCE / 4
        assert largest_difference(found["adapter"], wanted.adapter) < 10 * TOLERANCE
        # What the rollout's error is taken from.
        assert [logps.shape for logps in found["logps"]] == [row.input_ids.shape for row in training_rows(1)[0]]
