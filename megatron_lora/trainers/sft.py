"""Supervised fine-tuning: the loop."""

import time

from megatron_lora.data.batch import Row
from megatron_lora.data.loader import GroupLoader
from megatron_lora.objectives.sft import SFTObjective
from megatron_lora.trainers.algorithm import Loader
from megatron_lora.trainers.last_answer import show_last_answer
from megatron_lora.trainers.loop import run_steps
from megatron_lora.trainers.session import Session
from megatron_lora.trainers.supervised import Supervised
from megatron_lora.trainers.validation import evaluate_groups


def train_sft(session: Session, loader: GroupLoader[list[Row]], validation: GroupLoader[list[Row]] | None) -> None:
    """Minimise the mean negative log-likelihood of the answers' tokens."""
    options = session.recipe.sft
    assert options is not None
    objective = SFTObjective()
    batches = loader.forever()

    def step() -> None:
        start = time.perf_counter()
        result = session.policy.train_step(next(batches), objective)
        session.step += 1
        session.log_train(result, time.perf_counter() - start)

    def validate() -> None:
        if validation is not None:
            session.log_validation(evaluate_groups(session, validation, objective, options.val_batches))

    run_steps(session, options, step, validate)
    show_last_answer(session, loader if validation is None else validation)


class SFT(Supervised):
    unit = "rows"

    def train(self, session: Session, loader: Loader, validation: Loader | None) -> None:
        train_sft(session, loader, validation)
