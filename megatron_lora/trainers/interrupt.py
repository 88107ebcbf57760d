"""SIGTERM and SIGINT: finish the step, save, leave."""

import signal
import time
from types import FrameType

from megatron_lora.runtime.agreement import any_rank
from megatron_lora.runtime.world import World

SAME_REQUEST_SECONDS = 5.0  # torchrun passes on a signal that a scheduler has already sent to the ranks themselves


class Interrupt:
    """Whether any rank was asked to stop. A second request ends the process at once."""

    def __init__(self) -> None:
        self._asked_at: float | None = None

    def install(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._asked_at is None:
            self._asked_at = now
        elif now - self._asked_at > SAME_REQUEST_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    def agreed(self, world: World) -> bool:
        """The same answer on every rank: collective."""
        return any_rank(self._asked_at is not None, world.device)
