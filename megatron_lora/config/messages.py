"""Messages for what is wrong with a recipe: the dotted path, what was got, what was wanted."""

import difflib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from megatron_lora.config.interpolation import referred
from megatron_lora.config.other_names import algorithm_of, elsewhere, is_read, key_here
from megatron_lora.config.schema import Recipe
from megatron_lora.config.schema_tree import section_at, walk_fields
from megatron_lora.config.show import show
from megatron_lora.config.unimplemented import KNOWN_PATHS
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
# Section -> the key in it that a text in the section's place probably is.
_NAMED_BY = {
    "checkpointing": "checkpoint_dir",
    "data.train": "data_path",
    "data.validation": "data_path",
    "policy": "model_name",
    "policy.tokenizer": "name",
    "policy.generation": "backend",
}
MOST_LISTED = 20


def describe_errors(error: ValidationError, recipe: dict[str, Any], written: dict[str, Any]) -> list[str]:
    """One message for each mistake that pydantic found. recipe: what was checked; written: the same with its
    interpolations, so that a value which reached several keys is told of once, at the key where it stands."""
    found: dict[tuple[str, ...], ErrorDetails] = {}
    details = error.errors()
    places = [tuple(map(str, item["loc"])) for item in details]
    for item, place in zip(details, places, strict=True):
        source = referred(written, item["loc"])
        if source is None or not any(place[: len(source)] == source for place in places):
            found.setdefault(place, item)
    told: list[str] = []
    for item in found.values():
        told += _of_other_projects(item, recipe) or [_describe(item, recipe, written)]
    return list(dict.fromkeys(told))


def _of_other_projects(details: ErrorDetails, recipe: dict[str, Any]) -> list[str]:
    """Of an unknown section (verl's `actor_rollout_ref`) the keys in it whose names here are known."""
    if details["type"] != "extra_forbidden" or not isinstance(details["input"], dict):
        return []
    leaves = [f"{dotted(details['loc'])}.{name}" for name in _leaves(details["input"])]
    return [unknown_key(leaf, (), recipe) for leaf in leaves if elsewhere(leaf) or key_here(leaf, recipe)]


def _leaves(section: dict[str, Any]) -> Iterator[str]:
    for name, value in section.items():
        if isinstance(value, dict) and value:
            yield from (f"{name}.{inner}" for inner in _leaves(value))
        else:
            yield str(name)


def one_message(mistakes: Sequence[str]) -> UserError:
    """Everything that is wrong with a recipe, told at once."""
    if len(mistakes) == 1:
        return UserError(mistakes[0])
    return UserError("the recipe has several mistakes:\n  " + "\n  ".join(mistakes))


def unknown_key(path: str, siblings: Sequence[str], recipe: dict[str, Any]) -> str:
    """The message for a key that nobody knows, with the one that was probably meant.

    siblings: names valid in the same section. recipe: unchecked; keys of algorithms that it does not run are not
    suggested.
    """
    parent, _, name = path.rpartition(".")
    where = f"{parent}." if parent else ""
    close = difflib.get_close_matches(name, siblings, n=1, cutoff=0.8)
    if close:
        return f"unknown key {path}; did you mean {where}{close[0]}?"
    place = elsewhere(path)
    if place is not None:
        return f"unknown key {path}: {place}"
    if name == "enabled" and (switch := _switch_of(parent)) is not None:
        return f"unknown key {path}; did you mean {switch}?"
    here = key_here(path, recipe)
    if here is not None and here != path:
        sibling = here.rpartition(".")[2]
        return f"unknown key {path}; did you mean {where + sibling if sibling in siblings else here}?"
    known = [key for key in (*(key for key, _ in walk_fields(Recipe)), *KNOWN_PATHS) if _is_read(key, recipe)]
    same_name = [key for key in known if key.rpartition(".")[2] == name]
    near = difflib.get_close_matches(path, same_name, n=1, cutoff=0.0)
    near = near or [where + sibling for sibling in difflib.get_close_matches(name, siblings, n=1, cutoff=0.6)]
    if near:
        return f"unknown key {path}; did you mean {near[0]}?"
    section = parent or "the recipe"
    if len(siblings) > MOST_LISTED:
        return f"unknown key {path}; {section} has no such key and none like it (docs/configuration.md has its keys)"
    return f"unknown key {path}; {section} has the keys {', '.join(sorted(siblings))}"


