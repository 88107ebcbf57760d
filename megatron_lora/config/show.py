"""Values in messages."""

from typing import Any


def show(value: Any) -> str:
    """A value as one would type it in YAML, shortened."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
