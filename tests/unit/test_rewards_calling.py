"""User's reward functions of every kind: how they are called, what their mistakes print, what stops a run."""

import re
from pathlib import Path
from typing import Any

import pytest

from megatron_lora.config.schema_env import EnvConfig, RewardFunctionConfig
from megatron_lora.errors import UserError
from megatron_lora.rollout.rewards import RewardOutcome, RewardRunner, RewardSample, RewardSpec
from megatron_lora.rollout.rewards.calling import as_list, score_samples, to_number
from megatron_lora.rollout.rewards.spec import build_reward
from megatron_lora.trainers.reward_watch import PATIENCE, RewardWatch

FUNCTIONS = '''
import asyncio, decimal, fractions, functools, time
import numpy as np

def other_order(answer, completion, extra, prompt):
    return float((prompt, completion, answer, extra["level"]) == ("p", "c", "a", 3))
def positional_only(completion, prompt, /):
    return float((prompt, completion) == ("p", "c"))
def by_column(completion, level, num_tokens):
    return float((completion, level, num_tokens) == ("c", 3, 7))
def keywords_only(*, completion, answer="x"):
    return float((completion, answer) == ("c", "a"))
def kwargs_only(**kwargs):
    return float((kwargs["completion"], kwargs["level"]) == ("c", 3))
def args_only(*args):
    return float(args == ("p", "c", "a", {"level": 3, "num_tokens": 7}))
def hidden(function):
    def wrapper(*args, **kwargs):
        return function(*args, **kwargs)
    return wrapper
@hidden
def decorated(prompt, completion, answer, extra):
    return float((prompt, completion, answer) == ("p", "c", "a"))
@hidden
def decorated_with_kwargs(prompt, completion, answer, extra, bonus):
    return bonus
class Judge:
    def __call__(self, completion):
        return float(completion == "c")
judge = Judge()
partial = functools.partial(lambda completion, wanted: float(completion == wanted), wanted="c")
def with_default(completion, missing=1.0):
    return missing
def some_rows(completion, rare):
    return 0.0 if rare is None else rare
def trl(prompts, completions, **columns):
    assert columns["level"] == [3] * len(prompts) and columns["answer"] == ["a"] * len(prompts)
    return [float(c == "c") for c in completions]
def trl_short(completions, **kwargs):
    return [1.0 for _ in completions]
def trl_column(completions, level):
    return [float(x) / 3 for x in level]
def as_array(completions, **kwargs):
    return np.ones(len(completions), dtype=np.float32)
def as_generator(completions, **kwargs):
    return (1 for _ in completions)
def as_tuple(completions, **kwargs):
    return tuple(np.float64(1) for _ in completions)
async def plain_async(completion):
    await asyncio.sleep(0.01)
    return 1.0
async def batch_async(prompts, completions, **kwargs):
    await asyncio.sleep(0.01)
    return [1.0] * len(completions)
def verl(data_source, solution_str, ground_truth, extra_info=None):
    return {"score": float((data_source, solution_str, ground_truth) == (None, "c", "a")), "acc": True}
def boolean(completion):
    return completion == "c"
def integer(completion):
    return 1
def exact_number(completion):
    return decimal.Decimal("1") if completion else fractions.Fraction(1)
def numpy_number(completion):
    return np.array([1.0])

def no_return(completion):
    len(completion)
def raises(completion):
    return {}["no such key"]
def asserts(completion):
    assert completion == "right"
def text(completion):
    return "1.0"
def listed(completion):
    return [1.0]
def mapping(completion):
    return {"value": 1.0}
def several(completion):
    return np.ones(2)
def complex_number(completion):
    return 1j
def huge(completion):
    return 1e300
def huge_integer(completion):
    return 10 ** 400
def not_a_number(completion):
    return float("nan")
def infinite(completion):
    return np.float32("inf")
def too_short(completions, **kwargs):
    return [1.0] * (len(completions) - 1)
def nothing(completions, **kwargs):
    pass
def one_for_all(completions, **kwargs):
    return 1.0
def array_for_each(completions, **kwargs):
    return np.ones((len(completions), 2))
def batch_raises(completions, **kwargs):
    return completions[10 ** 6]
def batch_of_text(completions, **kwargs):
    return "1" * len(completions)
def ends(completion):
    raise SystemExit(3)
async def async_raises(completion):
    raise ValueError("judge is away")
async def async_hangs(completion):
    await asyncio.sleep(1000)
def conversational(completions, **kwargs):
    return [float(c[0]["content"] == "c") for c in completions]
def wrong_count(prompt, completion, answer, extra, more):
    return 1.0
def nameless(x, y):
    return 1.0
def takes_nothing():
    return 1.0
class Plain:
    pass
'''  # fmt: skip


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("user") / "user_functions.py"
    path.write_text(FUNCTIONS)
    return path


