import re
from decimal import Decimal

import pytest

from megatron_lora.errors import UserError
from megatron_lora.rollout.rewards import RewardSpec, build_reward
from megatron_lora.rollout.rewards.functions import (
    exact_match,
    format_match,
    gsm8k_match,
    gsm8k_number,
    length_penalty,
    load_math_match,
)


def test_exact():
    assert exact_match("2+2", " 4\n", "4", {}) == 1.0
    assert exact_match("2+2", "4.0", "4", {}) == 0.0


@pytest.mark.parametrize(
    "completion, answer, expected",
    [
        ("2 + 3 = 5, so\n#### 5", "long reasoning\n#### 5", 1.0),
        ("#### 1,234", "1234", 1.0),
        ("#### $72.00.", "#### 72", 1.0),
        ("#### -3", "3", 0.0),
        ("first #### 4, no: #### 5", "5", 1.0),
        ("the answer is 5", "5", 0.0),  # no marker
        ("#### five", "5", 0.0),
    ],
)
def test_gsm8k(completion, answer, expected):
    assert gsm8k_match("", completion, answer, {}) == expected


def test_gsm8k_number():
    assert gsm8k_number("#### -1,234.5 apples") == Decimal("-1234.5")
    assert gsm8k_number("none") is None
    with pytest.raises(ValueError, match="no number"):
        gsm8k_match("", "#### 5", "five", {})


def test_format():
    reward = format_match(r"<think>.*</think>\s*<answer>.*</answer>")
    assert reward("", "<think>a\nb</think>\n<answer>5</answer>", "", {}) == 1.0
    assert reward("", "x<think>a</think><answer>5</answer>", "", {}) == 0.0
    with pytest.raises(re.error):
        format_match("(")


def test_length():
    reward = length_penalty(100)
    assert [reward("", "", "", {"num_tokens": n}) for n in (7, 100, 150, 200, 900)] == [0.0, 0.0, -0.5, -1.0, -1.0]
    with pytest.raises(KeyError):
        reward("", "", "", {})


@pytest.mark.parametrize(
    "completion, answer, expected",
    [
        (r"so it is $\boxed{\frac{1}{2}}$", "0.5", 1.0),
        (r"\boxed{x^2 + 2x + 1}", "(x+1)^2", 1.0),
        (r"\boxed{3}", "4", 0.0),
        ("The final answer is 42.", "#### 42", 1.0),
        (r"\boxed{\{1, 2\}}", r"\{2, 1\}", 1.0),
        ("I do not know", "42", 0.0),
        (r"\boxed{\sqrt{8}}", r"$2\sqrt{2}$", 1.0),
    ],
)
def test_math(completion, answer, expected):
    assert load_math_match()("", completion, answer, {}) == expected


def test_unknown_kind_and_missing_keys():
    with pytest.raises(UserError, match="did you mean 'gsm8k'"):
        build_reward(RewardSpec("gsm8"))
    with pytest.raises(UserError, match="needs pattern"):
        build_reward(RewardSpec("format", "f"))
    with pytest.raises(UserError, match="no regular expression"):
        build_reward(RewardSpec("format", "f", pattern="("))


USER_MODULE = """
def good(prompt, completion, answer, extra, bonus=0.0):
    return len(completion) + bonus

def short(prompt, completion):
    return 0.0

async def slow(prompt, completion, answer, extra):
    return 0.0

value = 3
"""


@pytest.fixture
def user_file(tmp_path):
    path = tmp_path / "my_rewards.py"
    path.write_text(USER_MODULE)
    return path


def test_user_function_by_file_and_module(user_file, monkeypatch):
    by_file = build_reward(RewardSpec("python", function=f"{user_file}:good", kwargs={"bonus": 0.5}))
    assert by_file("", "abc", "", {}) == 3.5
    monkeypatch.syspath_prepend(user_file.parent)
    assert build_reward(RewardSpec("python", function="my_rewards:good"))("", "abc", "", {}) == 3.0


@pytest.mark.parametrize(
    "function, kwargs, message",
    [
        ("{folder}/my_rewards.py:god", {}, "did you mean 'good'"),
        ("{folder}/my_reward.py:good", {}, "did you mean .*my_rewards.py"),
        ("{folder}/my_rewards.py:value", {}, "something else than a function"),
        ("{folder}/my_rewards.py:short", {}, r"want \(prompt: str"),
        ("{folder}/my_rewards.py:good", {"bogus": 1}, "bogus"),
        ("{folder}/my_rewards.py:slow", {}, "coroutine"),
        ("no_colon", {}, "package.module:function"),
        ("jsn:loads", {}, "did you mean 'json'"),
        ("json.decodr:loads", {}, "did you mean 'decoder'"),
        ("{folder}/broken.py:good", {}, "ZeroDivisionError"),
        ("{folder}/needy.py:good", {}, "not_installed_anywhere"),
    ],
)
def test_user_function_that_cannot_be_used(user_file, function, kwargs, message):
    (user_file.parent / "broken.py").write_text("1 / 0\n")
    (user_file.parent / "needy.py").write_text("import not_installed_anywhere\n")
    spec = RewardSpec("python", function=function.format(folder=user_file.parent), kwargs=kwargs)
    with pytest.raises(UserError, match=message):
        build_reward(spec)
