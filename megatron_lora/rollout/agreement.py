"""Whether two engines' log-probabilities of the same tokens differ by more than rounding makes them differ.

No constant says how much that is: it depends on the dtype, the kernels, the model and the text. A run measures it where
nothing can be wrong yet, and judges what follows by that.
"""

import statistics
from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

# A distance of this many times the run's own counts as another model. Rounding alone stayed under 1.2 times its first
# measure while a real model trained (docs/rollouts.md).
FACTOR = 2.5
# The newest distances that were found sound; their median is the run's own.
REMEMBERED = 15
# Tokens' worth of uncertainty at a distance of nothing, so that a text of certain tokens says nothing.
PRIOR = 4.0


@dataclass(frozen=True)
class Bounds:
    """Distances, in nats, that are sound whatever the run has measured, and that never are, for one dtype."""

    always: float
    never: float


BOUNDS = {
    torch.float32: Bounds(always=1e-4, never=1e-3),
    torch.bfloat16: Bounds(always=0.05, never=0.3),
    torch.float16: Bounds(always=0.01, never=0.1),
}


def logit_distance(engine: Tensor, trainer: Tensor) -> float:
    """How far two engines' logits are apart, in nats, as the log-probabilities of sampled tokens tell: [N] each.

    To first order an error e of a token's logit moves its log-probability by (1 - p) e: nothing shows of it at a token
    that is certain. So this is the sum of |engine - trainer| over that of 1 - p, which for one pair of engines stays
    about the same whether the text is a sure one or not; a mean over tokens would fall and rise with the text.
    NaN where a log-probability is.
    """
    difference = (engine.double() - trainer.double()).abs()
    uncertainty = 1 - (engine.double().exp() + trainer.double().exp()) / 2
    return float(difference.sum() / (uncertainty.clamp(min=0).sum() + PRIOR))


class Agreement:
    """One run's measure of what rounding does between its trainer and its rollout engine.

    noise: the median of the newest distances that were sound, nats; None before the first.
    """

    def __init__(self, dtype: torch.dtype):
        self.bounds = BOUNDS[dtype]
        self._sound: deque[float] = deque(maxlen=REMEMBERED)

    @property
    def noise(self) -> float | None:
        return statistics.median(self._sound) if self._sound else None

    @property
    def tolerance(self) -> float:
        """The largest distance that counts as rounding now."""
        if self.noise is None:
            return self.bounds.never
        return min(self.bounds.never, max(self.bounds.always, FACTOR * self.noise))

    def accepts(self, distance: float) -> bool:
        """Whether the distance is rounding; if so it is remembered as such. NaN is not."""
        sound = distance <= self.tolerance
        if sound:
            self._sound.append(distance)
        return sound

    def describe(self) -> str:
        measured = "not measured yet" if self.noise is None else f"{self.noise:.1e}"
        return f"tolerance {self.tolerance:.1e} (rounding in this run: {measured})"
