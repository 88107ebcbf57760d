"""What SFT and DPO share: batches of rows that hold their answers."""

from collections.abc import Sequence
from typing import Any

from megatron_lora.config.algorithm_section import SupervisedSection
from megatron_lora.config.schema import Recipe
from megatron_lora.data.loader import GroupLoader
from megatron_lora.errors import UserError
from megatron_lora.trainers.algorithm import COUNTS, TRAIN, Algorithm, Loader


class Supervised(Algorithm):
    """unit: what a group of rows is called. rows_a_group: how many it has. metrics: what the objective logs."""

    unit: str
    rows_a_group: int = 1
    metrics: tuple[str, ...] = ()

    def build_loaders(self, recipe: Recipe, train: Any, validation: Any | None) -> tuple[Loader, Loader | None]:
        section = recipe.section
        assert isinstance(section, SupervisedSection)
        size = recipe.policy.train_global_batch_size
        untrained = train.stats.untrained
        if untrained >= size:
            raise UserError(
                f"{untrained} training rows carry no loss, as they say themselves (their weights are 0): a whole batch "
                f"of policy.train_global_batch_size={size} could be of them, which has no mean loss; take them out of "
                "the file"
            )
        loader = GroupLoader(train, size, seed=recipe.seed, shuffle=recipe.data.shuffle)
        if validation is None:
            return loader, None
        held_out = validation.with_targets()
        size = min(section.val_global_batch_size, len(held_out))
        size_key = f"{recipe.algorithm}.val_global_batch_size"
        return loader, GroupLoader(held_out, size, shuffle=False, drop_last=False, size_key=size_key)

    def describe_steps(self, recipe: Recipe, loader: Loader, steps: int, updates: int) -> str:
        batch = recipe.policy.train_global_batch_size
        longest = batch * recipe.policy.max_total_sequence_length * self.rows_a_group
        return f"steps: {steps} of {batch} {self.unit}, {len(loader)} an epoch; at most {longest:,} tokens a step"

    def metric_names(self, recipe: Recipe, kind: str) -> Sequence[str]:
        return (*(TRAIN if kind == "train" else ("loss", *COUNTS)), *self.metrics)
