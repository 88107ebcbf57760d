"""What happens around a training step, the same for every algorithm."""

from collections.abc import Callable
from typing import Protocol

from megatron_lora.runtime.activity import begin, describe_start
from megatron_lora.trainers.session import Session, StepAbandoned


class DataSpent(Exception):
    """A step needed more of its data than `max_num_epochs` allows; says so in words."""


class LoopOptions(Protocol):
    """The keys of `sft`, `dpo` and `grpo` that say when to validate."""

    val_period: int
    val_at_start: bool
    val_at_end: bool


def run_steps(
    session: Session,
    options: LoopOptions,
    take_step: Callable[[], None],
    validate: Callable[[], None],
    *,
    first_validation: int = -1,
    stop_reason: Callable[[], str] = lambda: "",
) -> None:
    """Take steps until the run's last, validating and saving when due.

    take_step: does one step, raises `session.step` and logs. Both are collective. A step that raises leaves the last
    checkpoint as it is; one that a signal made it abandon is taken again, from the same data, by the run that goes on;
    one for which the data does not suffice ends the run. first_validation: the first step at which the period applies.
    stop_reason: why the last validation ends the run, "" where it does not; on every rank the same.
    """
    if options.val_at_start and session.step == 0:
        begin("validating before the first step")
        validate()
    if reason := stop_reason():
        session.reporter.message(f"nothing to do: {reason}")
        return
    if session.step >= session.total_steps:
        session.reporter.message(f"nothing to do: the run is at step {session.step} of {session.total_steps}")
        return
    last = stopping = due = late = False
    first = True
    while not (last or stopping or late):
        position = session.loader.state_dict()
        begin(f"training step {session.step + 1}")
        try:
            take_step()
        except StepAbandoned:
            session.loader.load_state_dict(position)
            stopping = True
            break
        except DataSpent as end:
            session.loader.load_state_dict(position)
            session.reporter.message(str(end))
            if options.val_at_end and not due:
                validate()
            break
        if first:
            session.reporter.message(describe_start())
        first = False
        last = session.step >= session.total_steps
        due = options.val_period > 0 and session.step % options.val_period == 0 and session.step >= first_validation
        if due or (last and options.val_at_end):
            begin(f"validating at step {session.step}")
            validate()
            if reason := stop_reason():
                session.reporter.message(f"the run ends after step {session.step}: {reason}")
                last = True
        stopping, late = session.should_stop(), session.out_of_time()
        begin(f"saving step {session.step}", is_slow=True)
        session.save_if_due(force=last or stopping or late)
    if stopping:
        session.reporter.message(f"stopped by a signal after step {session.step}; the same command goes on")
    elif late and not last:
        limit = session.recipe.checkpointing.checkpoint_must_save_by
        session.reporter.message(
            f"stopped after step {session.step}: checkpointing.checkpoint_must_save_by={limit} leaves no time for "
            "another; the same command goes on"
        )
    session.finish()
