"""Applying the table of NeMo RL's keys without effect (`unimplemented.py`) to a recipe."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megatron_lora.config.messages import unknown_key
from megatron_lora.config.schema_base import number_from_text
from megatron_lora.config.show import show
from megatron_lora.config.unimplemented import ANY, KNOWN_PATHS, TABLE, SameAs


@dataclass(frozen=True)
class _Entry:
    accepted: Any
    reason: str


def _entries() -> tuple[dict[str, _Entry], dict[str, _Entry]]:
    """(single keys, whole subtrees) by dotted path."""
    keys: dict[str, _Entry] = {}
    subtrees: dict[str, _Entry] = {}
    for group in TABLE:
        for name, accepted in group.keys.items():
            path = f"{group.section}.{name}" if group.section else name
            target = subtrees if path.endswith(".*") else keys
            target[path.removesuffix(".*")] = _Entry(accepted, group.reason)
    return keys, subtrees


_KEYS, _SUBTREES = _entries()


@dataclass
class TakenOut:
    """left: what remains for the schema. paths: keys accepted without effect. refused: messages for values that are not
    accepted and for unknown keys in sections that only the table has."""

    left: dict[str, Any]
    paths: list[str]
    refused: list[str]


def take_out(resolved: dict[str, Any], schema_paths: set[str]) -> TakenOut:
    """Split the table's keys off a resolved recipe.

    resolved: the recipe as nested dicts. schema_paths: dotted paths that the schema knows.
    """
    found = TakenOut({}, [], [])
    found.left = _take_out(resolved, "", resolved, schema_paths, found)
    return found


def _take_out(
    section: dict[str, Any], prefix: str, root: dict[str, Any], schema_paths: set[str], found: TakenOut
) -> dict[str, Any]:
    left: dict[str, Any] = {}
    for name, value in section.items():
        path = f"{prefix}{name}"
        below = [known for known in KNOWN_PATHS if known.startswith(f"{path}.")]
        if path in _SUBTREES:
            found.paths.append(path)
        elif path in _KEYS and not (isinstance(value, dict) and value and below):
            found.refused += _refuse_value(path, value, root)
            found.paths.append(path)
        elif below and isinstance(value, dict):
            inner = _take_out(value, f"{path}.", root, schema_paths, found)
            if isinstance(inner.get("also"), list):  # further data sets have the keys of the one they stand beside
                inner["also"] = [
                    _take_out(item, f"{path}.", root, schema_paths, found) if isinstance(item, dict) else item
                    for item in inner["also"]
                ]
            if path in schema_paths:
                left[name] = inner
            else:
                siblings = sorted({known.removeprefix(f"{path}.").split(".")[0] for known in below})
                found.refused += [_refuse_unlisted(path, key, inner[key], siblings, root) for key in inner]
        elif below and value is None and path not in schema_paths:
            found.paths.append(path)
        else:
            left[name] = value
    return left


def _refuse_unlisted(path: str, name: str, value: Any, siblings: list[str], root: dict[str, Any]) -> str:
    """A key below a section of the table that the table does not list."""
    if path in _KEYS:
        return f"{path}.{name}={show(value)} has no effect here: {_KEYS[path].reason}"
    return unknown_key(f"{path}.{name}", siblings, root)


def _refuse_value(path: str, value: Any, root: dict[str, Any]) -> list[str]:
    entry = _KEYS[path]
    if entry.accepted is ANY:
        return []
    wanted = [_value_at(root, item.path) if isinstance(item, SameAs) else item for item in entry.accepted]
    if any(_equal(value, item) for item in wanted):
        return []
    return [
        f"{path}={show(value)} is not implemented here (NeMo RL's default, {' or '.join(map(show, wanted))}, is "
        f"accepted): {entry.reason}"
    ]


def _equal(value: Any, wanted: Any) -> bool:
    """Equality that keeps `1` and `true` apart and takes numbers written as text."""
    if isinstance(wanted, bool) or isinstance(value, bool):
        return value is wanted
    if isinstance(wanted, int | float):
        return number_from_text(value) == wanted
    return value == wanted


def _value_at(root: dict[str, Any], path: str) -> Any:
    value: Any = root
    for part in path.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def notice(taken: list[str]) -> str:
    """One line that lists what was accepted without effect, names of one section in braces."""
    by_section: dict[str, list[str]] = {}
    for path in dict.fromkeys(taken):
        parent, _, name = path.rpartition(".")
        by_section.setdefault(parent, []).append(name)
    return "NeMo RL keys accepted without effect: " + ", ".join(_braced(by_section))


def _braced(by_section: dict[str, list[str]]) -> Iterator[str]:
    for section, names in by_section.items():
        joined = names[0] if len(names) == 1 else "{" + ", ".join(names) + "}"
        yield f"{section}.{joined}" if section else joined
