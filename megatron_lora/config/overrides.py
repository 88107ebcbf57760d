"""Overrides of the command line: `a.b=value`, with Hydra's `+a.b=value`, `++a.b=value` and `~a.b`."""

import re
from difflib import get_close_matches
from typing import Any

from megatron_lora.config.schema import Recipe
from megatron_lora.config.schema_base import Section
from megatron_lora.config.schema_tree import walk_fields
from megatron_lora.config.show import show
from megatron_lora.config.yaml_reader import protect_templates, read_yaml
from megatron_lora.errors import UserError

MANDATORY = "???"
_REPLACES = "_override_"
_OVERRIDE = re.compile(r"^(?:\+{0,2}[A-Za-z_][\w.\-]*\s*=|~)")


def looks_like_override(argument: str) -> bool:
    """Whether an argument is an override rather than a file: `a.b=1`, `++a.b=1`, `~a.b`."""
    return _OVERRIDE.match(argument) is not None


def apply_override(recipe: dict[str, Any], override: str) -> dict[str, Any]:
    """The recipe with one override applied; a mapping given for a section is merged into it. Raises UserError.

    `+` and `++` mean nothing more here: a key that the recipe lacks may always be given, one that nobody knows never.
    `~a.b` sets a key back to its default, if it is not there already; `~a.b=value` only where it has that value.
    """
    if override.startswith("~"):
        return _without(recipe, override)
    path, equals, text = override.lstrip("+").partition("=")
    parts = path.split(".")
    is_path = all(part.strip() == part and part for part in parts) and len(override) - len(override.lstrip("+")) < 3
    if not equals or not is_path:
        raise UserError(f"override {override!r}: wanted dotted.key=value, such as policy.precision=float32")
    return put(recipe, parts, protect_templates(read_yaml(text, f"override {override!r}")), override)


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`over` on top of `base`: sections key by key, everything else replaced. As in NeMo RL, a section that holds
    `_override_: true` replaces the whole section, and `???` leaves what is there."""
    merged = dict(base)
    for key, value in over.items():
        if key == _REPLACES or (value == MANDATORY and key in merged):
            continue
        if isinstance(value, dict):
            below = {} if value.get(_REPLACES) or not isinstance(merged.get(key), dict) else merged[key]
            merged[key] = merge(below, value)
        else:
            merged[key] = value
    return merged


def put(container: Any, parts: list[str], value: Any, override: str) -> Any:
    """A copy of `container` with the value at the path; a number leads into a list that is there."""
    name, *rest = parts
    if isinstance(container, list):
        number = _position(container, name, override)
        item = put(container[number], rest, value, override) if rest else value
        return [*container[:number], item, *container[number + 1 :]]
    if container is None and name.isdecimal():
        raise UserError(f"override {override!r}: there is no list with entries to change; give the whole list")
    section = container if isinstance(container, dict) else {}
    if rest:
        return {**section, name: put(section.get(name), rest, value, override)}
    return merge(section, {name: value})


def _position(items: list[Any], name: str, override: str) -> int:
    if not name.isdecimal() or int(name) >= len(items):
        raise UserError(
            f"override {override!r}: {name} is no place in a list of {len(items)} entries; wanted a number from 0, or "
            "give the whole list"
        )
    return int(name)


def _without(recipe: dict[str, Any], override: str) -> dict[str, Any]:
    path, equals, text = override[1:].partition("=")
    parts = path.split(".")
    holder: Any = recipe
    for part in parts[:-1]:
        holder = holder.get(part) if isinstance(holder, dict) else None
    is_there = isinstance(holder, dict) and parts[-1] in holder
    has_default, default = default_of(path)
    if not is_there and not has_default:
        fields = list(dict(walk_fields(Recipe)))
        near = [] if path in fields else get_close_matches(path, fields, n=1, cutoff=0.8)
        meant = f"; did you mean ~{near[0]}?" if near else ""
        raise UserError(f"override {override!r}: the recipe has no key {path or '(none given)'} to take out{meant}")
    found = holder[parts[-1]] if is_there else default
    if equals and read_yaml(text, f"override {override!r}") != found:
        raise UserError(f"override {override!r}: the recipe has {path}={show(found)}, which is not taken out")
    if not is_there:
        return recipe
    # The default rather than nothing: other keys may refer to it.
    return put(_drop(recipe, parts), parts, default, override) if has_default else _drop(recipe, parts)


def default_of(path: str) -> tuple[bool, Any]:
    """(whether the schema has a default for the key at `path`, that default in plain values)."""
    field = dict(walk_fields(Recipe)).get(path)
    if field is None or field.is_required():
        return False, None
    default = field.get_default(call_default_factory=True)
    return True, default.model_dump() if isinstance(default, Section) else default


def _drop(section: dict[str, Any], parts: list[str]) -> dict[str, Any]:
    name, *rest = parts
    if not rest:
        return {key: value for key, value in section.items() if key != name}
    return {**section, name: _drop(section[name], rest)}
