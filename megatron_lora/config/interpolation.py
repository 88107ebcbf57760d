"""`${a.b}` in a recipe: resolving it, and saying which reference leads nowhere."""

import difflib
import math
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import GrammarParseError, OmegaConfBaseException

from megatron_lora.config.overrides import MANDATORY, default_of, put
from megatron_lora.config.schema import Recipe
from megatron_lora.config.schema_tree import walk_fields
from megatron_lora.config.show import show
from megatron_lora.errors import UserError

_REFERENCE = re.compile(r"\$\{\s*(\.*[A-Za-z_][\w.\-]*)\s*\}")  # not ${mul:...}, whose arguments are matched alone
Path = tuple[str, ...]


def resolve(recipe: dict[str, Any], source: str) -> dict[str, Any]:
    """The recipe with every interpolation replaced by its value. source: what to call it in a message. Raises
    UserError."""
    _register_resolvers()
    for key, reference, target in list(references(recipe)):
        recipe = _with_target(recipe, key, reference, target, source)
    try:
        resolved = OmegaConf.to_container(OmegaConf.create(recipe), resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(f"{source}: {_message(error)}") from error
    assert isinstance(resolved, dict)
    missing = [".".join(path) for path in _mandatory(resolved)]
    if missing:
        raise UserError(f"{source}: {', '.join(missing)} is ??? and has to be set: {missing[0]}=VALUE")
    return {str(key): value for key, value in resolved.items()}


def _mandatory(value: Any, here: Path = ()) -> Iterator[Path]:
    if value == MANDATORY:
        yield here
    elif isinstance(value, dict | list):
        for name, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _mandatory(item, (*here, str(name)))


def references(value: Any, here: Path = ()) -> Iterator[tuple[Path, str, Path]]:
    """(key, reference as written, the path that it leads to) of every `${a.b}` below `value`."""
    if isinstance(value, dict):
        for name, item in value.items():
            yield from references(item, (*here, str(name)))
    elif isinstance(value, list):
        for number, item in enumerate(value):
            yield from references(item, (*here, str(number)))
    elif isinstance(value, str):
        for match in _REFERENCE.finditer(value):
            if not _is_escaped(value, match.start()):
                yield here, match.group(1), _target(here, match.group(1))


def _is_escaped(text: str, position: int) -> bool:
    before = text[:position]
    return (len(before) - len(before.rstrip("\\"))) % 2 == 1


def _target(here: Path, reference: str) -> Path:
    """`.b` is a sibling, `..b` one of the section around it."""
    dots = len(reference) - len(reference.lstrip("."))
    names = tuple(reference.lstrip(".").split("."))
    return (*here[: len(here) - dots], *names) if dots else names


def _with_target(recipe: dict[str, Any], key: Path, reference: str, target: Path, source: str) -> dict[str, Any]:
    """The recipe with what a reference leads to: a key that it does not have is at its default.

    Raises UserError for a reference into what is no section, and for one that leads nowhere.
    """
    value: Any = recipe
    for number, part in enumerate(target):
        if isinstance(value, dict) and part in value:
            value = value[part]
            continue
        if isinstance(value, list) and part.isdecimal() and int(part) < len(value):
            value = value[int(part)]
            continue
        section, written = ".".join(target[:number]), f"{'.'.join(key)} is ${{{reference}}}"
        if not isinstance(value, dict | list) and not (isinstance(value, str) and "${" in value):
            raise UserError(
                f"{source}: {section} is {show(value)}, but {written}, which lies in it; give {section} a "
                f"{'value' if value is None else 'section (a mapping of keys to values)'}, or set {'.'.join(key)}"
            )
        path = ".".join(target)
        has_default, default = default_of(path)
        # Not the section of another algorithm, which would be a second one: those are null by default.
        if has_default and (number or default_of(target[0])[1] is not None):
            return put(recipe, list(target), default, "")
        if not isinstance(value, str):
            raise UserError(f"{source}: {written}, and the recipe has no key {path}{_meant(recipe, target)}")
        break
    return recipe


def _meant(recipe: dict[str, Any], target: Path) -> str:
    known = [path for path, _ in walk_fields(Recipe) if recipe.get(path.partition(".")[0]) is not None]
    near = difflib.get_close_matches(".".join(target), known, n=1, cutoff=0.8)
    return f"; did you mean ${{{near[0]}}}?" if near else "; give it a value there, or name another key"


def referred(recipe: dict[str, Any], location: Sequence[str | int]) -> Path | None:
    """Where the value at `location` was written: the target of the interpolation that it, or a section around it, is;
    None where it stands there itself."""
    parts = [str(part) for part in location]
    value: Any = recipe
    for number, part in enumerate(parts):
        if isinstance(value, list) and part.isdecimal() and int(part) < len(value):
            value = value[int(part)]
        elif isinstance(value, dict):
            value = value.get(part)
        else:
            return None
        match = _REFERENCE.fullmatch(value.strip()) if isinstance(value, str) else None
        if match is not None:
            target = (*_target(tuple(parts[: number + 1]), match.group(1)), *parts[number + 1 :])
            return referred(recipe, target) or target
    return None


def _register_resolvers() -> None:
    for name, function in _RESOLVERS.items():
        OmegaConf.register_new_resolver(name, partial(_of_numbers, name, function), replace=True)


def _of_numbers(name: str, function: Callable[..., int | float], *numbers: Any) -> int | float:
    if not numbers or not all(isinstance(number, int | float) and not isinstance(number, bool) for number in numbers):
        raise ValueError(f"${{{name}:...}} takes numbers, and has {', '.join(map(show, numbers)) or 'none'}")
    return function(*numbers)


def _divide(number: float, divisor: float = 1) -> int | float:
    if divisor == 0:
        raise ValueError(f"${{div:{number},0}} divides by 0")
    return number // divisor if number % divisor == 0 else number / divisor


_RESOLVERS: dict[str, Callable[..., int | float]] = {
    "add": lambda *numbers: sum(numbers),
    "mul": lambda *factors: math.prod(factors),
    "div": _divide,
    "max": lambda *numbers: max(numbers),
}


def _message(error: OmegaConfBaseException) -> str:
    """OmegaConf's first line, with the key at fault."""
    first = str(error).strip().splitlines()[0].removeprefix("ValueError raised while resolving interpolation: ")
    resolver = re.search(r"Unsupported interpolation type (.*)", first)
    if resolver is not None:
        first = f"${{{resolver[1]}:...}} is not known; known are {', '.join(_RESOLVERS)} and oc.env"
    if isinstance(error, GrammarParseError):
        first = f"not an interpolation ({first}); wanted ${{section.key}}, and \\${{ for these characters themselves"
    variable = re.search(r"Environment variable '(.*)' not found", first)
    if variable is not None:
        first = f"the environment variable {variable[1]} is not set; export it, or give the key a value"
    key = getattr(error, "full_key", None)
    return f"{key}: {first}" if key else first
