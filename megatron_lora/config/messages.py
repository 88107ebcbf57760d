"""Messages for what is wrong with a recipe: the dotted path, what was got, what was wanted."""

import difflib
from collections.abc import Iterable, Sequence
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from megatron_lora.config.schema import Recipe
from megatron_lora.config.schema_tree import section_at, walk_fields
from megatron_lora.errors import UserError

_WANTED = {
    "bool": "true or false",
    "int": "an integer",
    "float": "a number",
    "string": "text",
    "list": "a list",
    "dict": "a mapping of keys to values",
    "model": "a section (a mapping of keys to values)",
    "finite_number": "a finite number",
}
_BOUNDS = {
    "greater_than": ("gt", "above"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "below"),
    "less_than_equal": ("le", "at most"),
}
# Other projects' words for keys of the recipe.
_ALIASES = {"r": "dim", "rank": "dim", "learning_rate": "lr"}


def recipe_error(error: ValidationError, known_without_effect: Iterable[str]) -> UserError:
    """One message for everything pydantic found wrong."""
    lines = [_describe(details, known_without_effect) for details in error.errors()]
    if len(lines) == 1:
        return UserError(lines[0])
    return UserError("the recipe has several mistakes:\n  " + "\n  ".join(lines))


def unknown_key(path: str, siblings: Sequence[str], known_without_effect: Iterable[str] = ()) -> str:
    """The message for a key that nobody knows, with the nearest valid one.

    siblings: names valid in the same section.
    """
    parent, _, name = path.rpartition(".")
    where = f"{parent}." if parent else ""
    everywhere = [known for known, _ in walk_fields(Recipe)] + list(known_without_effect)
    same_name = [known for known in everywhere if known.rpartition(".")[2] == name]
    near = difflib.get_close_matches(_ALIASES.get(name, name), siblings, n=1, cutoff=0.8)
    if near:
        return f"unknown key {path}; did you mean {where}{near[0]}?"
    near = difflib.get_close_matches(path, same_name, n=1, cutoff=0.0)
    near = near or [where + sibling for sibling in difflib.get_close_matches(name, siblings, n=1, cutoff=0.6)]
    if near:
        return f"unknown key {path}; did you mean {near[0]}?"
    return f"unknown key {path}; {parent or 'the recipe'} has the keys {', '.join(sorted(siblings))}"


def _describe(details: ErrorDetails, known_without_effect: Iterable[str]) -> str:
    location, kind = details["loc"], details["type"]
    path = dotted(location)
    if kind == "extra_forbidden":
        section = section_at(Recipe, location[:-1])
        parent = dotted(location[:-1])
        siblings = list(section.model_fields) if section is not None else []
        prefix = f"{parent}." if parent else ""
        siblings += [
            known.removeprefix(prefix).split(".")[0] for known in known_without_effect if known.startswith(prefix)
        ]
        return unknown_key(path, sorted(set(siblings)), known_without_effect)
    if kind == "missing":
        return f"the recipe lacks {path}, which has no default; add it"
    if kind == "value_error" and isinstance(details["input"], dict | list):
        return f"{path}: {_own_message(details)}" if path else _own_message(details)
    return f"{path}={show(details['input'])}: {_wanted(details)}"


def _wanted(details: ErrorDetails) -> str:
    kind, context = details["type"], details.get("ctx", {})
    if kind == "value_error":
        return _own_message(details)
    if kind == "literal_error":
        return f"wanted {context['expected']}"
    if kind in _BOUNDS:
        bound, words = _BOUNDS[kind]
        return f"wanted a number {words} {context[bound]}"
    for start, words in _WANTED.items():
        if kind.startswith(start):
            return f"wanted {words}"
    return details["msg"][:1].lower() + details["msg"][1:]


def _own_message(details: ErrorDetails) -> str:
    return details["msg"].removeprefix("Value error, ")


def dotted(location: Iterable[str | int]) -> str:
    """`("policy", "scheduler", 0, "name")` -> `policy.scheduler.0.name`."""
    return ".".join(str(part) for part in location)


def show(value: Any) -> str:
    """A value as one would type it in YAML, shortened."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
