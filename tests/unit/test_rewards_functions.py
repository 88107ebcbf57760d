import re
from decimal import Decimal

import pytest

from megatron_lora.errors import UserError
from megatron_lora.rollout.rewards import RewardSpec, build_reward
from megatron_lora.rollout.rewards.dapo_math import dapo_math_match
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
    # Of a GSM8K solution the number is enough; a heading is no solution.
    solution = "2000 + 2 = <<2000+2=2002>>2,002\n#### 2,002"
    assert [exact_match("", text, solution, {}) for text in ("2002", "2,002", solution, "2")] == [1.0, 1.0, 1.0, 0.0]
    assert [exact_match("", text, "#### Title", {}) for text in ("Title", "#### Title")] == [0.0, 1.0]


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
        ("#### 5", "five", None),  # nothing to compare with: abstains
        ("<think>#### 5", "5", 0.0),
        ("<think>#### 4</think>#### 5", "5", 1.0),
    ],
)
def test_gsm8k(completion, answer, expected):
    assert gsm8k_match("", completion, answer, {}) == expected


def test_gsm8k_number():
    assert gsm8k_number("#### -1,234.5 apples") == Decimal("-1234.5")
    assert gsm8k_number("none") is None


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
        ("So we get $42$ in total.", "42", 1.0),
        ("She pays $42$ for 3 apples.", "42", 1.0),
        ("We know $x=42$, and 3 remain.", "42", 1.0),
        ("$$42$$ then 5", "42", 1.0),
        ("First $x = 3$. So 42 apples", "42", 1.0),
        (r"Thus $42$ is it. $\boxed{41}$", "42", 0.0),
        ("She pays $41$ for 3 apples.", "42", 0.0),
        ("The sum is $40 + 2 = 42$, as wanted.", "42", 1.0),
        (r"It is \(42\).", "42", 1.0),
        (r"First $x = 3$, so $n = \boxed{42}$ it is", "42", 1.0),
        (r"<think>\boxed{42}", "42", 0.0),
        (r"<think>\boxed{41}</think>It is \boxed{42}.", "42", 1.0),
        (r"<think>\boxed{42}</think>It is \boxed{41}.", "42", 0.0),
        (r"a</think><think>\boxed{42}", "42", 0.0),
        (r"\boxed{42}", "", None),
    ],
)
def test_math(completion, answer, expected, math_match):
    assert math_match("", completion, answer, {}) == expected


@pytest.fixture(scope="module")
def math_match():
    return load_math_match()


def test_thoughts_that_the_prompt_opened(math_match):
    opened = "<|im_start|>assistant\n<think>\n"
    assert math_match(opened, r"so \boxed{42}", "42", {}) == 0.0
    assert math_match(opened, r"hm</think>so \boxed{42}", "42", {}) == 1.0


@pytest.mark.parametrize(
    "completion, answer, expected",
    [
        ("so\nAnswer: 42", "42", 1.0),
        ("Answer: 41\nanswer : $42$", "42", 1.0),  # the last one counts
        ("Answer: $x = 42$", "42", 1.0),
        ("Answer: 1,234 dollars", "1234", 1.0),
        (r"Answer: \boxed{42}", "42", 1.0),
        (r"Answer: \frac12", r"\frac{1}{2}", 1.0),
        (r"Answer: \frac{1}{2}", "0.5", 0.0),  # texts are compared
        ("Answer: 42", "reasoning\n#### 42", 1.0),
        (r"\boxed{42}", "42", 0.0),
        ("Answer: 42" + " " * 400, "42", 0.0),  # beyond the last 300 characters
        ("Answer: 10^\\circ", "10", 1.0),
    ],
)
def test_dapo_math(completion, answer, expected):
    assert dapo_math_match("", completion, answer, {}) == expected


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
        ("{folder}/my_rewards.py:good", {"bogus": 1}, "bogus"),
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
