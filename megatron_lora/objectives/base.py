"""The loss contract: what an objective returns, and what the engine may ask of it."""

from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from megatron_lora.data.batch import MicroBatch, Row


@dataclass
class LossSum:
    """A loss summed over what the objective counts, and metrics summed over the same.

    loss: scalar tensor with grad. metrics: name -> detached scalar tensor, each a sum; the engine adds them over
    micro-batches and ranks and the objective's `count` turns them into means.
    """

    loss: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)


class Objective(Protocol):
    """One formula. Pure: no process group, no engine.

    An objective with an attribute `candidates`, the name of a token field of token ids [T, k], is called with [T, 1 +
    k]: the log-probability of each target, then those of the field's tokens in its place.
    """

    def count(self, rows: list[Row]) -> float:
        """What the loss of these rows is to be divided by (target tokens, pairs or sequences), summed over rows."""
        ...

    def __call__(self, logps: Tensor, batch: MicroBatch) -> LossSum:
        """logps: [T] fp32 nats, logps[t] = log p(targets[t] | row so far); meaningful where target_mask."""
        ...


class CountsTargets:
    """What counts each target token once."""

    def count(self, rows: list[Row]) -> float:
        return float(sum(row.num_targets for row in rows))
