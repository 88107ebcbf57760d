"""Every key of the schema is read somewhere outside the schema: a key that nothing reads would be accepted and ignored.

Static: attribute reads in the sources. A name that several sections have, or that other objects have too, counts only
where it is read from something called like its section.
"""

import ast
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, get_args, get_origin

import pytest

from megatron_lora.config.schema import Recipe
from megatron_lora.config.schema_base import Section
from megatron_lora.config.schema_tree import section_of

PACKAGE = Path(__file__).resolve().parents[2] / "megatron_lora"
# Names that other objects have as well.
COMMON = set("name kind weight type split dim alpha optimizer kwargs function pattern seed".split())
# What a section is called where it is handed on, beside its key.
CALLED = {
    "SftConfig": {"section", "options", "recipe"},
    "DpoConfig": {"section", "options", "recipe", "config"},
    "GrpoConfig": {"section", "options", "recipe", "rollouts", "estimator"},
    "DistillationConfig": {"section", "options", "recipe", "rollouts"},
    "TeacherConfig": {"teacher"},
    "AdvantageConfig": {"options"},
    "RewardShapingConfig": {"shaping"},
    "RewardScalingConfig": {"scaling"},
    "LossFnConfig": {"loss", "config", "self"},
    "RewardFunctionConfig": {"entry", "spec", "self"},
    "EnvironmentConfig": {"config", "spec"},
    "SequencePackingConfig": {"packing", "section"},
    "DynamicBatchingConfig": {"packing", "section", "dynamic"},
    "MegatronConfig": {"megatron", "config", "section", "policy"},
    "DTensorConfig": {"dtensor", "config", "section", "policy"},
    "PeftConfig": {"config", "adapter", "options"},
    "LoraConfig": {"config", "adapter", "options"},
    "MegatronOptimizerConfig": {"options", "optim"},
    "TorchOptimizerConfig": {"named"},
    "TorchSchedulerConfig": {"entry", "named"},
    "VllmConfig": {"policy", "config"},
    "DatasetConfig": {"section", "spec"},
    "WandbConfig": {"wandb"},
    "TrackioConfig": {"options"},
    "SwanlabConfig": {"options"},
    "MlflowConfig": {"options"},
}
# The loader copies data.default's keys to the others, and names these two of data.validation as without effect.
COPIED, UNREAD = "data.default.", {"data.validation.seed", "data.validation.split_validation_size"}
# Read by a name that is put together: `val_` and a sampling key, or the key that a kind of reward needs.
BY_NAME = {
    "policy.generation.val_temperature": 'f"val_{',
    "policy.generation.val_top_p": 'f"val_{',
    "policy.generation.val_top_k": 'f"val_{',
    "env.reward_functions.max_tokens": '"max_tokens"',
}


def _keys(section: type[Section], prefix: str, called: str) -> Iterator[tuple[str, str, str, set[str]]]:
    """(path, name, section's class, what the section may be called) of every key that is no section."""
    for name, field in section.model_fields.items():
        child = section_of(field.annotation)
        if child is not None and child is not section:
            yield from _keys(child, f"{prefix}{name}.", name)
        elif not (get_origin(field.annotation) is Literal and len(get_args(field.annotation)) == 1):
            yield prefix + name, name, section.__name__, {called} | CALLED.get(section.__name__, set())


def _receiver(node: ast.expr) -> str:
    """`x` of `a.x.key` and `x.key`."""
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def _reads() -> dict[str, set[str]]:
    found: dict[str, set[str]] = defaultdict(set)
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text())
        in_schema = path.parent.name == "config" and path.stem.startswith("schema")
        # What a section's property reads is read by whoever reads the property: it has a name of its own there.
        for part in filter(_is_property, ast.walk(tree)) if in_schema else [tree]:
            for node in ast.walk(part):
                if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                    found[node.attr].add(_receiver(node.value))
    return found


def _is_property(node: ast.AST) -> bool:
    return isinstance(node, ast.FunctionDef) and any(ast.unparse(one) == "property" for one in node.decorator_list)


READS = _reads()
KEYS = list(_keys(Recipe, "", "recipe"))
# The two adapter sections, and the two that pack, are one kind each.
_KIND = {"LoraConfig": "PeftConfig", "DynamicBatchingConfig": "SequencePackingConfig"}
SECTIONS_OF_NAME = Counter(name for name, _ in {(name, _KIND.get(section, section)) for _, name, section, _ in KEYS})


@pytest.mark.parametrize(("path", "name", "called"), [(p, n, c) for p, n, _, c in KEYS], ids=[key[0] for key in KEYS])
def test_every_key_is_read(path: str, name: str, called: set[str]):
    if path in UNREAD or path.startswith(COPIED):
        return
    if path in BY_NAME:
        assert any(BY_NAME[path] in source.read_text() for source in PACKAGE.rglob("*.py")), path
        return
    receivers = READS[name]
    assert receivers, f"nothing reads {path}: remove it, or move it to config/unimplemented.py"
    if name in COMMON or SECTIONS_OF_NAME[name] > 1:
        assert receivers & called, f"{path} is read only from {sorted(receivers)}; a new name belongs into CALLED"


def test_a_key_that_nothing_reads_would_be_found():
    assert not READS["no_such_key_anywhere"] and len(KEYS) > 150
    assert not READS["dim"] & {"no_such_section"}
