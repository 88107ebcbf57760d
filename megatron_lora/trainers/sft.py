"""Supervised fine-tuning: the loop."""

import time
from collections.abc import Iterable

from megatron_lora.config.schema_algorithms import SftConfig
from megatron_lora.data.batch import Row
from megatron_lora.data.loader import GroupLoader
from megatron_lora.objectives.sft import SFTObjective
from megatron_lora.trainers.session import Session
from megatron_lora.trainers.validation import evaluate_groups


def train_sft(session: Session, loader: GroupLoader[list[Row]], validation: GroupLoader[list[Row]] | None) -> None:
    """Take steps until the run's last, validating and saving when due."""
    options = session.recipe.sft
    assert options is not None
    objective = SFTObjective()
    batches: Iterable[list[list[Row]]] = loader.forever()
    if options.val_at_start and session.step == 0:
        validate(session, validation, objective, options)
    if session.step >= session.total_steps:
        session.reporter.message(f"nothing to do: the run is at step {session.step} of {session.total_steps}")
        return
    for groups in batches:
        start = time.perf_counter()
        result = session.policy.train_step(groups, objective)
        session.step += 1
        session.log_train(result, time.perf_counter() - start)
        last = session.step >= session.total_steps
        if session.step % options.val_period == 0 or (last and options.val_at_end):
            validate(session, validation, objective, options)
        stopping = session.should_stop()
        session.save_if_due(force=last or stopping)
        if stopping:
            session.reporter.message(f"stopped by a signal after step {session.step}; the same command goes on")
        if last or stopping:
            break
    session.finish()


def validate(
    session: Session, validation: GroupLoader[list[Row]] | None, objective: SFTObjective, options: SftConfig
) -> None:
    """The mean loss over `val_batches` batches' target tokens."""
    if validation is None:
        return
    session.log_validation(evaluate_groups(session, validation, objective, options.val_batches))
