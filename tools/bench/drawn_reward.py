"""A reward for random models; apart from the tools, since every reward worker imports it."""

import random


def drawn_reward(prompt: str, completion: str, answer: str, extra: dict) -> float:
    """A reward that differs between a group's answers, whatever they are."""
    return random.random()
