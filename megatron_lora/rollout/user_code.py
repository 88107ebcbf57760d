"""Importing what a recipe names by `package.module:name` or `path/to/file.py:name`."""

import difflib
import importlib
import importlib.util
import pkgutil
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

from megatron_lora.errors import UserError


def import_object(path: str, kind: str) -> Any:
    """The function or class of that name. kind: what it is to be, in messages. Raises UserError, with the nearest
    names, where it cannot be imported."""
    what, noun = f"{kind} {path!r}", kind.split()[-1]
    target, _, attribute = path.rpartition(":")
    if not target or not attribute:
        raise UserError(f"{what}: want 'package.module:{noun}' or 'path/to/file.py:{noun}'")
    module = _load_file(Path(target), what) if target.endswith(".py") else _load_module(target, what)
    found: Any = getattr(module, attribute, None)
    if not callable(found):
        names = [name for name, value in vars(module).items() if callable(value) and not name.startswith("__")]
        problem = f"has no {noun}" if found is None else f"has something else than a {noun} under"
        raise UserError(f"{what}: {target} {problem} {attribute!r}{hint(attribute, names)}")
    return found


def absolute_path(path: str) -> str:
    """The same name for a process that starts in another folder."""
    target, _, attribute = path.rpartition(":")
    return f"{Path(target).absolute()}:{attribute}" if target.endswith(".py") else path


def hint(name: str, known: Iterable[str]) -> str:
    """ "; did you mean ...?" where a known name is near."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _load_file(file: Path, what: str) -> ModuleType:
    if not file.is_file():
        folder = file.parent
        near = [str(folder / entry.name) for entry in folder.glob("*.py")] if folder.is_dir() else []
        raise UserError(f"{what}: there is no file {file}{hint(str(file), near)}")
    if str(file.parent.absolute()) not in sys.path:
        sys.path.append(str(file.parent.absolute()))  # modules beside the file
    module_spec = importlib.util.spec_from_file_location(f"user_reward_{file.stem}", file)
    assert module_spec is not None and module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_spec.name] = module
    try:
        module_spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise _failed_import(what, error) from error
    return module


def _load_module(name: str, what: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise _failed_import(what, error) from error  # the module exists, something that it imports does not
        parent, _, last = error.name.rpartition(".")
        folders = sys.modules[parent].__path__ if parent else None
        near = [info.name for info in pkgutil.iter_modules(folders)]
        raise UserError(
            f"{what}: there is no module {error.name!r} on the Python path{hint(last, near)}; "
            "install it, start from its folder, or give 'path/to/file.py:function'"
        ) from error
    except (Exception, SystemExit) as error:
        raise _failed_import(what, error) from error


def _failed_import(what: str, error: BaseException) -> UserError:
    return UserError(f"{what}: importing it failed with {type(error).__name__}: {error}; mend the module")