def built(file: Path, name: str, **kwargs: Any) -> Any:
    return build_reward(RewardSpec("python", name, function=f"{file}:{name}", kwargs=kwargs, timeout_seconds=0.2))


def samples(count: int = 2) -> list[tuple[str, str, str, dict]]:
    return [("p", "c", "a", {"level": 3, "num_tokens": 7}) for _ in range(count)]


GOOD = """other_order positional_only by_column keywords_only kwargs_only args_only decorated judge partial with_default
trl trl_short trl_column as_array as_generator as_tuple verl plain_async batch_async boolean integer exact_number
numpy_number""".split()


@pytest.mark.parametrize("name", GOOD)
def test_arguments_go_by_name(name: str, file: Path) -> None:
    reward = built(file, name)
    reward.check_columns(["level", "num_tokens", "data_source"])
    assert score_samples(reward, samples()) == [(1.0, None), (1.0, None)]


def test_kwargs_and_columns_of_some_rows(file: Path) -> None:
    assert score_samples(built(file, "decorated_with_kwargs", bonus=0.5), samples(1)) == [(0.5, None)]
    assert score_samples(built(file, "with_default", missing=2), samples(1)) == [(2.0, None)]
    rows = [("p", "c", "a", {"rare": 4}), ("p", "c", "a", {})]
    assert score_samples(built(file, "some_rows"), rows) == [(4.0, None), (0.0, None)]


