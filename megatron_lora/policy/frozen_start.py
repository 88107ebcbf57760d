"""The trained tensors as they were when the run began: put back for as long as a reference policy is asked for, and
compared. An adapter's copy is small; in full fine-tuning it is another whole model, in CPU memory unless asked
otherwise."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


class FrozenStart:
    """A copy of tensors in memory of its own, which changes places with them.

    tensors: what this rank holds; each call gets the same ones, whose values may have changed. on_cpu: where the copies
    lie; else beside the tensors.
    """

    def __init__(self, tensors: Sequence[Tensor], *, on_cpu: bool = False):
        self._copies = [_copy(tensor, on_cpu=on_cpu) for tensor in tensors]

    @property
    def num_bytes(self) -> int:
        return sum(copy.numel() * copy.element_size() for copy in self._copies)

    @contextmanager
    def put_back(self, tensors: Sequence[Tensor]) -> Iterator[None]:
        """Within it the tensors have their starting values; bit for bit as before afterwards, also on an exception.

        In place, one tensor at a time: the copies hold the present values meanwhile, so that no third model is needed.
        """
        swapped: list[tuple[Tensor, Tensor]] = []
        try:
            for tensor, copy in zip(tensors, self._copies, strict=True):
                _swap(tensor, copy)
                swapped.append((tensor, copy))
            yield
        finally:
            for tensor, copy in swapped:
                _swap(tensor, copy)

    def equals(self, tensors: Sequence[Tensor]) -> bool:
        """Whether every tensor has its starting value."""
        return all(
            torch.equal(tensor.detach().to(copy.device), copy)
            for tensor, copy in zip(tensors, self._copies, strict=True)
        )


def _copy(tensor: Tensor, *, on_cpu: bool) -> Tensor:
    if not on_cpu:
        return tensor.detach().clone()
    # Pinned, so that a GPU reads and writes it at full speed.
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.device.type == "cuda")
    return copy.copy_(tensor.detach())


@torch.no_grad()
def _swap(tensor: Tensor, copy: Tensor) -> None:
    if tensor.shape != copy.shape or tensor.dtype != copy.dtype:
        raise ValueError(f"{tuple(tensor.shape)} {tensor.dtype} is not the {tuple(copy.shape)} {copy.dtype} it was")
    present = tensor.detach().clone()
    tensor.detach().copy_(copy)
    copy.copy_(present)
