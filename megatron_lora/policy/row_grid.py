"""The rows of a micro-batch one below the other, for layers that carry a state along each of them."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, eq=False)
class RowGrid:
    """places [rows, longest]: where each row's tokens stand in the flat sequence; beyond a row's end any token of it.
    back [tokens]: where each token of the flat sequence stands in the flattened grid; of one in no row anywhere.
    lengths [rows]: of the rows. What lies beyond a row's end comes after all of it, and is not read back."""

    places: Tensor
    back: Tensor
    lengths: Tensor

    @property
    def inside(self) -> Tensor:
        """[rows, longest] bool: what is of the row itself."""
        return torch.arange(self.places.shape[1], device=self.places.device) < self.lengths[:, None]


def packed_grid(bounds: Tensor, tokens: int) -> RowGrid:
    """Of rows that stand one after the other. bounds [rows + 1] int: where they begin and end. tokens: of the flat
    sequence, which those behind the last row fill up."""
    bounds = bounds.long()
    lengths = bounds.diff()
    longest = int(lengths.max())
    offsets = torch.arange(longest, device=bounds.device)
    places = (bounds[:-1, None] + offsets).clamp(max=tokens - 1)
    rows = torch.arange(lengths.numel(), device=bounds.device)
    back = (rows[:, None] * longest + offsets)[offsets < lengths[:, None]]
    return RowGrid(places, F.pad(back, (0, tokens - back.numel())), lengths)


class KeptGrid:
    """The grid of one micro-batch's rows: the first layer that asks for it makes it, which waits for the device."""

    def __init__(self) -> None:
        self._grid: RowGrid | None = None

    def of(self, bounds: Tensor, tokens: int) -> RowGrid:
        """See `packed_grid`; bounds and tokens are the same whenever it is asked."""
        if self._grid is None:
            self._grid = packed_grid(bounds, tokens)
        assert self._grid.back.numel() == tokens
        return self._grid


def even_grid(rows: int, tokens: int, device: torch.device) -> RowGrid:
    """Of rows of as many tokens, in a flat sequence that has the first token of each row first (Megatron's [tokens,
    rows])."""
    places = torch.arange(tokens * rows, device=device).view(tokens, rows).t()
    back = torch.arange(tokens * rows, device=device).view(rows, tokens).t().reshape(-1)
    return RowGrid(places, back, torch.full((rows,), tokens, device=device))
