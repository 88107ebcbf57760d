"""Global batches: seeded, resumable in mid-epoch, the same on every rank whatever the layout."""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch

from megatron_lora.errors import UserError


class Indexed[T](Protocol):
    """What a loader reads: a number of items by position."""

    def __len__(self) -> int: ...

    def __getitem__(self, position: int, /) -> T: ...


def epoch_seed(seed: int, epoch: int) -> int:
    """One seed [0, 2^63) from two numbers: their sum would give seed 43 the orders of seed 42, an epoch earlier."""
    return int(np.random.SeedSequence([seed % (1 << 64), epoch]).generate_state(1, np.uint64)[0]) >> 1


class GroupLoader[T]:
    """Hands out global batches of a data set's items (groups of rows, or prompts), epoch after epoch.

    Every rank makes the same batches, because the policy divides each among the data-parallel ranks: the order does
    not depend on the layout. With `shuffle` each epoch has its own order from `seed` and epoch; without, the file's.
    """

    def __init__(
        self,
        dataset: Indexed[T],
        global_batch_size: int,
        *,
        seed: int = 42,
        shuffle: bool = True,
        drop_last: bool = True,
        size_key: str = "policy.train_global_batch_size",
    ):
        """drop_last: leave out the rows that do not fill an epoch's last batch. Training does: one step with fewer
        rows would weigh each of them more, and with shuffling it is other rows each epoch. Validation does not: every
        row counts once. size_key names the batch size in messages. Raises UserError where no batch could be filled.
        """
        if global_batch_size < 1:
            raise UserError(f"{size_key}={global_batch_size} must be at least 1")
        if len(dataset) == 0 or (drop_last and len(dataset) < global_batch_size):
            raise UserError(
                f"{size_key}={global_batch_size}, but the data set has only {len(dataset)} usable rows; use at most "
                f"{len(dataset)} or give more data"
            )
        self.dataset = dataset
        self.global_batch_size = global_batch_size
        self.seed = seed
        self.shuffle = shuffle
        self.drop_last = drop_last
        self.epoch = 0
        self.position = 0  # items of this epoch already handed out

    def __len__(self) -> int:
        """Batches in a whole epoch."""
        full, rest = divmod(len(self.dataset), self.global_batch_size)
        return full if self.drop_last or not rest else full + 1

    def __iter__(self) -> Iterator[list[T]]:
        """What is left of the current epoch, batch by batch; then the next epoch is current.

        A batch counts as consumed once it is handed out, so a `state_dict` taken after its step goes on with the next.
        """
        order = self._order()
        while not self._epoch_is_over():
            chosen = order[self.position : self.position + self.global_batch_size]
            self.position += len(chosen)
            yield [self.dataset[index] for index in chosen]
        self.epoch += 1
        self.position = 0

    def forever(self) -> Iterator[list[T]]:
        """Batches without end, epoch after epoch."""
        while True:
            yield from self

    def state_dict(self) -> dict[str, Any]:
        """Where the next batch starts, as plain numbers; independent of world size and layout."""
        return {"epoch": self.epoch, "position": self.position, "seed": self.seed, "num_items": len(self.dataset)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken. Raises UserError if data or seed are others: the order would be another."""
        for key, ours in (("num_items", len(self.dataset)), ("seed", self.seed)):
            if state[key] != ours:
                raise UserError(
                    f"the checkpoint was made with {key}={state[key]} of its data, this run has {key}={ours}; resume "
                    "with the same data set and seed, or start in a new checkpointing.checkpoint_dir"
                )
        self.epoch = state["epoch"]
        self.position = state["position"]

    def _epoch_is_over(self) -> bool:
        left = len(self.dataset) - self.position
        return left < self.global_batch_size if self.drop_last else left <= 0

    def _order(self) -> Sequence[int]:
        if not self.shuffle:
            return range(len(self.dataset))
        generator = torch.Generator().manual_seed(epoch_seed(self.seed, self.epoch))
        return torch.randperm(len(self.dataset), generator=generator).tolist()
