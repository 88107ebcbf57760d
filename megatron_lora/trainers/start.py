"""Where a run starts: at its first step, or after a checkpoint of its folder that was checked."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_lora.config.schema import Recipe
from megatron_lora.data.loader import GroupLoader
from megatron_lora.metrics import check_metrics
from megatron_lora.runtime.world import World
from megatron_lora.trainers.identity import RunIdentity
from megatron_lora.trainers.resume import check_goes_on, find_checkpoint
from megatron_lora.trainers.run_folder import RunFolder, Step
from megatron_lora.trainers.run_lock import RunLock
from megatron_lora.trainers.setup import Prepared


@dataclass(frozen=True)
class Start:
    """step: None at the beginning. identity: what the run's checkpoints will say they are of. warnings: what must not
    be missed; notices: what is good to know."""

    step: Step | None
    identity: RunIdentity
    warnings: Sequence[str] = field(default_factory=list)
    notices: Sequence[str] = field(default_factory=list)

    @property
    def number(self) -> int:
        return self.step.number if self.step is not None else 0

    def batches_left(self, recipe: Recipe, loader: GroupLoader[Any]) -> int | None:
        """Up to the end of the epochs, where another batch size is used from here on; None where all are alike."""
        if self.step is None or not loader.has_another_batch_size(self.step.info["loader"]):
            return None
        return loader.batches_left(self.step.info["loader"], recipe.section.max_num_epochs)


def open_folder(recipe: Recipe) -> RunFolder:
    """The run's folder, as yet unchanged. Raises UserError where it cannot be used."""
    folder = RunFolder(Path(recipe.checkpointing.checkpoint_dir))
    folder.check(recipe.checkpointing.resume)
    RunLock(folder.path).check()
    return folder


def find_start(prepared: Prepared, folder: RunFolder, loader: GroupLoader[Any], world: World) -> Start:
    """Collective. Raises UserError where the run may not go on from what the folder holds."""
    recipe = prepared.recipe
    identity = RunIdentity.of(recipe, prepared.tokenizer, prepared.train, prepared.validation)
    step, warnings = find_checkpoint(folder, lambda mine: _over_ranks(mine, world), world.rank, world.size)
    if step is None:
        return Start(None, identity, warnings)
    notices = check_goes_on(step, recipe, identity, loader)
    return Start(step, identity, [*warnings, *check_metrics(folder.path, step.number)], notices)


def _over_ranks(mine: dict[str, str], world: World) -> dict[str, str]:
    if world.size == 1:
        return mine
    everyone: list[Any] = [None] * world.size
    dist.all_gather_object(everyone, mine)
    return {name: problem for part in everyone for name, problem in part.items()}
