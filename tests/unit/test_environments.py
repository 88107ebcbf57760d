"""Answers of several turns: tokens, masks, what an environment may do wrong. A generator that says what it is told to
stands in for the model; a run with a model: tests/end_to_end/test_grpo.py."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_lora.config.loader import load_recipe
from megatron_lora.config.schema import Recipe
from megatron_lora.data.dataset import Prompt
from megatron_lora.errors import UserError
from megatron_lora.rollout.calculator import Calculator
from megatron_lora.rollout.environments import Environments, EnvironmentSpec, Played
from megatron_lora.rollout.generator import Sample, SamplingOptions, rollout_logprob_error
from megatron_lora.rollout.rewards import RewardOutcome
from megatron_lora.runtime.world import World
from megatron_lora.trainers import rollout_turns
from megatron_lora.trainers.grpo import GRPO
from megatron_lora.trainers.rollout_batch import Group, build_rows, describe_groups, num_generated
from megatron_lora.trainers.rollout_turns import Turns
from tests.support.models import save_model

RECIPE = Path(__file__).parents[2] / "recipes" / "grpo-quickstart-megatron.yaml"
HERE = "tests.support.environments"
ALONE = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))
OPTIONS = SamplingOptions(max_new_tokens=8, seed=5)
END = 1


def encode(text: str) -> list[int]:
    return [1000 + ord(character) for character in text]


def turn(index: int, context: Sequence[int], text: str, reason: str = "stop") -> Sample:
    """Written by the model: tokens that `encode` would not give."""
    ids = [ord(character) for character in text] + ([END] if reason == "stop" else [])
    return Sample(index, list(context), ids, -torch.arange(1.0, len(ids) + 1), reason, text, adapter_version=2)


class Model:
    """Says the next of its lines in each turn."""

    def __init__(self, *lines: str, reason: str = "stop"):
        self.lines, self.reason = list(lines), reason
        self.contexts: list[list[list[int]]] = []
        self.seeds: list[int] = []

    def __call__(self, contexts: Sequence[Sequence[int]], options: SamplingOptions) -> list[Sample]:
        line = self.lines.pop(0)
        self.contexts.append([list(context) for context in contexts])
        self.seeds.append(options.seed)
        return [turn(index, context, line, self.reason) for index, context in enumerate(contexts)]


@pytest.fixture(autouse=True)
def one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollout_turns, "from_first_rank", lambda world, action: action())


def recipe(path: str, turns: int = 3, kwargs: str = "{}", *overrides: str) -> Recipe:
    environment = f"env.environment={{path: '{path}', kwargs: {kwargs}, timeout_seconds: 2.0, max_result_tokens: 12}}"
    return load_recipe(RECIPE, [environment, f"grpo.max_rollout_turns={turns}", *overrides]).recipe


def play(
    model: Model, first: Sequence[str], path: str = f"{HERE}:Echo", max_length: int = 99, **keys: Any
) -> list[Sample]:
    turns = Turns(recipe(path, **keys), ALONE, encode, max_length, print)
    prompts = [Prompt(torch.tensor([7, 8]), f"p{number}", "", index=number) for number in range(len(first))]
    try:
        return turns.play(prompts, [turn(i, [7, 8], text) for i, text in enumerate(first)], model, OPTIONS)
    finally:
        turns.close()


def test_what_was_drawn_is_kept_token_by_token_and_the_rest_carries_no_loss() -> None:
    model = Model("b", "c")
    [answer] = play(model, ["a"])
    first, second, third = [97, END], [98, END], [99, END]
    results = [encode("[p0a1]"), encode("[p0b2]")]
    assert answer.completion_ids == first + results[0] + second + results[1] + third
    assert answer.sampled == [True] * 2 + [False] * 6 + [True] * 2 + [False] * 6 + [True] * 2
    assert answer.logprobs.tolist() == [-1, -2, *[0] * 6, -1, -2, *[0] * 6, -1, -2]
    assert (answer.text, answer.final_turn, answer.num_turns) == ("a[p0a1]b[p0b2]c", "c", 3)
    # The next turn is drawn behind exactly these tokens, each turn with a stream of its own.
    assert model.contexts == [[[7, 8, *first, *results[0]]], [[7, 8, *first, *results[0], *second, *results[1]]]]
    assert len({OPTIONS.seed, *model.seeds}) == 3
    group = Group(Prompt(torch.tensor([7, 8]), "", "", index=0), [answer], [RewardOutcome(1.0)])
    [row] = build_rows([group], torch.ones(1, 1))
    assert row.target_mask.tolist() == [False, False, *(answer.sampled or [])] and num_generated([group]) == 6
    found = describe_groups([group])
    assert (found["num_turns"], found["environment_tokens"], found["environment_errors"]) == (3, 12, 0)
    # How far trainer and engine are apart is asked of what the engine drew.
    trainer = torch.cat([torch.zeros(2), answer.logprobs + 0.5])
    assert rollout_logprob_error([trainer], [answer]) == pytest.approx(0.5)
    trainer[4:10] = 100.0
    assert rollout_logprob_error([trainer], [answer]) == pytest.approx(0.5)


def test_an_environment_may_end_an_answer_and_others_go_on() -> None:
    model = Model("b")
    one, two = play(model, ["a", "1+2"], "megatron_lora.rollout.calculator:Calculator", turns=2)
    assert (one.text, one.num_turns) == ("a", 1) and all(one.sampled or [])
    assert (two.text, two.num_turns) == ("1+2=3b", 2) and len(model.contexts[0]) == 1


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("raise", "KeyError: 'no such tool'"),
        ("hang", "timed out after 2 seconds"),
        ("end", "an environment ended its process (exit status 3)"),
        ("number", "TypeError: step must return text or None, got a int"),
        ("large", "bytes between two turns"),
        ("unpicklable", "pickle"),
    ],
)
def test_an_environment_that_fails_ends_its_own_answer_alone(text: str, error: str) -> None:
    bad, good = play(Model("b", "c"), [text, "a"], f"{HERE}:Troubled")
    assert error in bad.environment_error and (bad.text, bad.num_turns) == (text, 1)
    assert (good.text, good.environment_error) == ("a[p1a1]b[p1b2]c", "")


def test_a_flood_is_cut() -> None:
    [answer] = play(Model("b"), ["flood"], f"{HERE}:Troubled", turns=2)
    assert answer.completion_ids[6:-2] == encode("7" * 12) and answer.environment_error == ""


def test_an_answer_that_has_no_room_left_is_cut_off() -> None:
    # Prompt 2, turn 2, result 6: with a length of 10 no token of another turn would fit.
    [answer] = play(Model("b", "c"), ["a"], max_length=10)
    assert (answer.finish_reason, answer.num_turns, answer.completion_ids) == ("length", 1, [97, END])
    [answer] = play(Model("b", "c"), ["a"], max_length=11)
    assert answer.num_turns == 2 and answer.finish_reason == "length"


def test_an_answer_cut_off_in_a_turn_gets_no_further_one() -> None:
    [answer] = play(Model("b", reason="length"), ["a"])
    assert (answer.num_turns, answer.finish_reason) == (2, "length")


def test_state_is_each_answers_own_and_lives_between_turns() -> None:
    environments = Environments(EnvironmentSpec(f"{HERE}:Echo", {"turns": 2}), num_workers=2)
    played = [Played((f"p{i}", "", {})) for i in range(3)]
    texts = [[result.text for result in environments.step(played, ["a", "b", "c"])] for _ in range(3)]
    environments.close()
    assert texts == [["[p0a1]", "[p1b1]", "[p2c1]"], ["[p0a2]", "[p1b2]", "[p2c2]"], [None] * 3]


def test_an_environment_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        "class Mine:\n def reset(self, *a): self.n = 0\n def step(self, text):\n  self.n += 1; return str(self.n)\n"
    )
    [answer] = play(Model("b", "c"), ["a"], f"{path}:Mine")
    assert answer.text == "a1b2c"


def test_one_that_always_fails_ends_the_run() -> None:
    told: list[str] = []
    turns = Turns(recipe(f"{HERE}:Troubled"), ALONE, encode, 99, told.append)
    prompts = [Prompt(torch.tensor([7, 8]), "", "", index=0)]
    for batch in range(rollout_turns.PATIENCE):
        if batch + 1 < rollout_turns.PATIENCE:
            turns.play(prompts, [turn(0, [7, 8], "raise")], Model(), OPTIONS)
            continue
        with pytest.raises(UserError, match="failed on every answer of 3 batches in a row: KeyError"):
            turns.play(prompts, [turn(0, [7, 8], "raise")], Model(), OPTIONS)
    turns.close()
    assert len(told) == 1 and told[0].startswith("the environment failed on 1 of 1 turns: KeyError")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("base") / "model", "qwen3")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("no_such_module:Mine",), "environment class 'no_such_module:Mine': there is no module"),
        ((f"{HERE}:Ecko",), "has no class 'Ecko'; did you mean 'Echo'?"),
        ((f"{HERE}:NoStep",), "it has no step"),
        ((f"{HERE}:Echo", 3, "{rounds: 1}"), "cannot be built with env.environment.kwargs={'rounds': 1}"),
        ((f"{HERE}:Echo", 1), "max_rollout_turns=1: set it to 2 or more"),
        (("", 3, "{}", "env.environment=null"), "max_rollout_turns=3 needs something that answers"),
        (
            (
                f"{HERE}:Echo",
                3,
                "{}",
                "grpo.async_grpo.enabled=true",
                "policy.generation.colocated.enabled=false",
                "policy.generation.servers.urls=['http://one:8000']",
            ),
            "set one of them to false or null",
        ),
    ],
)
def test_refused_before_weights_load(base: Path, given: Any, message: str) -> None:
    values: Any = (*given, *("", 3, "{}")[len(given) :])
    path, turns, kwargs, *overrides = values
    with pytest.raises(UserError) as error:
        GRPO().check(recipe(path, turns, kwargs, *overrides, f"policy.model_name={base}"), replace(ALONE, size=2))
    assert message in str(error.value)


def test_the_calculator_reads_the_end_of_a_turn() -> None:
    calculator = Calculator()
    calculator.reset("", "", {})
    calls = ["47+38", "so 47 + 38 =", "5-9", "12*12=", "85", "1+x", "9999999999+1"]
    assert [calculator.step(text) for text in calls] == ["=85", "=85", "=-4", "=144", None, None, None]