# What was planted, and what is printed of it: each answer counts 0, with this reason.
FAILURES = {
    "raises": "KeyError: 'no such key'",
    "asserts": "AssertionError",
    "text": "a reward must be a number or None, got text '1.0'",
    "listed": "a reward must be a number or None, got a list",
    "mapping": "a reward must be a number or None, got a dict",
    "several": "a reward must be one number or None, got a ndarray of several",
    "complex_number": "a reward must be a number or None, got a complex",
    "huge": "a reward must fit a 32-bit float (3.4e38), got 1e+300",
    "huge_integer": "a reward must fit a 32-bit float (3.4e38), got 1000",
    "not_a_number": "a reward must be a finite number, got nan",
    "infinite": "a reward must be a finite number, got inf",
    "too_short": "a list of 2 numbers (None abstains), one for each completion; got 1",
    "nothing": "one for each completion; got nothing",
    "one_for_all": "one for each completion; got a float",
    "array_for_each": "a reward must be a number or None, got a list",
    "batch_raises": "IndexError",
    "batch_of_text": "one for each completion; got a str",
    "async_raises": "ValueError: judge is away",
    "async_hangs": "TimeoutError: timed out after 0.2 seconds",
    "conversational": "TypeError: string indices must be integers",
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_mistake_of_the_function_is_told(name: str, file: Path) -> None:
    for value, error in score_samples(built(file, name), samples()):
        assert value == 0.0 and error is not None and FAILURES[name] in error


# What was planted, and the one message before weights load.
REFUSALS: dict[str, tuple[str, dict[str, Any], str]] = {
    "unknown argument": ("wrong_count", {}, r"takes the argument 'more', which is neither one of prompt, .* \(level\)"),
    "two unknown": ("nameless", {}, "takes the argument 'x'"),
    "no column": ("trl_column", {}, "takes the argument 'level'.*they have no others"),
    "no arguments": ("takes_nothing", {}, "takes no arguments; wanted some of prompt, completion"),
    "a class": ("Plain", {}, "is a class"),
    "kwargs that it lacks": ("boolean", {"wieght": 1}, "takes no argument 'wieght'"),
    "kwargs near": ("with_default", {"mising": 1}, "did you mean 'missing'"),
    "kwargs of each call": ("boolean", {"completion": "c"}, r"kwargs sets \['completion'\], which each call sets"),
}


@pytest.mark.parametrize("planted", REFUSALS)
def test_refused_before_weights_load(planted: str, file: Path) -> None:
    name, kwargs, message = REFUSALS[planted]
    with pytest.raises(UserError, match=message):
        built(file, name, **kwargs).check_columns([] if planted == "no column" else ["level"])


def test_kwargs_of_a_built_in_reward_are_refused() -> None:
    with pytest.raises(ValueError, match="kwargs belongs to kind=python"):
        RewardFunctionConfig(kind="exact", kwargs={"strict": True})


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([{"kind": "exact", "name": "std"}], "would hide the metric reward_std"),
        ([{"kind": "exact", "weight": 0.0}, {"kind": "gsm8k", "weight": 0.0}], "every weight of reward_functions is 0"),
        ([{"kind": "exact", "name": ""}, {"kind": "exact"}], "give each its own `name`"),
        ([{"kind": "exact", "timeout_seconds": 1e9}], "less than or equal to 86400"),
    ],
)
def test_odd_entries_are_refused(entries: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EnvConfig.model_validate({"reward_functions": entries})


def test_dapos_checker_in_nemo_rls_place() -> None:
    assert EnvConfig.model_validate({"math": {"math_verify_impl": "dapo_math_verify"}}).math.num_workers == 8
    with pytest.raises(ValueError, match="math_verify_impl"):
        EnvConfig.model_validate({"math": {"math_verify_impl": "sympy"}})


def test_numbers_by_hand() -> None:
    assert to_number(None) is None and to_number(True) == 1.0 and to_number(-3) == -3.0
    assert as_list(range(3), 3) == [0, 1, 2]


def test_a_batch_goes_through_one_worker_and_its_failure_is_everyones(file: Path) -> None:
    specs = [RewardSpec("python", name, function=f"{file}:{name}", timeout_seconds=30) for name in ("trl", "ends")]
    specs += [
        RewardSpec("python", name, function=f"{file}:{name}", weight=0.5) for name in ("no_return", "batch_raises")
    ]
    batch = [RewardSample("p", "c" if n % 2 else "d" * 2000, "a", {"level": 3}) for n in range(70)]
    with RewardRunner(specs, num_workers=2) as runner:
        outcomes = runner(batch)
        assert [outcome.values["trl"] for outcome in outcomes] == [0.0, 1.0] * 35
        assert [outcome.total for outcome in outcomes] == [0.0, 1.0] * 35
        assert all(outcome.values["no_return"] is None for outcome in outcomes)
        assert all("IndexError" in outcome.errors["batch_raises"] for outcome in outcomes)
        assert all("SystemExit" in outcome.errors["ends"] for outcome in outcomes)
        assert runner([]) == []


def test_an_answer_on_which_all_abstain_has_no_reward(file: Path) -> None:
    with RewardRunner([RewardSpec("gsm8k")]) as runner:
        outcomes = runner([RewardSample("", "#### 5", "five"), RewardSample("", "#### 5", "5")])
    assert [outcome.total for outcome in outcomes] == [None, 1.0]


def test_weights_beyond_a_float_are_refused() -> None:
    with pytest.raises(UserError, match="lower the weights"):
        RewardRunner([RewardSpec("exact", weight=1e39)])([RewardSample("", "4", "4")])


def outcome(error: str = "", value: float | None = 0.0) -> RewardOutcome:
    return RewardOutcome(value, {"judge": value, "look": value}, {"judge": error} if error else {})


def test_a_reward_that_fails_on_every_answer_stops_the_run() -> None:
    watch = RewardWatch()
    for _ in range(PATIENCE - 1):
        watch.see([outcome("KeyError: 'x'")] * 4)
    watch.see([outcome("KeyError: 'x'"), outcome()])  # one answer was judged: the count begins anew
    for _ in range(PATIENCE - 1):
        watch.see([outcome("KeyError: 'x'")] * 4)
    wanted = f"reward 'judge' failed on every answer of {PATIENCE} batches in a row, 4 in the last: KeyError: 'x'"
    with pytest.raises(UserError, match=re.escape(wanted)):
        watch.see([outcome("KeyError: 'x'")] * 4)


def test_the_first_failure_of_a_reward_is_told_once() -> None:
    watch = RewardWatch()
    assert watch.see([outcome()] * 2) == []
    [warning] = watch.see([outcome(), outcome("KeyError: 'x'")])
    assert warning.startswith("reward 'judge' failed and counts 0 for 1 of 2 answers, first: KeyError: 'x'; ")
    assert watch.see([outcome("KeyError: 'x'"), outcome()]) == []


def test_rewards_that_abstain_on_every_answer_stop_the_run() -> None:
    watch = RewardWatch()
    for _ in range(PATIENCE - 1):
        watch.see([outcome(value=None)] * 2)
    with pytest.raises(UserError, match="judge, look gave None for all of them"):
        watch.see([outcome(value=None)] * 2)
