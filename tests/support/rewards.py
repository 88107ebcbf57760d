"""Rewards that the tests' recipes name."""

import os
import signal
import zlib
from pathlib import Path


def digit_share(prompt: str, completion: str, answer: str, extra: dict) -> float:
    """The share of digits among an answer's characters: what a random model learns in a few steps."""
    return sum(character.isdigit() for character in completion) / max(1, len(completion))


def prompt_number(prompt: str) -> float:
    """Tells prompts apart, whatever is answered: its mean over a step says which prompts the step had."""
    return zlib.crc32(prompt.encode()) / (1 << 32)


def ascii_share_of_final_turn(final_turn: str, num_turns: int) -> float:
    """Of an answer of several turns: what stands before is the environment's, or a call."""
    assert num_turns > 0
    return sum(map(str.isascii, final_turn)) / max(1, len(final_turn))


def letters_where_judged(completion: str, judged: bool) -> float:
    """Another number for each text in rows whose column says so, equal for all answers elsewhere."""
    return sum(map(ord, completion)) / 1000 if judged else 1.0


def always_fails(completion: str) -> float:
    raise KeyError("no such judge")


def always_one(prompt: str, completion: str, answer: str, extra: dict) -> float:
    return 1.0


def digit_share_and_signal(prompt: str, completion: str, answer: str, extra: dict) -> float:
    """As `digit_share`; from its 40th call on it asks the trainer to stop, once, as a scheduler would. Workers call it
    side by side: calls are counted in a file, and the signal is sent by who makes another."""
    calls = Path(os.environ["REWARD_CALLS"])
    with calls.open("a") as stream:
        stream.write(".")
    if calls.stat().st_size >= 40:
        try:
            calls.with_suffix(".signalled").touch(exist_ok=False)
        except FileExistsError:
            return digit_share(prompt, completion, answer, extra)
        os.kill(os.getppid(), signal.SIGTERM)
    return digit_share(prompt, completion, answer, extra)
