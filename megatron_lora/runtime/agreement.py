"""What one rank meets, all learn: so that none waits for another that has stopped."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from megatron_lora.errors import UserError


@contextmanager
def same_on_every_rank(size: int) -> Iterator[None]:
    """A UserError or OSError that one of `size` ranks meets inside is raised on all of them, at the end of the block.
    Collective: a barrier besides."""
    mine: UserError | OSError | None = None
    try:
        yield
    except (UserError, OSError) as error:
        mine = error
    # Plain values: not every exception survives being sent.
    told: Any = None
    if isinstance(mine, OSError):
        told = (mine.errno, mine.strerror or str(mine), str(mine.filename or ""))
    elif mine is not None:
        told = str(mine)
    everyone: list[Any] = [None] * size
    dist.all_gather_object(everyone, told)
    if mine is not None:
        raise mine
    for found in everyone:
        if isinstance(found, str):
            raise UserError(found)
        if found is not None:
            raise OSError(*found)


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set on any rank: the same answer on all. Collective."""
    box = torch.tensor(float(flag), device=device)
    dist.all_reduce(box, op=dist.ReduceOp.MAX)
    return bool(box)
