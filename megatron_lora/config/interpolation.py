"""`${a.b}` in a recipe: resolving it, and saying which reference leads nowhere."""

import re
from collections.abc import Iterator, Sequence
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megatron_lora.config.overrides import MANDATORY
from megatron_lora.errors import UserError

_REFERENCE = re.compile(r"\$\{\s*(\.*[A-Za-z_][\w.\-]*)\s*\}")  # not ${mul:...}, whose arguments are matched alone
Path = tuple[str, ...]


def resolve(recipe: dict[str, Any], source: str) -> dict[str, Any]:
    """The recipe with every interpolation replaced by its value. source: what to call it in a message. Raises
    UserError."""
    _register_resolvers()
    for key, reference, target in references(recipe):
        _check_reference(recipe, key, reference, target, source)
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


def _check_reference(recipe: dict[str, Any], key: Path, reference: str, target: Path, source: str) -> None:
    """Refuse a reference into a section that is null; what is missing altogether is OmegaConf's to say."""
    value: Any = recipe
    for number, part in enumerate(target):
        if isinstance(value, dict) and part in value:
            value = value[part]
        elif value is None and number:
            section = ".".join(target[:number])
            raise UserError(
                f"{source}: {section} is null, but {'.'.join(key)} is ${{{reference}}}, which lies in it; give "
                f"{section} a value, or set {'.'.join(key)}"
            )
        else:
            return


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
    resolvers = {
        "add": lambda *numbers: sum(numbers),
        "mul": lambda *factors: _product(factors),
        "div": lambda number, divisor: number // divisor if number % divisor == 0 else number / divisor,
        "max": lambda *numbers: max(numbers),
    }
    for name, function in resolvers.items():
        OmegaConf.register_new_resolver(name, function, replace=True)


def _product(factors: Sequence[int | float]) -> int | float:
    result: int | float = 1
    for factor in factors:
        result *= factor
    return result


def _message(error: OmegaConfBaseException) -> str:
    """OmegaConf's first line, with the key at fault."""
    first = str(error).strip().splitlines()[0]
    variable = re.search(r"Environment variable '(.*)' not found", first)
    if variable is not None:
        first = f"the environment variable {variable[1]} is not set; export it, or give the key a value"
    key = getattr(error, "full_key", None)
    return f"{key}: {first}" if key else first
