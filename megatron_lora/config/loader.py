"""From a recipe file and command-line overrides to a checked `Recipe`."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from megatron_lora.config.interpolation import resolve
from megatron_lora.config.messages import describe_errors, one_message
from megatron_lora.config.other_names import is_read
from megatron_lora.config.overrides import apply_override, merge
from megatron_lora.config.schema import ALGORITHMS, Recipe
from megatron_lora.config.schema_data import as_one_block
from megatron_lora.config.schema_tree import walk_fields
from megatron_lora.config.show import show
from megatron_lora.config.without_effect import notice, take_out
from megatron_lora.config.yaml_reader import protect_templates, protect_text, read_yaml
from megatron_lora.errors import UserError


@dataclass(frozen=True)
class LoadedRecipe:
    """A checked recipe.

    resolved: the same as nested dicts, every default filled in. notices: lines to show the user once.
    """

    recipe: Recipe
    resolved: dict[str, Any]
    notices: list[str]


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> LoadedRecipe:
    """Read a recipe with its `defaults:`, apply overrides, resolve interpolations, check everything.

    overrides: `dotted.key=value`, the value in YAML (overrides.py). Raises UserError for whatever is wrong, with the
    dotted path.
    """
    merged = read_recipe(Path(path))
    for override in overrides:
        merged = apply_override(merged, override)
    return check_recipe(resolve(merged, str(path)), merged)


def check_recipe(resolved: dict[str, Any], written: dict[str, Any] | None = None) -> LoadedRecipe:
    """Check a recipe given as nested dicts without interpolations. written: the same before they were resolved, so that
    a mistake is told once, where it stands. Raises UserError."""
    schema_paths = {known for known, _ in walk_fields(Recipe)}
    resolved = _with_lists_of_data(resolved)
    found = take_out(resolved, schema_paths)
    mistakes, recipe = found.refused, None
    try:
        recipe = Recipe.model_validate(found.left)
    except ValidationError as error:
        mistakes = [*mistakes, *describe_errors(error, resolved, written or {})]
    if mistakes or recipe is None:
        raise one_message(mistakes)
    found.paths += _unread(recipe, resolved)
    notices = [notice(found.paths)] if found.paths else []
    notices += recipe.section.notices(resolved)
    return LoadedRecipe(recipe, to_dict(recipe), notices)


def _with_lists_of_data(resolved: dict[str, Any]) -> dict[str, Any]:
    data = resolved.get("data")
    if not isinstance(data, dict):
        return resolved
    parts = {part: as_one_block(data[part]) for part in ("train", "validation") if part in data}
    return resolved | {"data": data | parts}


def _unread(recipe: Recipe, resolved: dict[str, Any]) -> list[str]:
    """Keys that the recipe has and that no run of its algorithm looks at, outside the sections of other algorithms and
    of the other backend; they are back at their defaults afterwards."""
    unread = []
    if recipe.section.rows != "prompts" and resolved["data"].get("max_input_seq_length") is not None:
        unread.append("data.max_input_seq_length")
    if recipe.data.validation is not None:
        written = resolved["data"]["validation"]
        blocks = [block for name, block in recipe.data.blocks() if name.startswith("validation")]
        for block, keys in zip(blocks, [written, *written.get("also", [])], strict=True):
            if keys.get("split_validation_size"):  # it is for data.train
                unread.append("data.validation.split_validation_size")
                block.split_validation_size = 0.0
            if keys.get("seed") and block.max_samples is None:
                unread.append("data.validation.seed")
                block.seed = None
            if not recipe.draws_answers and block.repeat > 1:
                unread.append("data.validation.repeat")  # a mean over rows stays the same
                block.repeat = 1
    unread += recipe.section.unread(recipe.algorithm, resolved)
    unread += _unread_adapter(recipe, resolved)
    if recipe.policy.scheduler is not None and recipe.policy.optimizer is None:
        unread.append("policy.scheduler")  # only where Megatron trains: the other backend refuses it
        recipe.policy.scheduler = None
    return unread


def _unread_adapter(recipe: Recipe, resolved: dict[str, Any]) -> list[str]:
    """What full fine-tuning leaves aside of the adapter that it does not train, where it says something else than the
    default."""
    adapter, path = recipe.policy.adapter, recipe.policy.adapter_section
    if adapter.enabled:
        return []
    written: Any = resolved
    for name in path.split("."):
        written = written.get(name) or {}
    defaults = type(adapter)()
    changed = [name for name in type(adapter).model_fields if getattr(adapter, name) != getattr(defaults, name)]
    for name in changed:
        setattr(adapter, name, getattr(defaults, name))
    return [f"{path}.{name}" for name in written if name in changed]


def to_dict(recipe: Recipe) -> dict[str, Any]:
    """The recipe as nested dicts of plain values, without the sections that its algorithm does not read."""
    content = recipe.model_dump()
    for path in {part for name, section in ALGORITHMS.items() for part in (name, *section.own_sections)}:
        if not is_read(path, recipe.algorithm):
            parent, _, name = path.rpartition(".")
            del (content[parent] if parent else content)[name]
    return content


def dump_recipe(recipe: Recipe) -> str:
    """YAML of the resolved recipe; `load_recipe` reads it back to an equal one."""
    return yaml.safe_dump(protect_text(to_dict(recipe)), sort_keys=False, allow_unicode=True, width=120)


def read_recipe(path: Path) -> dict[str, Any]:
    """A recipe's sections with its defaults, unchecked and with interpolations. Raises UserError."""
    return _read_with_defaults(path, ())


