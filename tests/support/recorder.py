"""What torch really runs: operations, their outputs, collectives, and what autograd keeps."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

PRODUCTS = ("mm", "addmm", "addmm_", "bmm", "linear")


@dataclass(frozen=True)
class Operation:
    """name: as in `mm`, or `c10d.allreduce_` for a collective. shape: of the first tensor that comes out (or, for a
    collective, goes in). new: whether the output has memory of its own."""

    name: str
    shape: tuple[int, ...]
    new: bool

    @property
    def writes(self) -> bool:
        """Whether it goes over memory, unlike a view."""
        return self.new or self.name.endswith("_")


class Recorder(TorchDispatchMode):
    """Records every operation below autograd, in the forward and, on the same thread, in the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Operation] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        collective = func.namespace == "c10d"
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        tensors = [leaf for leaf in tree_leaves(args if collective else out) if isinstance(leaf, Tensor)]
        if tensors:
            name = func.overloadpacket.__name__
            storages = {tensor.untyped_storage().data_ptr() for tensor in inputs}
            new = tensors[0].untyped_storage().data_ptr() not in storages
            self.operations.append(
                Operation(f"c10d.{name}" if collective else name, tuple(tensors[0].shape), new and not collective)
            )
        return out

    def collectives(self) -> Counter[str]:
        return Counter(op.name for op in self.operations if op.name.startswith("c10d."))

    def products(self) -> list[tuple[int, ...]]:
        """The output shapes of matrix products."""
        return [op.shape for op in self.operations if op.name in PRODUCTS]


@contextmanager
def kept_for_backward() -> Iterator[list[Tensor]]:
    """The tensors that autograd keeps during the block, each as often as it is kept."""
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept
