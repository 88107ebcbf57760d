"""A calculator as an environment (docs/environments.md): the model writes a sum, the tool writes what it comes to."""

import re

CALL = re.compile(r"(?<!\d)(\d{1,9})\s*([-+*])\s*(\d{1,9})\s*=?\s*$")


class Calculator:
    """A turn that ends with `47+38` (or `47 + 38 =`) is a call; the result stands behind `opening`. Any other turn is
    the answer."""

    def __init__(self, opening: str = "="):
        self.opening = opening

    def reset(self, prompt: str, answer: str, extra: dict) -> None:
        self.num_calls = 0

    def step(self, text: str) -> str | None:
        call = CALL.search(text)
        if call is None:
            return None
        self.num_calls += 1
        left, right = int(call[1]), int(call[3])
        value = {"+": left + right, "-": left - right, "*": left * right}[call[2]]
        return f"{self.opening}{value}"
