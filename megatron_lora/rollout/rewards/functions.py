"""The built-in rewards. Each is `(prompt, completion, answer, extra) -> float`, or None where it abstains."""

import re
from collections.abc import Callable
from decimal import Decimal

Reward = Callable[[str, str, str, dict], float | None]

GSM8K_MARKER = "####"
THINK, END_OF_THINKING = "<think>", "</think>"
_NUMBER = re.compile(r"-?(?:\d[\d,]*(?:\.\d+)?|\.\d+)", re.ASCII)


def exact_match(prompt: str, completion: str, answer: str, extra: dict) -> float:
    """1 where the completion is the answer, but for white space around either; of a GSM8K solution, whose last line is
    `#### number`, the number is enough."""
    given, _, number = answer.strip().rpartition("\n")[2].partition(GSM8K_MARKER)
    wanted = {answer.strip()}
    if not given and _NUMBER.fullmatch(number.strip()):
        wanted |= {number.strip(), number.strip().replace(",", "")}
    return float(completion.strip() in wanted)


def gsm8k_match(prompt: str, completion: str, answer: str, extra: dict) -> float | None:
    """1 where the number after the completion's last `####` is the answer's (whose own `####` may be missing). Abstains
    where the answer has no number."""
    wanted = gsm8k_number(answer)
    if wanted is None:
        return None
    final = after_thinking(prompt, completion)
    if final is None or GSM8K_MARKER not in final:
        return 0.0
    return float(gsm8k_number(final) == wanted)


def after_thinking(prompt: str, completion: str) -> str | None:
    """What stands behind the completion's last `</think>`; None where it was cut off within its thoughts, also
    where the prompt's template opened them."""
    _, end, final = completion.rpartition(END_OF_THINKING)
    if THINK in final or (not end and prompt.rstrip().endswith(THINK)):
        return None
    return final


def gsm8k_number(text: str) -> Decimal | None:
    """The first number after the last `####` of `text`, or in all of it, without separators of thousands."""
    match = _NUMBER.search(text.rpartition(GSM8K_MARKER)[2])
    return Decimal(match.group().replace(",", "")) if match else None


def format_match(pattern: str) -> Reward:
    """A reward of 1 where the regular expression matches the whole completion (`.` matches line ends too).

    Raises re.error for a bad pattern.
    """
    compiled = re.compile(pattern, re.DOTALL)

    def reward(prompt: str, completion: str, answer: str, extra: dict) -> float:
        return float(compiled.fullmatch(completion) is not None)

    return reward


def length_penalty(max_tokens: int) -> Reward:
    """A reward of 0 up to max_tokens completion tokens, then falling linearly to -1 at twice as many, and -1 beyond.

    Reads extra["num_tokens"], the completion's length in tokens.
    """

    def reward(prompt: str, completion: str, answer: str, extra: dict) -> float:
        exceeded = extra["num_tokens"] - max_tokens
        return -min(max(exceeded / max_tokens, 0.0), 1.0)

    return reward


def load_math_match() -> Reward:
    """A reward of 1 where the completion's final answer equals the reference symbolically (math-verify): what is boxed,
    else a formula or the last number; 0 where the completion ends within its thoughts. Abstains where the reference is
    no mathematical expression.

    The library's own time limits are alarm signals, which work only in a process's main thread; they are turned off.
    A hard expression can take for ever: run this through `RewardRunner`, which kills it from outside.
    """
    import logging

    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its time limits are off
    targets = [LatexExtractionConfig(), ExprExtractionConfig()]
    # The first use builds the parsers, which may take seconds: now, so that no sample's time limit pays for it.
    first, second = (parse(text, targets, parsing_timeout=0) for text in (r"\boxed{1}", "1"))
    verify(first, second, timeout_seconds=0)

    def reward(prompt: str, completion: str, answer: str, extra: dict) -> float | None:
        wanted = answer.rpartition(GSM8K_MARKER)[2].strip()
        if "\\boxed" not in wanted:
            wanted = f"\\boxed{{{wanted.strip('$')}}}"
        gold = parse(wanted, targets, parsing_timeout=0)
        if not gold:
            return None
        final = after_thinking(prompt, completion)
        if final is None:
            return 0.0
        found = parse(final, targets, parsing_timeout=0)
        right = verify(gold, found, timeout_seconds=0)
        if not right and "\\boxed" not in final:
            # A plain number further on hides the formula: "She pays $42$ for 3 apples."
            right = verify(gold, parse(final, targets[:1], parsing_timeout=0), timeout_seconds=0)
        return float(right)

    return reward
