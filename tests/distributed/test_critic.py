"""A policy and PPO's critic on one frozen base, in layouts of both backends, against transformers with peft's two
adapters (fp32)."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.distributed.cases import CP, EP, PP, SEED, SP, SP2, TP2, VPP, Case, training_rows
from tests.distributed.conftest import Room
from tests.distributed.critic_checks import NUM_STEPS
from tests.support.compare import drift, largest_difference, relative_differences
from tests.support.critic import ADAM_EPS, Both, train_both, with_values

# The first test of a world size waits for all of its cases.
pytestmark = pytest.mark.timeout(2700)

TOLERANCE, RESUMED = 1e-4, 1e-5
PACKED = {"sequence_packing": {"enabled": True, "train_mb_tokens": 64}}
NUMBERS = ("losses", "grad_norms", "value_losses", "value_norms")


def case(name: str, ranks: int, keys: dict, others: dict[str, dict] | None = None, **fields: Any) -> Case:
    options = {"critic": True, "adam_eps": ADAM_EPS, "layouts": {"same": keys} | (others or {})}
    return Case(f"critic_{name}", ranks, "critic", megatron=keys, options=options, **fields)


def dtensor(name: str, ranks: int, keys: dict, others: dict[str, dict] | None = None, **fields: Any) -> Case:
    options = {"critic": True, "adam_eps": ADAM_EPS, "layouts": {"same": keys} | (others or {})}
    return Case(f"critic_dtensor_{name}", ranks, "critic", dtensor=keys, options=options, **fields)


def long(*cases: Case) -> list[Any]:
    return [pytest.param(case, marks=pytest.mark.long) for case in cases]


CASES = [
    case("one", 1, {}),
    case("sp", 2, SP, {"pp": PP}, policy=PACKED),
    dtensor("one", 1, {}, adapter="head", family="llama3"),
    dtensor("sp", 2, SP2, {"dp": {}}, policy=PACKED),
    *long(
        case("pp", 2, PP),
        case("vpp", 2, VPP),
        case("cp", 2, CP),
        case("dp_head", 2, {}, adapter="head"),
        case("sp_dora", 2, SP | {"peft": {"type": "dora"}}, adapter="dora"),
        dtensor("tp", 2, TP2),
        dtensor("dora", 1, {"lora_cfg": {"type": "dora"}}, family="llama3", adapter="dora"),
    ),
]


# peft holds one adapter on experts' parameters at most.
EXPERTS = long(case("experts", 2, EP, {"dp": {}}, family="qwen3_moe", adapter="experts"))


IN_BFLOAT16 = long(*(one("bfloat16", 1, {}, policy={"precision": "bfloat16"}) for one in (case, dtensor)))


@pytest.fixture(scope="module")
def wanted(room: Room) -> Callable[[Case], Both]:
    known: dict[tuple[str, str], Both] = {}

    def trained(case: Case) -> Both:
        key = (case.family, str(case.adapter))
        if key not in known:
            torch.set_num_threads(1)
            steps = [with_values(rows, step) for step, rows in enumerate(training_rows(NUM_STEPS))]
            base, adapter = room.base(case.family), room.adapter(*key)
            known[key] = train_both(base, adapter, steps, case.learning_rate, SEED)
        return known[key]

    return trained


@pytest.mark.parametrize("case", CASES, ids=str)
def test_policy_and_critic_train_as_pefts_two_adapters(
    case: Case, ranks_found: list[dict[str, Any]], wanted: Callable[[Case], Both]
) -> None:
    both = wanted(case)
    factors = {name: value for name, value in both.critic.items() if "lm_head" not in name}
    for found in ranks_found:
        for name in NUMBERS:
            values, others = found["whole"][name], getattr(both, name)
            assert max(relative_differences(values, others)) < TOLERANCE, (name, relative_differences(values, others))
            assert drift(values, others) < TOLERANCE / 4, name
        assert largest_difference(found["critic"], factors) < 10 * TOLERANCE
        assert 0 < found["whole"]["metrics"][-1]["value_clip_fraction"] < 1
    # Its own factors: the policy's are others by now.
    policy = ranks_found[0]["whole"]["adapter"]
    assert all(not torch.equal(value, policy[name]) for name, value in factors.items() if name in policy)


@pytest.mark.parametrize("case", [*CASES, *IN_BFLOAT16, *EXPERTS], ids=str)
def test_a_resumed_run_is_the_same_bit_for_bit(case: Case, ranks_found: list[dict[str, Any]]) -> None:
    for found in ranks_found:
        whole, again = found["whole"], found["continued"]["same"]
        for name in NUMBERS:
            assert again[name] == whole[name][-len(again[name]) :], name
        for name in ("scores", "values"):
            assert all(torch.equal(a, b) for a, b in zip(again[name], whole[name], strict=True)), name
        assert all(torch.equal(again["adapter"][name], value) for name, value in whole["adapter"].items())


TAKEN_OVER = [one for one in CASES if isinstance(one, Case) and len(one.options["layouts"]) > 1]


@pytest.mark.parametrize("case", [*TAKEN_OVER, *EXPERTS], ids=str)
def test_another_layout_goes_on(case: Case, ranks_found: list[dict[str, Any]]) -> None:
    for found in ranks_found:
        for name in case.options["layouts"]:
            whole, again = found["whole"], found["continued"][name]
            for number in NUMBERS:
                values = whole[number][-len(again[number]) :]
                assert max(relative_differences(again[number], values)) < RESUMED, number
            assert all(
                (a - b).abs().max() < 10 * RESUMED for a, b in zip(again["values"], whole["values"], strict=True)
            )


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_base_is_there_once(case: Case, found: dict[str, Any]) -> None:
    """Policy and critic are each the same base with an adapter of its own, and the critic a value head."""
    (policy, whole), (critic, with_critic) = found["trainable"]
    heads = sum(value.numel() for name, value in found["whole"]["adapter"].items() if "lm_head" in name)
    assert with_critic - critic == whole - policy
    assert critic == policy - heads + found["critic"]["base_model.model.score.weight"].numel()
