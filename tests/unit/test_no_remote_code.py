"""Code that lies in a model's folder is never run: every loader of transformers that could ask for it is told so."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
METHODS = ("from_pretrained", "from_config")


def _loaders() -> Iterator[tuple[str, ast.Call]]:
    for folder in ("megatron_lora", "conversion", "tools"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in METHODS:
                    owner = node.func.value
                    if isinstance(owner, ast.Name) and owner.id.startswith("Auto") and owner.id != "AutoBridge":
                        yield f"{path.relative_to(ROOT)}:{node.lineno} {owner.id}.{node.func.attr}", node


def test_every_loader_says_so() -> None:
    loaders = list(_loaders())
    assert len(loaders) >= 5
    silent = [
        where
        for where, call in loaders
        if not any(
            keyword.arg == "trust_remote_code" and getattr(keyword.value, "value", True) is False
            for keyword in call.keywords
        )
    ]
    assert not silent
