"""What a recipe says about one reward, and how that becomes a callable."""

import importlib
import importlib.util
import pkgutil
import re
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from megatron_lora.errors import UserError
from megatron_lora.rollout.rewards.calling import UserReward, hint
from megatron_lora.rollout.rewards.dapo_math import dapo_math_match
from megatron_lora.rollout.rewards.functions import (
    Reward,
    exact_match,
    format_match,
    gsm8k_match,
    length_penalty,
    load_math_match,
)

KINDS = ("exact", "math", "dapo_math_verify", "gsm8k", "format", "length", "python")
BOUNDED_KINDS = frozenset({"exact", "dapo_math_verify", "gsm8k", "length"})
"""Kinds that take microseconds whatever the text says; they need no worker process and no time limit."""


@dataclass(frozen=True)
class RewardSpec:
    """One entry of `env.reward_functions`, plain data that a worker process can be sent.

    kind: one of KINDS. name: in metrics and messages. weight: factor in the sum. timeout_seconds: of one call.
    pattern (format), max_tokens (length), function and kwargs (python): see the recipe's schema.
    """

    kind: str
    name: str = ""
    weight: float = 1.0
    timeout_seconds: float = 10.0
    pattern: str | None = None
    max_tokens: int | None = None
    function: str | None = None
    kwargs: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_config(cls, entry: Any) -> "RewardSpec":
        """From an object with the same fields, such as the schema's RewardFunctionConfig."""
        values = {name: getattr(entry, name) for name in cls.__dataclass_fields__}
        return cls(**{**values, "name": entry.name or entry.kind, "kwargs": dict(entry.kwargs)})

    def resolved(self) -> "RewardSpec":
        """With a name and with absolute paths, so that it means the same in a process started elsewhere."""
        function = self.function
        if function is not None and function.rpartition(":")[0].endswith(".py"):
            path, _, attribute = function.rpartition(":")
            function = f"{Path(path).absolute()}:{attribute}"
        return replace(self, name=self.name or self.kind, function=function)


def build_reward(spec: RewardSpec) -> Reward:
    """The callable that `spec` names. Raises UserError where there is none."""
    if spec.kind == "format":
        try:
            return format_match(_needed(spec, "pattern"))
        except re.error as error:
            raise UserError(
                f"env.reward_functions: pattern={spec.pattern!r} of reward '{spec.name}' is no regular expression: "
                f"{error}; mend the pattern"
            ) from error
    if spec.kind == "length":
        return length_penalty(_needed(spec, "max_tokens"))
    if spec.kind == "python":
        return import_reward(_needed(spec, "function"), spec.kwargs, spec.timeout_seconds)
    if spec.kind == "math":
        return load_math_match()
    if spec.kind == "dapo_math_verify":
        return dapo_math_match
    if spec.kind == "exact":
        return exact_match
    if spec.kind == "gsm8k":
        return gsm8k_match
    raise UserError(
        f"env.reward_functions: kind={spec.kind!r} is unknown; use one of {', '.join(KINDS)}{hint(spec.kind, KINDS)}"
    )


def import_reward(path: str, kwargs: dict[str, Any], timeout_seconds: float) -> UserReward:
    """A user's function from `package.module:function` or `path/to/file.py:function`, with kwargs bound.

    Raises UserError, with the nearest names, where it cannot be imported or cannot be called as a reward.
    """
    target, _, attribute = path.rpartition(":")
    if not target or not attribute:
        raise UserError(f"reward function {path!r}: want 'package.module:function' or 'path/to/file.py:function'")
    module = _load_file(Path(target), path) if target.endswith(".py") else _load_module(target, path)
    function: Any = getattr(module, attribute, None)
    if not callable(function):
        names = [name for name, value in vars(module).items() if callable(value) and not name.startswith("__")]
        what = "has no function" if function is None else "has something else than a function under"
        raise UserError(f"reward function {path!r}: {target} {what} {attribute!r}{hint(attribute, names)}")
    return UserReward(function, path, kwargs, timeout_seconds)


def _load_file(file: Path, path: str) -> ModuleType:
    if not file.is_file():
        folder = file.parent
        near = [str(folder / entry.name) for entry in folder.glob("*.py")] if folder.is_dir() else []
        raise UserError(f"reward function {path!r}: there is no file {file}{hint(str(file), near)}")
    if str(file.parent.absolute()) not in sys.path:
        sys.path.append(str(file.parent.absolute()))  # modules beside the file
    module_spec = importlib.util.spec_from_file_location(f"user_reward_{file.stem}", file)
    assert module_spec is not None and module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_spec.name] = module
    try:
        module_spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise _failed_import(path, error) from error
    return module


def _load_module(name: str, path: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise _failed_import(path, error) from error  # the module exists, something that it imports does not
        parent, _, last = error.name.rpartition(".")
        folders = sys.modules[parent].__path__ if parent else None
        near = [info.name for info in pkgutil.iter_modules(folders)]
        raise UserError(
            f"reward function {path!r}: there is no module {error.name!r} on the Python path{hint(last, near)}; "
            "install it, start from its folder, or give 'path/to/file.py:function'"
        ) from error
    except (Exception, SystemExit) as error:
        raise _failed_import(path, error) from error


def _failed_import(path: str, error: BaseException) -> UserError:
    return UserError(
        f"reward function {path!r}: importing it failed with {type(error).__name__}: {error}; mend the module"
    )


def _needed(spec: RewardSpec, key: str) -> Any:
    value = getattr(spec, key)
    if value is None:
        raise UserError(f"env.reward_functions: reward '{spec.name}' of kind={spec.kind} needs {key}")
    return value
