"""One recipe from start to end on this rank: prepare, resume, train, report."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from megatron_lora.config.loader import LoadedRecipe, dump_recipe, to_dict
from megatron_lora.config.schema import Recipe
from megatron_lora.errors import UserError
from megatron_lora.metrics import RunReporter
from megatron_lora.policy.adapter_start import planned_adapter
from megatron_lora.policy.interface import NonFiniteLoss, Policy
from megatron_lora.policy.preload import released_copies
from megatron_lora.rollout.generator import RolloutError
from megatron_lora.runtime import terminal
from megatron_lora.runtime.activity import begin, hold
from megatron_lora.runtime.agreement import from_first_rank, same_on_every_rank
from megatron_lora.runtime.failure import tell
from megatron_lora.runtime.out_of_memory import is_out_of_memory
from megatron_lora.runtime.watch import watched
from megatron_lora.runtime.world import World, environment_world
from megatron_lora.trainers.algorithms import algorithm_of
from megatron_lora.trainers.checkpoint_writer import CheckpointWriter, expected_bytes
from megatron_lora.trainers.interrupt import Interrupt
from megatron_lora.trainers.plan import describe_plan
from megatron_lora.trainers.run_folder import RunFolder
from megatron_lora.trainers.run_lock import RunLock
from megatron_lora.trainers.session import Session
from megatron_lora.trainers.setup import (
    Prepared,
    build_loaders,
    build_policy,
    build_world,
    count_steps,
    count_updates,
    prepare,
)
from megatron_lora.trainers.start import find_start, open_folder
from megatron_lora.trainers.write_failure import describe_failure, free_bytes, show_bytes

FAILURE_STATUS = 1


def check_only(loaded: LoadedRecipe) -> list[str]:
    """--dry-run: returns what a run would tell at its start. Raises UserError."""
    world = environment_world()
    prepared = prepare(loaded.recipe, world)
    folder = open_folder(loaded.recipe)
    loader, _ = build_loaders(prepared)
    start = find_start(prepared, folder, loader, World.alone())
    resumes = [f"resumes from {start.step.path}"] if start.step is not None else []
    adapter = planned_adapter(loaded.recipe.policy)
    return [
        *loaded.notices,
        *prepared.notices,
        *(adapter.notices if adapter is not None else []),
        *prepared.data_lines,
        *describe_plan(loaded.recipe, loader, world.size),
        *start.warnings,
        *start.notices,
        *resumes,
        *algorithm_of(loaded.recipe).not_ready(loaded.recipe, world),
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
    folder = open_folder(recipe)
    loader, validation = build_loaders(prepared)
    begin("joining the other ranks", is_slow=True)
    world = build_world(recipe)
    begin("looking for a checkpoint", is_slow=True)
    start = find_start(prepared, folder, loader, world)
    total_steps = count_steps(recipe, len(loader), start.number, start.batches_left(recipe, loader))
    options, algorithm = recipe.section, algorithm_of(recipe)
    from_first_rank(world, lambda: algorithm.check_outside(recipe, world))
    reporter = RunReporter(
        folder.path,
        total_steps,
        logger=recipe.logger,
        config=to_dict(recipe),
        resume_step=start.number,
        title=recipe.algorithm,
        curve=algorithm.curve,
        val_period=options.val_period if validation is not None else 0,
        val_at_end=options.val_at_end and validation is not None,
        enabled=world.is_main,
    )
    lock = RunLock(folder.path)
    with reporter, watched(world, recipe.timeouts), lock, released_copies():
        _tell(reporter, [*loaded.notices, *prepared.notices, *start.notices], start.warnings)
        _describe_data(reporter, prepared)
        policy = build_policy(recipe, world, prepared.tokenizer, count_updates(recipe, total_steps))
        if world.device.type == "cuda":
            hold("weights, adapters and optimizer", torch.cuda.memory_allocated(world.device))
        num_trainable = _describe_policy(reporter, policy)
        shares = algorithm.shares_prompts and recipe.policy.shared_prefix == "auto"
        if shares and policy.unshared_reason is not None:
            reporter.message(f"each row sends its own copy of its prompt through the model: {policy.unshared_reason}")
        algorithm.before_resume(recipe, policy, reporter, [one for one in (loader, validation) if one is not None])
        needed = expected_bytes(recipe, num_trainable)
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
            identity=start.identity,
            writer=CheckpointWriter(recipe, world, folder, policy, prepared.tokenizer, needed),
        )
        begin("resuming" if start.step is not None else "starting", is_slow=True)
        session.resume(start.step)
        # Nothing was written up to here, so that a mistake leaves no trace.
        with same_on_every_rank(world.size):
            if world.is_main:
                _open_for_writing(recipe, folder, lock, reporter, needed)
        _keep_log(folder.path, reporter)
        return _train(session, lambda: algorithm.train(session, loader, validation))


def _keep_log(folder: Path, reporter: RunReporter) -> None:
    log = terminal.log()
    if log is not None:
        log.move_to(folder)
        reporter.message(f"libraries' output and every rank's tracebacks: {log.path}")


def _open_for_writing(recipe: Recipe, folder: RunFolder, lock: RunLock, reporter: RunReporter, needed: int) -> None:
    """Lock the folder, clean it and start its files. Raises UserError."""
    try:
        folder.make()
        lock.take()
        folder.clean()
        reporter.start()
        (folder.path / "config.yaml").write_text(dump_recipe(recipe))
    except OSError as error:
        raise UserError(
            f"checkpointing.checkpoint_dir={str(folder.path)!r} cannot be written "
            f"({describe_failure(error, folder.path)}); name a folder that can"
        ) from error
    free = free_bytes(folder.path)
    if recipe.checkpointing.enabled and free is not None and free < needed:
        reporter.warning(
            f"a checkpoint takes about {show_bytes(needed)}, and {show_bytes(free)} are free in {folder.path}"
        )


def _tell(reporter: RunReporter, notices: Sequence[str], warnings: Sequence[str]) -> None:
    for warning in warnings:
        reporter.warning(warning)
    for notice in notices if reporter.enabled else ():
        reporter.message(terminal.brief(notice))


def _train(session: Session, loop: Callable[[], None]) -> int:
    try:
        loop()
    except (NonFiniteLoss, RolloutError) as error:
        if is_out_of_memory(error):
            raise  # told with what was held and what to lower, as the trainer's own
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


def _describe_data(reporter: RunReporter, prepared: Prepared) -> None:
    for line in prepared.data_lines:
        reporter.message(line)


def _describe_policy(reporter: RunReporter, policy: Policy) -> int:
    """The table of adapted linears, and how much of the model trains; returns that."""
    for notice in policy.notices:
        reporter.message(notice)
    trainable, total = policy.trainable_parameters()
    of_critic = policy.critic.trainable_parameters()[0] if policy.critic is not None else 0
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
    if of_critic:
        reporter.message(
            f"critic: {of_critic:,} parameters, adapters of the same form and a value head on the same base"
        )
    return trainable + of_critic
