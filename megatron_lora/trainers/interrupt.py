"""SIGTERM and SIGINT: finish the step, save, leave."""

import signal
from types import FrameType

import torch
import torch.distributed as dist

from megatron_lora.runtime.world import World


class Interrupt:
    """Whether any rank was asked to stop. A second signal ends the process at once."""

    def __init__(self) -> None:
        self._asked = False

    def install(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._asked:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self._asked = True

    def agreed(self, world: World) -> bool:
        """The same answer on every rank: collective."""
        flag = torch.tensor(float(self._asked), device=world.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag)
