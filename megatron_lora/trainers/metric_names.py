"""Which metrics a recipe's runs log, by kind of line, so that `checkpointing.metric_name` is checked before weights
load."""

import difflib

from megatron_lora.config.schema import Recipe
from megatron_lora.errors import UserError
from megatron_lora.trainers.algorithms import algorithm_of


def metric_names(recipe: Recipe, kind: str) -> list[str]:
    """Names of the numbers in a recipe's lines of this kind ("train", "validation")."""
    balancing = ("load_balancing_loss",) if kind == "train" and recipe.policy.megatron_cfg.balances_experts else ()
    return sorted((*algorithm_of(recipe).metric_names(recipe, kind), *balancing))


def check_metric_name(recipe: Recipe, *, has_validation: bool) -> list[str]:
    """Notices; raises UserError for a `checkpointing.metric_name` that no line of this recipe has."""
    checkpointing = recipe.checkpointing
    if checkpointing.metric is None or not checkpointing.enabled:
        return []
    kind, name = checkpointing.metric
    names = metric_names(recipe, kind)
    short = {"train": "train", "validation": "val"}
    if name not in names and "metric_name" not in checkpointing.model_fields_set:
        return [
            f"checkpointing.metric_name is not set, and {recipe.algorithm.upper()} logs no {name}: the latest are kept"
        ]
    if name not in names:
        other = "validation" if kind == "train" else "train"
        near = [f"{short[kind]}:{found}" for found in difflib.get_close_matches(name, names, n=1, cutoff=0.5)]
        if not near and name in metric_names(recipe, other):
            near = [f"{short[other]}:{name}"]
        advice = f"did you mean {near[0]}?" if near else "name one of them, or null to keep the latest checkpoints."
        raise UserError(
            f"checkpointing.metric_name={checkpointing.metric_name!r}: no {kind} line of {recipe.algorithm.upper()} "
            f"has {name!r}; {advice} It has {', '.join(names)}"
        )
    if kind == "validation" and not _validates(recipe, has_validation):
        return [
            f"checkpointing.metric_name={checkpointing.metric_name!r}, but this run has no validation: the latest "
            "checkpoints are kept"
        ]
    return []


def check_stop_metric(recipe: Recipe, *, has_validation: bool) -> None:
    """Raises UserError for a `stop_at_validation_metric` that no validation of this run logs."""
    name = recipe.rollouts.stop_at_validation_metric if recipe.draws_answers else None
    if name is None:
        return
    own = recipe.algorithm
    if not _validates(recipe, has_validation):
        raise UserError(
            f"{own}.stop_at_validation_metric={name!r}, but this run has no validation; set data.validation (or "
            f"data.train.split_validation_size) and {own}.val_period"
        )
    names = metric_names(recipe, "validation")
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
        advice = f"did you mean {near[0]}?" if near else f"it has {', '.join(names)}"
        raise UserError(f"{own}.stop_at_validation_metric={name!r}: validation does not log it; {advice}")


def validation_notices(recipe: Recipe, *, has_validation: bool) -> list[str]:
    """For keys that ask for validations of a run that has no rows for them."""
    section, own = recipe.section, recipe.algorithm
    asked = [key for key in ("val_at_start", "val_at_end") if getattr(section, key)]
    asked = ["val_period"] * (section.val_period > 0) + asked
    written = [key for key in asked if key in section.model_fields_set]
    if has_validation or not written:
        return []
    keys = " and ".join(f"{own}.{key}={str(getattr(section, key)).lower()}" for key in written)
    shown = ": answers of training steps are shown in their place" if recipe.draws_answers else ""
    return [
        f"{keys}, but there are no validation rows (data.validation, or data.train.split_validation_size), so nothing "
        f"is validated{shown}"
    ]


def _validates(recipe: Recipe, has_validation: bool) -> bool:
    section = recipe.section
    return has_validation and (section.val_period > 0 or section.val_at_start or section.val_at_end)
