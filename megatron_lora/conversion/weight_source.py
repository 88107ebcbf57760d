"""Something that gives a model's tensors under Hugging Face names, one at a time: an HF folder or a checkpoint."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor


class Described(Protocol):
    """A tensor that is not in memory."""

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def shape(self) -> tuple[int, ...]: ...


class WeightSource(Protocol):
    """folder: where the weights lie. entries: every tensor by its name in the HF model. shards: safetensors file name
    -> the tensors in it, in order: as they are stored, or as they should be."""

    @property
    def folder(self) -> Path: ...

    @property
    def entries(self) -> Mapping[str, Described]: ...

    @property
    def shards(self) -> Mapping[str, Sequence[str]]: ...

    @property
    def packed(self) -> Mapping[str, tuple[int, ...]]:
        """Of tensors of the files that are read in pieces, a piece an expert's matrix: their names in the files, and
        their shapes. Pieces of one have its `file_name`, and stand in its order in `shards`."""
        ...

    def read(self, name: str) -> Tensor: ...

    def file_name(self, name: str) -> str:
        """A tensor's name in the files of the HF model: another than the model's own in some that see (`tower`)."""
        ...

    def sample(self, name: str) -> bytes:
        """A few bytes from all over the tensor, the same whatever holds it; see `safetensors_io.sample_positions`."""
        ...
