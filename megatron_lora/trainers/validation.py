"""Validation of the losses: the mean over several batches, each weighed by what the objective counts in it."""

import time
from collections.abc import Callable
from itertools import islice
from typing import Any

from megatron_lora.data.batch import Row
from megatron_lora.data.loader import GroupLoader
from megatron_lora.objectives.base import Objective
from megatron_lora.trainers.session import Session


def evaluate_groups(
    session: Session,
    loader: GroupLoader[list[Row]],
    objective: Objective,
    num_batches: int,
    prepare: Callable[[list[list[Row]]], list[list[Row]]] = lambda groups: groups,
) -> dict[str, Any]:
    """Loss and metrics over the loader's first `num_batches` batches, with the contract's names. Collective.

    prepare: adds to each batch's rows what the objective reads.
    """
    start = time.perf_counter()
    sums: dict[str, float] = {}
    count = 0.0
    targets = tokens = 0
    loader.epoch = loader.position = 0
    for groups in islice(loader, num_batches if num_batches > 0 else None):
        groups = prepare(groups)
        rows = [row for group in groups for row in group]
        weight = objective.count(rows)
        loss, metrics = session.policy.evaluate(groups, objective)
        for name, value in {"loss": loss, **metrics}.items():
            sums[name] = sums.get(name, 0.0) + value * weight
        count += weight
        targets += sum(row.num_targets for row in rows)
        tokens += sum(len(row) for row in rows)
    seconds = time.perf_counter() - start
    values: dict[str, Any] = {name: value / count for name, value in sums.items()} if count else {}
    return values | {
        "num_target_tokens": targets,
        "step_time_seconds": seconds,
        "tokens_per_second": tokens / seconds,
    }
