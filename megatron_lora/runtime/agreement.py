"""What one rank meets, all learn: so that none waits for another that has stopped."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from megatron_lora.errors import UserError
from megatron_lora.runtime.world import World


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


def from_first_rank(world: World, action: Callable[[], Any]) -> Any:
    """What `action` gives on rank 0, on all ranks; a UserError, RuntimeError or OSError that ends it there is a
    UserError on all. Collective."""
    box: list[Any] = [None, None]
    if world.is_main:
        try:
            box[0] = action()
        except (UserError, RuntimeError, OSError) as error:
            box[1] = str(error)
    dist.broadcast_object_list(box, src=0, device=world.device if world.device.type == "cuda" else None)
    if box[1] is not None:
        raise UserError(box[1])
    return box[0]
