"""No code asks which algorithm or which rollout engine it is: each brings what differs in an object of a registry.

Reads the sources only. What counts as asking: a comparison with such a name, a look into one algorithm's section from
code that is not that algorithm's, `isinstance` of such a section, a table by the names, and a comparison of
`generation.backend` or a look at `colocated.enabled`.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_lora.config.rollout_engines import BACKENDS
from megatron_lora.config.schema import ALGORITHMS
from megatron_lora.rollout.engines import ENGINES
from megatron_lora.trainers import algorithms

PACKAGE = Path(__file__).parents[2] / "megatron_lora"
# "megatron" names the training backend as well, and is asked for as one.
NAMES = {*ALGORITHMS, *BACKENDS, *ENGINES, "native"} - {"megatron"}
SECTIONS = {section.__name__ for section in ALGORITHMS.values()}
REGISTRIES = {"config/schema.py", "config/rollout_engines.py", "rollout/engines.py", "trainers/algorithms.py"}


def _own(path: str, algorithm: str) -> bool:
    """Whether a file is the algorithm's: its trainer, its checks, its objective's switches."""
    return any(part == algorithm or part.startswith(f"{algorithm}_") for part in Path(path).stem.split(".")[:1])


def _text(node: ast.AST) -> str | None:
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None


def _dotted(node: ast.AST) -> str:
    return ast.unparse(node) if isinstance(node, ast.Attribute | ast.Name) else ""


def branches(path: str, source: str) -> Iterator[str]:
    """What asks for a name, in words."""
    if path in REGISTRIES:
        return
    tree = ast.parse(source)
    kwargs = {id(item.value) for call in ast.walk(tree) if isinstance(call, ast.Call) for item in call.keywords}
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            parts = [
                item for side in sides for item in (side.elts if isinstance(side, ast.Tuple | ast.Set) else [side])
            ]
            if any(_text(part) in NAMES for part in parts) or any("generation.backend" in _dotted(s) for s in sides):
                yield f"{path}:{node.lineno}: {ast.unparse(node)}"
        elif isinstance(node, ast.Attribute) and node.attr in ALGORITHMS and not _own(path, node.attr):
            if _dotted(node.value).rpartition(".")[2] in ("recipe", "self") and id(node) not in kwargs:
                yield f"{path}:{node.lineno}: {ast.unparse(node)}"
        elif isinstance(node, ast.Call) and _dotted(node.func) == "isinstance":
            if any(isinstance(name, ast.Name) and name.id in SECTIONS for name in ast.walk(node)):
                yield f"{path}:{node.lineno}: {ast.unparse(node)}"
        elif isinstance(node, ast.Dict) and any(key is not None and _text(key) in ALGORITHMS for key in node.keys):
            yield f"{path}:{node.lineno}: a table by algorithm"
        elif isinstance(node, ast.Tuple | ast.List | ast.Set) and sum(_text(e) in ALGORITHMS for e in node.elts) > 1:
            yield f"{path}:{node.lineno}: a list of algorithms"


def test_nothing_asks_for_an_algorithm_or_an_engine_by_name() -> None:
    files = sorted(PACKAGE.rglob("*.py"))
    assert len(files) > 200
    found = [one for file in files for one in branches(str(file.relative_to(PACKAGE)), file.read_text())]
    assert found == []


@pytest.mark.parametrize(
    "source",
    [
        'if recipe.algorithm == "dpo": pass',
        'if name in ("sft", "grpo"): pass',
        'if policy.generation.backend == "vllm": pass',
        "if generation.backend != other: pass",
        'if "servers" == engine: pass',
        "if recipe.grpo is not None: pass",
        "section = session.recipe.sft or session.recipe.dpo",
        "if isinstance(section, GrpoConfig): pass",
        'TRAIN = {"sft": train_sft, "dpo": train_dpo}',
        'ALL = ("sft", "dpo", "grpo")',
    ],
)
def test_the_walk_finds_each_kind(source: str) -> None:
    assert list(branches("trainers/other.py", source))


@pytest.mark.parametrize("source", ['if policy.backend == "megatron": pass', "options = recipe.rollouts"])
def test_the_walk_leaves_other_questions_alone(source: str) -> None:
    assert not list(branches("trainers/other.py", source))


def test_the_registries_name_the_same() -> None:
    assert set(algorithms.ALGORITHMS) == set(ALGORITHMS)
    facts = {facts.name for both in BACKENDS.values() for facts in both if facts is not None}
    assert facts == set(ENGINES)
