"""From a recipe to what a loop needs. Everything that can fail on a user's mistake fails before weights load."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_lora.config.schema import Recipe
from megatron_lora.config.schema_run import LoggerConfig
from megatron_lora.data.loader import GroupLoader
from megatron_lora.data.prepare import PreparedData, prepare_data
from megatron_lora.errors import UserError
from megatron_lora.metrics import check_trackers, login_notices
from megatron_lora.policy.adapter_start import planned_adapter
from megatron_lora.policy.fp8_base import check_fp8_card
from megatron_lora.policy.interface import Policy
from megatron_lora.policy.layout_checks import check_layout
from megatron_lora.policy.preload import check_preload
from megatron_lora.policy.quantization import check_quantization
from megatron_lora.policy.router_checks import router_notices
from megatron_lora.policy.weights_check import check_base, check_positions, check_token_ids, read_base
from megatron_lora.runtime.activity import begin
from megatron_lora.runtime.world import World, init_distributed
from megatron_lora.trainers.algorithms import algorithm_of
from megatron_lora.trainers.metric_names import check_metric_name, check_stop_metric, validation_notices
from megatron_lora.trainers.write_failure import why_unwritable


@dataclass
class Prepared:
    """What is ready before any weight is loaded. train, validation: what the loaders read. data_lines: what there is to
    say of the rows: counts, drops and why, what is not honoured. notices: what else of the recipe or
    the model's folder is not honoured."""

    recipe: Recipe
    tokenizer: Any
    train: Any
    validation: Any | None
    data_lines: list[str]
    notices: list[str]


def prepare(recipe: Recipe, world: World) -> Prepared:
    """Check layout, weights' files and data, and tokenize. Raises UserError."""
    check_trackers(recipe.logger)
    _check_log_dir(recipe.logger)
    model = read_base(recipe.policy)
    notices = [*login_notices(recipe.logger), *check_base(recipe.policy, model)]
    check_preload(recipe.policy)
    check_layout(recipe.policy, model.shapes, world.size)
    if recipe.policy.backend == "megatron":
        notices += router_notices(recipe.policy.megatron_cfg, model.shapes)
    else:
        from megatron_lora.policy.dtensor.optim import check_optimizer

        check_optimizer(recipe.policy)
    notices += check_quantization(recipe.policy, model)
    check_fp8_card(recipe.policy, world.device)
    planned_adapter(recipe.policy)
    validates = recipe.data.has_validation
    notices += check_metric_name(recipe, has_validation=validates)
    check_stop_metric(recipe, has_validation=validates)
    notices += validation_notices(recipe, has_validation=validates)
    algorithm = algorithm_of(recipe)
    algorithm.check(recipe, world)
    data = prepare_data(recipe, show_progress=world.is_main)
    notices += check_token_ids(model, data.tokenizer, [(source.name, rows) for _, source, rows in data.sets])
    notices += check_positions(model, _longest(recipe, data))
    algorithm.check_data(recipe, [rows for _, _, rows in data.sets])
    return Prepared(
        recipe=recipe,
        tokenizer=data.tokenizer,
        train=data.train,
        validation=data.validation,
        data_lines=data.lines(),
        notices=notices,
    )


def _check_log_dir(logger: LoggerConfig) -> None:
    """Raise UserError where a tracker keeps files in a folder that cannot be written; Trackio has its own place."""
    trackers = ("tensorboard", "wandb", "swanlab", "mlflow")
    on = [f"logger.{name}_enabled" for name in trackers if getattr(logger, f"{name}_enabled")]
    reason = why_unwritable(Path(logger.log_dir).expanduser()) if on else None
    if reason is not None:
        raise UserError(
            f"logger.log_dir={logger.log_dir!r} cannot be written ({reason}), and {' and '.join(on)} keeps files "
            "there; name a folder that can, or turn it off"
        )


def _longest(recipe: Recipe, data: PreparedData) -> int:
    """Tokens of the longest sequence that the model may see; an answer to a prompt may fill what there is room for."""
    limit = recipe.policy.max_total_sequence_length
    sets = [rows.stats for _, _, rows in data.sets]
    return max(limit if stats.unit == "prompt" else min(limit, stats.max) for stats in sets)


def build_loaders(prepared: Prepared) -> tuple[GroupLoader, GroupLoader | None]:
    """The training loader, and the validation's, as the algorithm has them."""
    return algorithm_of(prepared.recipe).build_loaders(prepared.recipe, prepared.train, prepared.validation)


def count_steps(recipe: Recipe, batches_an_epoch: int, steps_done: int = 0, batches_left: int | None = None) -> int:
    """The run's length: whichever of max_num_steps and max_num_epochs ends first. With dynamic sampling, which may take
    any number of batches a step, the most that it can be. batches_left: to the end of the epochs after `steps_done`,
    where those were of another size than `batches_an_epoch` are."""
    section, fewest = recipe.section, algorithm_of(recipe).batches_a_step(recipe)
    batches = section.max_num_epochs * batches_an_epoch if batches_left is None else batches_left
    batches = max(1, batches // fewest) if fewest > 1 else batches
    return min(section.max_num_steps, batches if batches_left is None else steps_done + batches)


def count_updates(recipe: Recipe, num_steps: int) -> int:
    """Optimizer steps of the run."""
    return num_steps * algorithm_of(recipe).updates_a_step(recipe)


def build_world(recipe: Recipe) -> World:
    """Join the other ranks in the recipe's layout."""
    # Longer than the watch's own limits, which name the rank that does not come on.
    init_distributed(2 * max(recipe.timeouts.slow_seconds, recipe.timeouts.training_seconds))
    if recipe.policy.backend == "megatron":
        from megatron_lora.runtime.world import init_megatron_world

        return init_megatron_world(recipe.policy, recipe.seed)
    from megatron_lora.runtime.world import init_dtensor_world

    return init_dtensor_world(recipe.policy, recipe.seed)


def build_policy(recipe: Recipe, world: World, tokenizer: Any, num_updates: int) -> Policy:
    """The backend that the recipe selects, base weights loaded."""
    begin("importing the backend", is_slow=True)
    if recipe.policy.backend == "megatron":
        from megatron_lora.policy.megatron.policy import MegatronPolicy as Backend
        from megatron_lora.runtime.transformer_engine import import_bridge

        import_bridge()
    else:
        from megatron_lora.policy.dtensor.policy import DTensorPolicy as Backend
    begin("loading the model", is_slow=True)
    return Backend(
        recipe.policy,
        world,
        pad_token_id=tokenizer.pad_token_id,
        seed=recipe.seed,
        num_steps=num_updates,
        keeps_start=recipe.keeps_start,
        critic=recipe.critic,
    )
