"""One recipe from start to end on this rank: prepare, resume, train, report."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_lora.config.loader import LoadedRecipe, dump_recipe, to_dict
from megatron_lora.config.schema import Recipe
from megatron_lora.errors import UserError
from megatron_lora.metrics import RunReporter
from megatron_lora.policy.interface import NonFiniteLoss, Policy
from megatron_lora.rollout.generator import RolloutError
from megatron_lora.runtime import terminal
from megatron_lora.runtime.activity import begin, hold
from megatron_lora.runtime.failure import tell
from megatron_lora.runtime.watch import watched
from megatron_lora.runtime.world import World, environment_world
from megatron_lora.trainers.interrupt import Interrupt
from megatron_lora.trainers.plan import describe_plan
from megatron_lora.trainers.run_folder import RunFolder
from megatron_lora.trainers.session import Session, check_checkpoint
from megatron_lora.trainers.setup import (
    Prepared,
    build_loaders,
    build_policy,
    build_world,
    count_steps,
    count_updates,
    prepare,
)

FAILURE_STATUS = 1


def check_only(loaded: LoadedRecipe) -> list[str]:
    """--dry-run; returns what a run would do. Raises UserError."""
    world = environment_world()
    prepared = prepare(loaded.recipe, world)
    loader, _ = build_loaders(prepared)
    folder = RunFolder(Path(loaded.recipe.checkpointing.checkpoint_dir))
    folder.check(loaded.recipe.checkpointing.resume)
    found, _ = folder.latest()
    if found is not None:
        check_checkpoint(found, loaded.recipe.policy)
    resumes = [f"resumes from {found.path}"] if found is not None else []
    return [
        *loaded.notices,
        *prepared.notices,
        *prepared.data_lines,
        *describe_plan(loaded.recipe, loader, world.size),
        *resumes,
    ]


def run_recipe(loaded: LoadedRecipe) -> int:
    """Returns the exit status: 0 done or stopped by a signal, 1 where the numbers broke. Raises UserError, on every
    rank alike, for a mistake found on any."""
    recipe = loaded.recipe
    interrupt = Interrupt()
    interrupt.install()
    begin("reading data and checking the recipe", is_slow=True)
    # Every rank reads the same files and finds the same mistakes, so none waits for another here.
    prepared = prepare(recipe, environment_world())
    folder = RunFolder(Path(recipe.checkpointing.checkpoint_dir))
    folder.check(recipe.checkpointing.resume)
    found, skipped = folder.latest()
    if found is not None:
        check_checkpoint(found, recipe.policy)
    world = build_world(recipe)
    loader, validation = build_loaders(prepared)
    total_steps = count_steps(recipe, len(loader))
    options = getattr(recipe, recipe.algorithm)
    reporter = RunReporter(
        folder.path,
        total_steps,
        logger=recipe.logger,
        config=to_dict(recipe),
        resume_step=found.number if found else 0,
        title=recipe.algorithm,
        val_period=options.val_period if validation is not None else 0,
        val_at_end=options.val_at_end and validation is not None,
        enabled=world.is_main,
    )
    with reporter, watched(world, recipe.timeouts):
        for notice in [*loaded.notices, *prepared.notices, *skipped]:
            reporter.message(notice)
        _describe_data(reporter, prepared)
        begin("loading the model", is_slow=True)
        policy = build_policy(recipe, world, prepared.tokenizer, count_updates(recipe, total_steps))
        if world.device.type == "cuda":
            hold("weights, adapters and optimizer", torch.cuda.memory_allocated(world.device))
        _describe_policy(reporter, policy)
        if recipe.dpo is not None and recipe.dpo.precompute_reference_logprobs:
            _precompute(recipe, policy, reporter, loader, validation)
        session = Session(
            recipe=recipe,
            world=world,
            tokenizer=prepared.tokenizer,
            policy=policy,
            folder=folder,
            reporter=reporter,
            loader=loader,
            total_steps=total_steps,
            interrupt=interrupt,
        )
        begin("resuming" if found is not None else "starting", is_slow=True)
        session.resume(found)
        # Nothing was written up to here, so that a mistake leaves no trace.
        with _same_on_every_rank(world):
            if world.is_main:
                folder.prepare()
                reporter.start()
                (folder.path / "config.yaml").write_text(dump_recipe(recipe))
        _keep_log(folder.path, reporter)
        return _train(session, lambda: _loop(session, loader, validation))


def _keep_log(folder: Path, reporter: RunReporter) -> None:
    log = terminal.log()
    if log is not None:
        log.move_to(folder)
        reporter.message(f"libraries' output and every rank's tracebacks: {log.path}")


def _precompute(recipe: Recipe, policy: Policy, reporter: RunReporter, *loaders: Any) -> None:
    from megatron_lora.trainers.dpo import precompute_reference

    for loader in loaders:
        if loader is not None:
            precompute_reference(policy, loader, reporter, full_fine_tuning=not recipe.policy.adapter.enabled)


def _loop(session: Session, loader: Any, validation: Any) -> None:
    if session.recipe.algorithm == "sft":
        from megatron_lora.trainers.sft import train_sft as train
    elif session.recipe.algorithm == "dpo":
        from megatron_lora.trainers.dpo import train_dpo as train
    else:
        from megatron_lora.trainers.grpo import train_grpo as train
    train(session, loader, validation)


def _train(session: Session, loop: Callable[[], None]) -> int:
    try:
        loop()
    except (NonFiniteLoss, RolloutError) as error:
        latest = session.folder.path / "latest_step.txt"
        kept = f"step_{latest.read_text().strip()}" if latest.exists() else "none was written yet"
        nothing_updated = " No weight was updated;" if isinstance(error, NonFiniteLoss) else ""
        # A rollout engine may fail on one rank while the others still wait for it.
        if session.world.is_main or isinstance(error, RolloutError):
            tell(
                f"stopped at step {session.step + 1}: {error}.{nothing_updated} the last good checkpoint is kept "
                f"({kept})."
            )
        session.reporter.close(succeeded=False)
        return FAILURE_STATUS
    return 0


@contextmanager
def _same_on_every_rank(world: World) -> Iterator[None]:
    """A UserError that one rank meets inside is raised on all of them."""
    message = None
    try:
        yield
    except UserError as error:
        message = str(error)
    messages: list[Any] = [None] * world.size
    dist.all_gather_object(messages, message)
    for found in messages:
        if found is not None:
            raise UserError(found)


def _describe_data(reporter: RunReporter, prepared: Prepared) -> None:
    for line in prepared.data_lines:
        reporter.message(line)


def _describe_policy(reporter: RunReporter, policy: Policy) -> None:
    """The table of adapted linears, and how much of the model trains."""
    for notice in policy.notices:
        reporter.message(notice)
    trainable, total = policy.trainable_parameters()
    rows = policy.describe_adapters()
    if rows:
        reporter.table(
            "adapters",
            ("linear", "layers", "rank", "alpha", "A", "B", "parameters"),
            rows,
            caption=f"trainable {trainable:,} of {total:,} parameters ({trainable / total:.2%})",
        )
    else:
        reporter.message(f"full fine-tuning: {trainable:,} parameters")
