"""Global batches: seeded, resumable in mid-epoch, the same on every rank whatever the layout."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
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
        self.size_key = size_key
        self.epoch = 0
        self.position = 0  # items of this epoch already handed out
        self._named_epoch, self._name = -1, ""

    def __len__(self) -> int:
        """Batches in a whole epoch."""
        full, rest = divmod(len(self.dataset), self.global_batch_size)
        return full if self.drop_last or not rest else full + 1

    def __iter__(self) -> Iterator[list[T]]:
        """What is left of the current epoch, batch by batch; then the next epoch is current.

        A batch counts as consumed once it is handed out, so a `state_dict` taken after its step goes on with the next.
        """
        order = self._order(self.epoch)
        while not self._is_over(self.position):
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
        """Where the next batch starts, as plain numbers; independent of world size and layout. order: the name of this
        epoch's order, so that whatever makes another one is noticed."""
        return {
            "epoch": self.epoch,
            "position": self.position,
            "seed": self.seed,
            "num_items": len(self.dataset),
            "shuffle": self.shuffle,
            "global_batch_size": self.global_batch_size,
            "order": self._order_name(self.epoch),
        }

    def check_state(self, state: Mapping[str, Any]) -> list[str]:
        """Whether this loader can go on where `state` was taken; returns notices.

        Raises UserError where the rows already seen would be other ones: another number of rows, another seed, or in
        mid-epoch another order. Another batch size goes on at the same row. States of older releases do not tell all
        of it.
        """
        ours = {
            "num_items": (len(self.dataset), "rows of its data"),
            "seed": (self.seed, "the seed of their order"),
        }
        for key, (value, meaning) in ours.items():
            if state[key] != value:
                raise UserError(
                    f"the checkpoint was made with {key}={state[key]} ({meaning}), this run has {key}={value}; resume "
                    "with the same data set and seed, or start in a new checkpointing.checkpoint_dir"
                )
        in_mid_epoch = 0 < state["position"] and not self._is_over(state["position"])
        shuffle = state.get("shuffle", self.shuffle)
        if in_mid_epoch and shuffle != self.shuffle:
            raise UserError(
                f"the checkpoint was made with data.shuffle={_yaml(shuffle)}, in the middle of an epoch "
                f"({state['position']} of {len(self.dataset)} rows seen), this run has "
                f"data.shuffle={_yaml(self.shuffle)}: "
                "some rows would come twice and others never; restore the key, or change it at the end of an epoch"
            )
        if in_mid_epoch and state.get("order", "") not in ("", self._order_name(state["epoch"])):
            raise UserError(
                f"the order of rows in epoch {state['epoch'] + 1} is not the one in which the checkpoint has seen "
                f"{state['position']} of {len(self.dataset)}: another release or version of torch draws another order; "
                "resume with the one that wrote the checkpoint, or start in a new checkpointing.checkpoint_dir"
            )
        notices = []
        if in_mid_epoch and "order" not in state:
            notices.append(
                "the checkpoint is of an older release, which may have drawn another order: of this epoch's rows "
                "some may come twice and others not at all"
            )
        if self.has_another_batch_size(state):
            notices.append(
                f"{self.size_key} was {state['global_batch_size']}, is {self.global_batch_size}: the run goes on at "
                "the same row, and its steps are counted from there"
            )
        return notices

    def has_another_batch_size(self, state: Mapping[str, Any]) -> bool:
        return state.get("global_batch_size", self.global_batch_size) != self.global_batch_size

    def batches_left(self, state: Mapping[str, Any], num_epochs: int) -> int:
        """From where `state` was taken to the end of epoch `num_epochs`."""
        left = len(self.dataset) - state["position"]
        current = left // self.global_batch_size if self.drop_last else -(-left // self.global_batch_size)
        return max(0, current + (num_epochs - state["epoch"] - 1) * len(self))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken. Raises UserError as `check_state` does."""
        self.check_state(state)
        self.epoch = state["epoch"]
        self.position = state["position"]

    def _order_name(self, epoch: int) -> str:
        if self._named_epoch != epoch:
            order = torch.tensor(self._order(epoch), dtype=torch.int64)
            self._named_epoch, self._name = epoch, hashlib.sha256(order.numpy().tobytes()).hexdigest()[:16]
        return self._name

    def _is_over(self, position: int) -> bool:
        left = len(self.dataset) - position
        return left < self.global_batch_size if self.drop_last else left <= 0

    def _order(self, epoch: int) -> Sequence[int]:
        if not self.shuffle:
            return range(len(self.dataset))
        generator = torch.Generator().manual_seed(epoch_seed(self.seed, epoch))
        return torch.randperm(len(self.dataset), generator=generator).tolist()


def _yaml(value: bool) -> str:
    return "true" if value else "false"
