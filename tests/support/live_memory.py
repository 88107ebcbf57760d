"""How much floating-point memory is held at once."""

import weakref
from collections import Counter
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveFloats(TorchDispatchMode):
    """Counts the bytes of floating-point tensors that operations within it make, but for those on the meta device.
    peak: the most that were alive together; now: those that are."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._holders: Counter[int] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.is_floating_point() and not leaf.is_meta:
                self._hold(leaf)
        return out

    def _hold(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        place, size = storage.data_ptr(), storage.nbytes()
        if self._holders[place] == 0:
            self.now += size
            self.peak = max(self.peak, self.now)
        self._holders[place] += 1
        weakref.finalize(tensor, self._release, place, size)

    def _release(self, place: int, size: int) -> None:
        self._holders[place] -= 1
        if self._holders[place] == 0:
            self.now -= size