def _is_read(key: str, recipe: dict[str, Any]) -> bool:
    """Whether a run of the recipe's algorithm reads the key; all keys where the recipe does not say which it runs."""
    algorithm = algorithm_of(recipe)
    return algorithm is None or is_read(key, algorithm)


def _switch_of(section: str) -> str | None:
    """The key that turns a section on; None where none does."""
    known = {path for path, _ in walk_fields(Recipe)}
    return next((key for key in (f"{section}.enabled", f"{section}_enabled") if key in known), None)


def _describe(details: ErrorDetails, recipe: dict[str, Any], written: dict[str, Any]) -> str:
    location, kind = details["loc"], details["type"]
    path = dotted(location)
    if kind in ("extra_forbidden", "invalid_key"):
        if isinstance(location[-1], str) and "." in location[-1]:
            first, *rest = location[-1].split(".")
            inner = "".join(f"{{{name}: " for name in rest) + show(details["input"]) + "}" * len(rest)
            return f"the key {path!r} has dots in its name, which only overrides take; in a file write {first}: {inner}"
        section = section_at(Recipe, location[:-1])
        parent = dotted(location[:-1])
        siblings = list(section.model_fields) if section is not None else []
        prefix = f"{parent}." if parent else ""
        siblings += [known.removeprefix(prefix).split(".")[0] for known in KNOWN_PATHS if known.startswith(prefix)]
        return unknown_key(path, sorted(set(siblings)), recipe)
    if kind == "missing":
        return f"the recipe lacks {path}, which has no default; add it"
    if kind == "value_error" and isinstance(details["input"], dict | list):
        return f"{path}: {_own_message(details)}" if path else _own_message(details)
    meant = _meant_inside(path, kind, details["input"])
    if meant is not None:
        return f"{path}={show(details['input'])}: did you mean {meant}?"
    source = referred(written, location)
    from_where = f" (from {dotted(source)})" if source is not None else ""
    return f"{path}={show(details['input'])}{from_where}: {_wanted(details)}"


def _meant_inside(section: str, kind: str, value: Any) -> str | None:
    """What probably was to be set where a value stands in a section's place: its switch, or the key that names it."""
    if isinstance(value, bool) and _switch_of(section) is not None:
        return f"{_switch_of(section)}={show(value)}"
    if isinstance(value, str) and kind.startswith("model") and section in _NAMED_BY:
        return f"{section}.{_NAMED_BY[section]}={value}"
    return None


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
            unquoted = start == "string" and isinstance(details["input"], bool | int | float)
            return f"wanted {words}{_example(details)}" + (
                "; a text that reads as another value stands in quotes" if unquoted else ""
            )
    return details["msg"][:1].lower() + details["msg"][1:]


def _example(details: ErrorDetails) -> str:
    """The entry that was probably meant where a text stands in its place, or one entry in a list's: `exact` for
    `{kind: exact}`."""
    kind, location, value = details["type"], details["loc"], details["input"]
    section = section_at(Recipe, location) if kind.startswith("list") or isinstance(location[-1], int) else None
    required = [name for name, field in section.model_fields.items() if field.is_required()] if section else []
    if isinstance(value, str) and required:
        entry = f"{{{required[0]}: {value}}}"
    elif isinstance(value, dict) and required and required[0] in value:
        entry = "{" + ", ".join(f"{name}: {show(item)}" for name, item in value.items()) + "}"
    else:
        return ""
    return f": [{entry}]" if kind.startswith("list") else f": {entry}"


def _own_message(details: ErrorDetails) -> str:
    return details["msg"].removeprefix("Value error, ")


def dotted(location: Iterable[str | int]) -> str:
    """`("policy", "scheduler", 0, "name")` -> `policy.scheduler.0.name`."""
    return ".".join(str(part) for part in location)
