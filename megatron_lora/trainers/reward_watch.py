"""Stops a run whose reward functions say nothing: a mistake in them looks like answers that are all wrong."""

from collections import Counter
from collections.abc import Sequence

from megatron_lora.errors import UserError
from megatron_lora.rollout.rewards import RewardOutcome

PATIENCE = 3


class RewardWatch:
    """Sees the outcomes of every training batch; the same on every rank."""

    def __init__(self) -> None:
        self._failed: Counter[str] = Counter()
        self._told: set[str] = set()
        self._abstained = 0

    def see(self, outcomes: Sequence[RewardOutcome]) -> list[str]:
        """Warnings of rewards that fail for the first time. Raises UserError where a reward has failed on all answers
        of the last PATIENCE batches, or all rewards have abstained on all of them."""
        warnings = self._first_failures(outcomes)
        for name in outcomes[0].values:
            if not all(name in outcome.errors for outcome in outcomes):
                self._failed[name] = 0
                continue
            self._failed[name] += 1
            if self._failed[name] >= PATIENCE:
                raise UserError(
                    f"reward '{name}' failed on every answer of {PATIENCE} batches in a row, {len(outcomes)} in the "
                    f"last: {outcomes[0].errors[name]}; mend the function, or raise timeout_seconds where that ran out"
                )
        self._abstained = self._abstained + 1 if all(outcome.total is None for outcome in outcomes) else 0
        if self._abstained >= PATIENCE:
            raise UserError(
                f"no answer of {PATIENCE} batches in a row was given a reward: {', '.join(outcomes[0].values)} gave "
                "None for all of them, which abstains (a function without `return`, or references that it cannot read)"
            )
        return warnings

    def _first_failures(self, outcomes: Sequence[RewardOutcome]) -> list[str]:
        errors = {name: [o.errors[name] for o in outcomes if name in o.errors] for name in outcomes[0].values}
        new = {name: found for name, found in errors.items() if found and name not in self._told}
        self._told |= new.keys()
        return [
            f"reward '{name}' failed and counts 0 for {len(found)} of {len(outcomes)} answers, first: {found[0]}; "
            "further failures are counted as reward_errors and told in log.txt"
            for name, found in new.items()
        ]
