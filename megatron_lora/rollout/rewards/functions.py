"""The built-in rewards. Each is `(prompt, completion, answer, extra) -> float`."""

import re
from collections.abc import Callable
from decimal import Decimal

Reward = Callable[[str, str, str, dict], float]

GSM8K_MARKER = "####"
_NUMBER = re.compile(r"-?(?:\d[\d,]*(?:\.\d+)?|\.\d+)", re.ASCII)


def exact_match(prompt: str, completion: str, answer: str, extra: dict) -> float:
    """1 where the completion is the answer, but for white space around either."""
    return float(completion.strip() == answer.strip())


def gsm8k_match(prompt: str, completion: str, answer: str, extra: dict) -> float:
    """1 where the number after the completion's last `####` is the answer's (whose own `####` may be missing)."""
    if GSM8K_MARKER not in completion:
        return 0.0
    found, wanted = gsm8k_number(completion), gsm8k_number(answer)
    if wanted is None:
        raise ValueError(f"the reference answer {answer!r} has no number")
    return float(found == wanted)


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
    """A reward of 1 where the completion's final answer equals the reference symbolically (math-verify).

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

    def reward(prompt: str, completion: str, answer: str, extra: dict) -> float:
        wanted = answer.rpartition(GSM8K_MARKER)[2].strip()
        if "\\boxed" not in wanted:
            wanted = f"\\boxed{{{wanted.strip('$')}}}"
        gold = parse(wanted, targets, parsing_timeout=0)
        if not gold:
            raise ValueError(f"the reference answer {answer!r} is no mathematical expression")
        found = parse(completion, targets, parsing_timeout=0)
        return float(verify(gold, found, timeout_seconds=0))

    return reward
