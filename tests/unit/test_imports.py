"""Which room imports which: docs/architecture.md's table of rooms is the rule. Reads the sources only."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "megatron_lora"
ROW = re.compile(r"^\| `([\w/.]+)` \| (.*) \| ?([^|]*)\|$")


def _table() -> dict[str, tuple[set[str], bool]]:
    """Room -> (rooms it may import, whether it must do without megatron)."""
    text = (ROOT / "docs" / "architecture.md").read_text().split("## Rooms")[1].split("\n## ")[0]
    rows = [match for line in text.splitlines() if (match := ROW.match(line))]
    return {
        match[1].rstrip("/"): ({name.strip() for name in match[3].split(",")} - {""}, "(no megatron)" in match[2])
        for match in rows
    }


TABLE = _table()


def _room(path: str) -> str | None:
    """The longest room that holds this path below megatron_lora/; None for errors.py and __init__.py."""
    return max((room for room in TABLE if path == room or path.startswith(f"{room}/")), key=len, default=None)


def _modules(source: str, package: str) -> Iterator[str]:
    """Every module that a source imports, anywhere in it; `from a import b` may mean a.b."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            base = ".".join([*parts[: len(parts) - node.level + 1]] if node.level else [])
            module = ".".join(part for part in (base, node.module) if part)
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def _path_of(module: str) -> str | None:
    """Where a module of ours lies, below megatron_lora/."""
    path = ROOT / Path(*module.split("."))
    for found in (path.with_suffix(".py"), path / "__init__.py"):
        if found.is_file() and found.is_relative_to(PACKAGE):
            return str(found.relative_to(PACKAGE))
    return None


def _forbidden(path: str, source: str) -> set[tuple[str, str]]:
    """(file, room or package) of every import that the table does not allow."""
    room = _room(path)
    if room is None:
        return set()
    allowed, without_megatron = TABLE[room]
    package = ".".join(("megatron_lora", *Path(path).parent.parts))
    result = set()
    for module in _modules(source, package):
        target_path = _path_of(module)
        target = _room(target_path) if target_path is not None else None
        if target not in (None, room, *allowed):
            result.add((path, target))
        if without_megatron and module.split(".")[0] == "megatron":
            result.add((path, "megatron"))
        if module.split(".")[0] in ("conversion", "tools", "tests"):
            result.add((path, module.split(".")[0]))
    return result


def test_every_file_imports_what_the_table_allows():
    files = sorted(PACKAGE.rglob("*.py"))
    assert len(files) > 100
    found = {one for file in files for one in _forbidden(str(file.relative_to(PACKAGE)), file.read_text())}
    assert found == set()


def test_every_folder_of_the_package_has_a_row():
    folders = {str(file.parent.relative_to(PACKAGE)) for file in PACKAGE.rglob("*.py")} - {"."}
    assert {folder for folder in folders if _room(f"{folder}/x.py") is None} == set()
    assert {name for room in TABLE for name in TABLE[room][0]} <= set(TABLE)


@pytest.mark.parametrize(
    ("path", "source", "target"),
    [
        ("conversion/x.py", "from megatron_lora.policy.interface import Policy", "policy"),
        ("conversion/x.py", "def f():\n    import megatron.bridge", "megatron"),
        ("objectives/x.py", "from megatron_lora import config", "config"),
        ("config/x.py", "from ..lora.layout import KINDS", "lora"),
        ("policy/x.py", "from megatron_lora.policy.dtensor.policy import DTensorPolicy", "policy/dtensor"),
        ("policy/dtensor/x.py", "import megatron_lora.policy.megatron.optim", "policy/megatron"),
        ("lora/x.py", "from conversion.command_line import run", "conversion"),
    ],
)
def test_an_import_that_is_not_allowed_is_found(path, source, target):
    assert _forbidden(path, source) == {(path, target)}
