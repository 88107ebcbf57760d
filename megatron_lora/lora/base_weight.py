"""The frozen weight under an adapter, as the few products that need it: dense, or stored in another form.

A weight that is not dense is made dense within a product and forgotten with it: nothing of it is kept for the backward
pass, which makes it dense again.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

# Rows that are made dense at once where a whole matrix is walked through: so many elements.
CHUNK_ELEMENTS = 1 << 24


class BaseWeight(ABC):
    """W [out, in] of a frozen linear, this rank's part. dtype: of its dense form, in which products are taken."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]: ...

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype: ...

    @property
    @abstractmethod
    def device(self) -> torch.device: ...

    @property
    @abstractmethod
    def num_bytes(self) -> int:
        """What it takes of the device's memory between products."""

    @abstractmethod
    def dense(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows [start, stop) of W, for reading only."""

    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [t, in] -> x W^T + bias [t, out]."""
        return torch.nn.functional.linear(x, self.dense(), bias)

    def input_gradient(self, dy: Tensor, out: Tensor | None = None) -> Tensor:
        """dy [t, out] -> dy W [t, in], into `out` where it is given."""
        return torch.mm(dy, self.dense(), out=out)

    def row_chunks(self) -> Iterator[tuple[slice, Tensor]]:
        """(which rows, those rows of W), one after the other, so few at once that fp32 copies of them stay small."""
        rows = max(1, CHUNK_ELEMENTS // self.shape[1])
        for start in range(0, self.shape[0], rows):
            yield slice(start, start + rows), self.dense(start, start + rows)


@dataclass(frozen=True)
class DenseWeight(BaseWeight):
    """A weight that is a tensor."""

    weight: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.weight.shape
        return rows, columns

    @property
    def dtype(self) -> torch.dtype:
        return self.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.weight.device

    @property
    def num_bytes(self) -> int:
        return self.weight.nbytes

    def dense(self, start: int = 0, stop: int | None = None) -> Tensor:
        return self.weight if start == 0 and stop is None else self.weight[start:stop]


class ExpertWeight(ABC):
    """The frozen weights of one linear of all of a rank's experts, [experts, out, in], this rank's part of each."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int, int]: ...

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype: ...

    @property
    @abstractmethod
    def device(self) -> torch.device: ...

    @abstractmethod
    def dense(self) -> Tensor:
        """Of all experts, for reading only."""

    @abstractmethod
    def expert(self, place: int) -> BaseWeight:
        """[out, in] of the expert at this place among the rank's."""


@dataclass(frozen=True)
class DenseExperts(ExpertWeight):
    """Weights that are one tensor."""

    weight: Tensor

    @property
    def shape(self) -> tuple[int, int, int]:
        experts, rows, columns = self.weight.shape
        return experts, rows, columns

    @property
    def dtype(self) -> torch.dtype:
        return self.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.weight.device

    def dense(self) -> Tensor:
        return self.weight

    def expert(self, place: int) -> BaseWeight:
        return DenseWeight(self.weight[place])
