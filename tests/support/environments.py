"""Environments that the tests' recipes name."""

import os
import time


class Echo:
    """Answers with what was written and how often it was asked, `turns` times."""

    def __init__(self, turns: int = 99):
        self.turns = turns

    def reset(self, prompt: str, answer: str, extra: dict) -> None:
        self.prompt, self.asked = prompt, 0

    def step(self, text: str) -> str | None:
        self.asked += 1
        return f"[{self.prompt}{text}{self.asked}]" if self.asked <= self.turns else None


class Troubled(Echo):
    """Does what the text says."""

    def step(self, text: str) -> str | None:
        if text == "raise":
            raise KeyError("no such tool")
        if text == "hang":
            time.sleep(60)
        if text == "end":
            os._exit(3)
        if text == "flood":
            print("x" * 1_000_000)
            return "7" * 5_000_000
        if text == "number":
            return 7  # pyright: ignore[reportReturnType]
        if text == "large":
            self.kept = bytes(1 << 25)
        if text == "unpicklable":
            self.kept = lambda: 0
        return super().step(text)


class NoStep:
    def reset(self, prompt: str, answer: str, extra: dict) -> None:
        pass


class Letters(Echo):
    """Answers every turn with three tokens."""

    def step(self, text: str) -> str | None:
        return "abc"
