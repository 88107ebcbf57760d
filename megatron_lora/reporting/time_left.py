"""How long a run still takes: from its recent steps, and from the validations that are to come."""

import statistics
from collections import deque
from datetime import timedelta

RECENT_STEPS = 20


class TimeLeft:
    """The estimate of one run.

    total_steps: of the whole run. val_period: steps between validations; 0: none. val_at_end: one after the last step.
    """

    def __init__(self, total_steps: int, val_period: int = 0, val_at_end: bool = False):
        self.total_steps = total_steps
        self.val_period, self.val_at_end = val_period, val_at_end
        self._steps: deque[float] = deque(maxlen=RECENT_STEPS)
        self._is_warm = False
        self._validation = 0.0

    def step_took(self, seconds: float) -> None:
        """The first step is left out: it compiles, allocates and starts workers, up to 40 times a later one's time."""
        if self._is_warm:
            self._steps.append(seconds)
        self._is_warm = True

    def validation_took(self, seconds: float) -> None:
        self._validation = seconds

    def after(self, step: int) -> float | None:
        """Seconds from the end of `step` to that of the run; None where no step tells yet how long one takes."""
        steps = max(0, self.total_steps - step)
        if steps and not self._steps:
            return None
        seconds = steps * statistics.mean(self._steps) if steps else 0.0
        return seconds + self._validations_after(step) * self._validation

    def describe(self, step: int) -> str:
        """`after`, for people: `1:02:03`."""
        seconds = self.after(step)
        return "-:--:--" if seconds is None else str(timedelta(seconds=round(seconds)))

    def _validations_after(self, step: int) -> int:
        """The one that is due after this step is still to come."""
        if self.val_period == 0:
            return int(self.val_at_end)
        periodic = self.total_steps // self.val_period - (step - 1) // self.val_period
        return periodic + int(self.val_at_end and self.total_steps % self.val_period > 0)
