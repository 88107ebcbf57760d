"""Router replay: tokens go to the experts that a rollout engine named, in every layout with the log-probabilities,
gradients and adapters of transformers + peft at the same experts (fp32)."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from megatron_lora.data.batch import Row
from tests.distributed.cases import CP, EP, ETP, FULL_RECOMPUTE, PP, SP, VPP, Case, scored_rows, training_rows
from tests.distributed.replay_checks import routed, routed_steps
from tests.support.compare import assert_same_training
from tests.support.forced_experts import forced_experts
from tests.support.reference import Training, token_logps, train

pytestmark = pytest.mark.timeout(1800)

TOLERANCE, STEPS, EPS = 1e-4, 3, 1e-5
PACKED = {"sequence_packing": {"enabled": True, "train_mb_tokens": 64}}
SELECTIVE = FULL_RECOMPUTE | {"recompute_granularity": "selective", "recompute_modules": ["moe"]}


def case(name: str, ranks: int, megatron: dict[str, Any], *, observe: bool = False, policy: Any = None) -> Case:
    replayed = {"router_replay": {"enabled": True, "observe_only": observe}}
    return Case(
        f"replay_{name}",
        ranks,
        "replay",
        "qwen3_moe",
        "experts",
        megatron=megatron | {"optimizer": {"adam_eps": EPS}},
        policy=replayed | (policy or {}),
        options={"steps": STEPS},
    )


CASES = [
    case("pp_packing", 2, PP | FULL_RECOMPUTE, policy=PACKED),
    *(
        pytest.param(one, marks=pytest.mark.long)
        for one in (
            case("tp1", 1, SELECTIVE),
            case("ep_packing", 2, EP | FULL_RECOMPUTE, policy=PACKED),
            case("pp", 2, PP | FULL_RECOMPUTE),
            case("allgather", 2, EP | {"moe_token_dispatcher_type": "allgather"}),
            case("sp", 2, SP),
            case("etp", 2, ETP),
            case("cp", 2, CP),
            case("vpp", 2, VPP),
            case("observe", 2, EP, observe=True),
            case("sp_ep", 4, SP | EP),
        )
    ),
]


@pytest.fixture(scope="module")
def truth(room: Any) -> Callable[[Case], Training]:
    known: dict[bool, Training] = {}

    def trained(case: Case) -> Training:
        observes = case.policy["router_replay"]["observe_only"]
        if observes not in known:
            steps = training_rows(STEPS) if observes else routed_steps(STEPS)
            base, adapter = room.base(case.family), room.adapter(case.family, "experts")
            torch.set_num_threads(1)
            known[observes] = train(base, adapter, steps, lr=case.learning_rate, eps=EPS)
        return known[observes]

    return trained


@pytest.fixture(scope="module")
def peft_scores(room: Any) -> Callable[[list[Row]], tuple[list[torch.Tensor], float]]:
    """Log-probabilities at the rows' experts, and the part of those that the model would not have chosen."""
    base = AutoModelForCausalLM.from_pretrained(room.base("qwen3_moe"), attn_implementation="eager")
    model = PeftModel.from_pretrained(base, room.adapter("qwen3_moe", "experts"))

    def scored(rows: list[Row], *, forces: bool = True) -> tuple[list[torch.Tensor], float]:
        values, missed = [], []
        for row in rows:
            with torch.no_grad(), forced_experts(model, [row], missed, forces=forces):
                values.append(torch.cat([torch.zeros(1), token_logps(model, row)]))
        return values, float(torch.cat(missed).float().mean()) if missed else 0.0

    return scored


@pytest.mark.parametrize("case", CASES, ids=str)
def test_tokens_go_to_the_experts_that_the_engine_named(
    case: Case, ranks_found: list[dict[str, Any]], truth: Callable[..., Training], peft_scores: Callable[..., Any]
) -> None:
    observes = case.policy["router_replay"]["observe_only"]
    rows = scored_rows()
    own, _ = peft_scores(rows)
    named = {seed: own if observes else peft_scores(routed(rows, seed))[0] for seed in (50, 51)}
    # Layers are compared behind layers that have followed the engine, or, observing, their own choice.
    _, missed = peft_scores(routed(training_rows(1)[0], 0), forces=not observes)
    for found in ranks_found:
        assert largest(found["own"], own) < TOLERANCE
        assert all(largest(found[f"scores_{seed}"], values) < TOLERANCE for seed, values in named.items())
        # The first row names none; of the others another choice is another number.
        assert observes or min(differences(named[50][1:], named[51][1:])) > 100 * TOLERANCE
        assert torch.allclose(found["scores_50"][0], own[0], atol=TOLERANCE)
        assert_same_training(found, truth(case), TOLERANCE)
        assert 0.1 < missed < 0.9
        assert abs(found["metrics"][0]["routing_mismatch"] - missed) < 1e-6


def differences(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> list[float]:
    return [float((mine - theirs).abs().max()) for mine, theirs in zip(found, wanted, strict=True)]


def largest(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> float:
    return max(differences(found, wanted))
