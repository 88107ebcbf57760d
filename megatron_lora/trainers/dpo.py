"""Direct preference optimization: the loop (Rafailov et al. 2023, section 4).

The reference is the same model with its adapter off, or as it was at the start (`Policy.reference`).
"""

import time
from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from megatron_lora.config.schema import Recipe
from megatron_lora.data.batch import Row
from megatron_lora.data.loader import GroupLoader, Indexed
from megatron_lora.metrics import RunReporter
from megatron_lora.objectives.dpo import DPOConfig, DPOObjective
from megatron_lora.policy.interface import Policy
from megatron_lora.runtime.world import World
from megatron_lora.trainers.algorithm import Loader
from megatron_lora.trainers.last_answer import show_last_answer
from megatron_lora.trainers.loop import run_steps
from megatron_lora.trainers.session import Session
from megatron_lora.trainers.supervised import Supervised
from megatron_lora.trainers.validation import evaluate_groups

REFERENCE = "reference_logps"
Pairs = list[list[Row]]


def train_dpo(session: Session, loader: GroupLoader[list[Row]], validation: GroupLoader[list[Row]] | None) -> None:
    """Raise the chosen answers' likelihood over the rejected ones', relative to the reference."""
    options = session.recipe.dpo
    assert options is not None
    objective = DPOObjective(DPOConfig.from_config(options))
    batches = loader.forever()

    def step() -> None:
        start = time.perf_counter()
        pairs = with_reference(session.policy, next(batches))
        result = session.policy.train_step(pairs, objective)
        session.step += 1
        session.log_train(result, time.perf_counter() - start)

    def validate() -> None:
        if validation is not None:
            values = evaluate_groups(
                session,
                validation,
                objective,
                options.val_batches,
                lambda pairs: with_reference(session.policy, pairs),
            )
            session.log_validation(values)

    run_steps(session, options, step, validate)
    show_last_answer(session, loader if validation is None else validation)


def with_reference(policy: Policy, pairs: Pairs) -> Pairs:
    """The pairs with the reference's log-probabilities as a token field, where they lack them. Collective."""
    rows = [row for pair in pairs for row in pair]
    if all(REFERENCE in row.token_fields for row in rows):
        return pairs
    with policy.reference():
        logps = iter(policy.score(rows))
    return [[_with_field(row, next(logps)) for row in pair] for pair in pairs]


def _with_field(row: Row, logps: Tensor) -> Row:
    return replace(row, token_fields={**row.token_fields, REFERENCE: logps})


class ScoredPairs(Sequence[list[Row]]):
    """Pairs with reference log-probabilities that were computed ahead. logps: one tensor [S] a row, in order."""

    def __init__(self, pairs: Indexed[list[Row]], logps: Sequence[Sequence[Tensor]]):
        self._pairs, self._logps = pairs, logps

    def __len__(self) -> int:
        return len(self._logps)

    def __getitem__(self, position):  # type: ignore[override]  # no slices
        return [_with_field(*both) for both in zip(self._pairs[position], self._logps[position], strict=True)]


def precompute_reference(
    policy: Policy, loader: GroupLoader[list[Row]], reporter: RunReporter, *, full_fine_tuning: bool
) -> None:
    """Score every pair of the loader once, and have it hand out pairs that carry their scores. Collective.

    Call it before a checkpoint is loaded: in full fine-tuning the reference is the model as it starts.
    """
    pairs, size = loader.dataset, loader.global_batch_size
    scored: list[Sequence[Tensor]] = []
    with reporter.progress("reference log-probabilities", len(pairs), "pairs") as advance:
        for first in range(0, len(pairs), size):
            chunk = [pairs[position] for position in range(first, min(first + size, len(pairs)))]
            rows = [row for pair in chunk for row in pair]
            if full_fine_tuning:
                logps = policy.score(rows)
            else:
                with policy.reference():
                    logps = policy.score(rows)
            scored += [logps[position : position + 2] for position in range(0, len(logps), 2)]
            advance(len(chunk))
    loader.dataset = ScoredPairs(pairs, scored)


class DPO(Supervised):
    unit = "pairs"
    rows_a_group = 2
    metrics = ("preference_loss", "sft_loss", "accuracy", "rewards_chosen", "rewards_rejected", "reward_margin")
    shares_prompts = True

    def check(self, recipe: Recipe, world: World) -> None:
        assert recipe.dpo is not None
        DPOConfig.from_config(recipe.dpo)

    def before_resume(self, recipe: Recipe, policy: Policy, reporter: RunReporter, loaders: Sequence[Loader]) -> None:
        assert recipe.dpo is not None
        if recipe.dpo.precompute_reference_logprobs:
            for loader in loaders:
                precompute_reference(policy, loader, reporter, full_fine_tuning=not recipe.policy.adapter.enabled)

    def train(self, session: Session, loader: Loader, validation: Loader | None) -> None:
        train_dpo(session, loader, validation)