def _read_with_defaults(path: Path, including: tuple[Path, ...]) -> dict[str, Any]:
    """The file at `path` merged over the recipes that its `defaults:` names, in order."""
    path = path.resolve()
    if path in including:
        chain = " -> ".join(str(item) for item in (*including, path))
        raise UserError(f"the recipe's defaults go round in a circle: {chain}")
    content = _read_mapping(path, including)
    defaults = content.pop("defaults", None) or []
    if isinstance(defaults, str):
        defaults = [defaults]
    if not isinstance(defaults, list) or not all(isinstance(item, str) for item in defaults):
        raise UserError(f"{path}: defaults={show(defaults)}: wanted a recipe's path or a list of them")
    merged: dict[str, Any] = {}
    for item in defaults:
        merged = merge(merged, _read_with_defaults(path.parent / item, (*including, path)))
    return merge(merged, content)


def _read_mapping(path: Path, including: tuple[Path, ...]) -> dict[str, Any]:
    named_by = f" (named by defaults in {including[-1]})" if including else ""
    if path.is_dir():
        raise UserError(f"the recipe {path}{named_by} is a folder; give a YAML file")
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise UserError(f"there is no recipe {path}{named_by}; {_near_recipe(path)}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the recipe {path}{named_by} cannot be read: {error}") from error
    content = read_yaml(text, str(path))
    if content is None:
        raise UserError(f"the recipe {path}{named_by} is empty; wanted sections such as policy: and data:")
    if not isinstance(content, dict):
        raise UserError(f"the recipe {path}{named_by} holds {show(content)}; wanted sections such as policy: and data:")
    number = next((key for key in content if not isinstance(key, str)), None)
    if number is not None:
        raise UserError(f"the recipe {path}{named_by} has the key {number}; wanted sections such as policy: and data:")
    return protect_templates(content)


def _near_recipe(path: Path) -> str:
    """What a path to no recipe was probably meant to be."""
    folders = [path.parent, *(Path(name).resolve() for name in ("configs", "recipes"))]
    found = {file.stem: file for folder in reversed(folders) for file in sorted(folder.glob("*.y*ml"))}
    near = get_close_matches(path.name.removesuffix(path.suffix), found, n=1, cutoff=0.6)
    return f"did you mean {os.path.relpath(found[near[0]])}?" if near else "check the path"
