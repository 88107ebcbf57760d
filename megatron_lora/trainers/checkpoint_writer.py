"""Writes `step_N/`, whole or not at all, now or in the background; a failure is the same short message on every
rank."""

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint import CheckpointException

from megatron_lora.checksums import compute_checksums
from megatron_lora.config.loader import dump_recipe
from megatron_lora.config.schema import Recipe
from megatron_lora.conversion.export import write_peft_folder
from megatron_lora.policy.interface import AdapterTensors, PendingSave, Policy
from megatron_lora.runtime.agreement import same_on_every_rank
from megatron_lora.runtime.world import World
from megatron_lora.trainers.run_folder import CRITIC, LATEST, Keeping, RunFolder
from megatron_lora.trainers.write_failure import WriteFailure, describe_failure, folder_bytes


class CheckpointWriter:
    """One run's. Every method is collective. expected_bytes: about what a checkpoint takes, for messages."""

    def __init__(
        self, recipe: Recipe, world: World, folder: RunFolder, policy: Policy, tokenizer: Any, expected_bytes: int
    ):
        self.recipe, self.world, self.folder = recipe, world, folder
        self.policy, self.tokenizer = policy, tokenizer
        self.expected_bytes = expected_bytes
        options = recipe.checkpointing
        self.keeping = Keeping(options.keep_top_k, options.metric_name, options.higher_is_better)
        self._pending: Callable[[bool], bool] | None = None

    def save(self, number: int, info: Mapping[str, Any]) -> None:
        """Write step `number`, after the one before is done. info: for training_info.json. Raises WriteFailure."""
        self.poll(blocking=True)
        with self._failing_alike(number):
            pending = self._write(number)

        def complete(blocking: bool) -> bool:
            with self._failing_alike(number):
                if pending is not None and not pending(blocking):
                    return False
                self._complete(number, info)
            return True

        self._pending = complete
        self.poll(blocking=pending is None)

    def poll(self, *, blocking: bool) -> None:
        """Complete a checkpoint whose writing in the background is done; blocking: wait for it."""
        if self._pending is None:
            return
        try:
            done = self._pending(blocking)
        except WriteFailure:
            self._pending = None
            raise
        if done:
            self._pending = None

    def _write(self, number: int) -> PendingSave | None:
        options, partial = self.recipe.checkpointing, self.folder.partial(number)
        with same_on_every_rank(self.world.size):
            if self.world.is_main:
                partial.mkdir(parents=True, exist_ok=False)
        if self.policy.critic is not None:
            # Now: Megatron's writers in the background would take each other's results.
            critic = partial / CRITIC
            self.policy.critic.save(critic / "weights", critic / "optimizer" if options.save_optimizer else None)
        pending = self.policy.save(
            partial / "policy" / "weights",
            partial / "policy" / "optimizer" if options.save_optimizer else None,
            asynchronous=self.recipe.policy.megatron_cfg.checkpoint.async_save,
        )
        adapter = self.policy.adapter("packed") if self.recipe.policy.adapter.enabled else None
        with same_on_every_rank(self.world.size):
            if self.world.is_main:
                self._write_small_files(number, adapter)
        return pending

    def _write_small_files(self, number: int, adapter: AdapterTensors | None) -> None:
        partial = self.folder.partial(number)
        self.tokenizer.save_pretrained(partial / "policy" / "tokenizer")
        if adapter is not None:
            write_peft_folder(partial / "hf_adapter", adapter.config, adapter.tensors)
            # Whoever serves the adapter needs the run's template and end token, as with an exported one.
            shutil.copytree(partial / "policy" / "tokenizer", partial / "hf_adapter", dirs_exist_ok=True)
        (partial / "config.yaml").write_text(dump_recipe(self.recipe))

    def _complete(self, number: int, info: Mapping[str, Any]) -> None:
        """Everything is written: checksums, each rank's share, then the name that makes it official."""
        names: list[Any] = [None]
        with same_on_every_rank(self.world.size):
            if self.world.is_main:
                names = [self.folder.seal(number, info)]
        dist.broadcast_object_list(names, src=0)
        partial = self.folder.partial(number)
        everyone: list[Any] = [None] * self.world.size
        dist.all_gather_object(everyone, compute_checksums(partial, names[0][self.world.rank :: self.world.size]))
        checksums = {name: value for part in everyone for name, value in part.items()}
        with same_on_every_rank(self.world.size):
            if self.world.is_main:
                unread = [name for name, value in checksums.items() if not value]  # a machine without this file system
                self.folder.finish(number, checksums | compute_checksums(partial, unread), self.keeping)

    @contextmanager
    def _failing_alike(self, number: int) -> Iterator[None]:
        """An error of the file system, or of the writers because of it, becomes one message; nothing of the step is
        left."""
        try:
            yield
        except (OSError, CheckpointException) as error:
            message = f"step_{number} could not be written"
            if self.world.is_main:
                self.folder.discard(number)
                message = self._explain(number, error)
            raise WriteFailure(message) from error

    def _explain(self, number: int, error: BaseException) -> str:
        written = next((step for step in self.folder.steps() if step.problem is None), None)
        needed = folder_bytes(written.path) if written is not None else self.expected_bytes
        reason = describe_failure(error, self.folder.path, needed)
        if written is not None and written.number == number:
            return f"step_{number} is complete, but {LATEST} beside it could not be written ({reason})"
        stands = f"{written.path.name} stands" if written is not None else "none was completed before"
        return (
            f"step_{number} could not be written to {self.folder.path} ({reason}); nothing of it is left there, "
            f"{stands}. Make room or name another place, then give the same command to go on "
            "(checkpointing.keep_top_k and save_optimizer=false save room)"
        )


def expected_bytes(recipe: Recipe, num_trainable: int) -> int:
    """About what a checkpoint takes: weights, adapters once more under HF names, fp32 masters and Adam's moments."""
    itemsize = 4 if recipe.policy.precision == "float32" else 2
    copies = 2 if recipe.policy.adapter.enabled else 1
    optimizer = 12 if recipe.checkpointing.save_optimizer else 0
    return num_trainable * (copies * itemsize + optimizer)
