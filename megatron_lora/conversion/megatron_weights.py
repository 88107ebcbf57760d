"""A whole model in a distributed checkpoint, read under Hugging Face names, one tensor at a time."""

from collections.abc import Callable
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor

from megatron_lora.conversion.experts import fused_pieces, fused_shape, fused_tensors
from megatron_lora.conversion.model_names import (
    KEPT,
    ModelParameter,
    check_names,
    hf_shape,
    kept_parameter,
    model_parameters,
    unfuse,
)
from megatron_lora.conversion.safetensors_io import SINGLE_FILE, sample_positions, tensor_bytes
from megatron_lora.conversion.torch_dist import StoredTensor, TorchDistFolder
from megatron_lora.conversion.tower import FileNames
from megatron_lora.errors import UserError
from megatron_lora.lora.layout import ModelSpec

MAX_SHARD_BYTES = 5 * 10**9
# Of a model that the DTensor backend wrote: full fine-tuning, which a language tower does not take.
HF_EMBEDDING = "model.embed_tokens.weight"


class MegatronWeights:
    """A `WeightSource`. Holds one fused tensor and a part of it at a time."""

    def __init__(self, folder: Path, shapes: ModelSpec, names: FileNames | None = None):
        """folder: the weights. names: of the model's files, where they are others than its own. Raises UserError where
        the weights are damaged, or not those of a model of these shapes."""
        self.folder, self._names = folder, names
        self.shapes = shapes
        self._stored = TorchDistFolder(folder)
        self._last: tuple[str, Tensor] | None = None
        self._parameters = {name: parameter for parameter in self._table() for name in parameter.hf_names}
        self.entries = {
            name: StoredTensor(self._stored.tensors[parameter.name].dtype, hf_shape(parameter, name, shapes))
            for name, parameter in self._parameters.items()
        }
        self.packed: dict[str, tuple[int, ...]] = {}
        self._packed_names: dict[str, str] = {}
        if names is not None and names.packed:
            self._pack(names)
        self.shards = _plan_shards(self.entries, self.file_name)

    def read(self, name: str) -> Tensor:
        parameter = self._parameters[name]
        if self._last is None or self._last[0] != parameter.name:
            self._last = None
            self._last = (parameter.name, self._stored.read([parameter.name])[parameter.name])
        return unfuse(parameter, self._last[1], name, self.shapes)

    def file_name(self, name: str) -> str:
        if name in self._packed_names:
            return self._packed_names[name]
        return name if self._names is None else self._names.in_file(name)

    def _pack(self, names: FileNames) -> None:
        for whole, (linear, layer) in fused_tensors(self.shapes).items():
            name = names.in_file(whole)
            self.packed[name] = fused_shape(linear)
            self._packed_names |= dict.fromkeys(fused_pieces(linear, layer), name)

    def sample(self, name: str) -> bytes:
        content = tensor_bytes(self.read(name))
        return b"".join(content[start:stop] for start, stop in sample_positions(len(content)))

    def _table(self) -> list[ModelParameter]:
        stored = self._stored.tensors
        if HF_EMBEDDING in stored:
            # The DTensor backend writes the transformers model's own parameters.
            return [ModelParameter(name, (name,), entry.shape) for name, entry in stored.items()]
        kept = [name for name in stored if name.startswith(KEPT)]
        parameters = model_parameters(self.shapes)
        parameters += [kept_parameter(name.removeprefix(KEPT), tuple(stored[name].shape)) for name in kept]
        check_names(parameters, stored, self.folder)
        for parameter in parameters:
            found = stored[parameter.name].shape
            rows_fit = found[0] >= parameter.shape[0] if parameter.is_vocabulary else found[0] == parameter.shape[0]
            if not rows_fit or found[1:] != parameter.shape[1:]:
                raise UserError(
                    f"{parameter.name} in {self.folder} has shape {found}, the model's config says {parameter.shape}; "
                    "is it a checkpoint of another model?"
                )
        return parameters


def _plan_shards(entries: dict[str, StoredTensor], file_name: Callable[[str], str]) -> dict[str, list[str]]:
    """Safetensors files of at most 5 GB, as transformers names them; a file's tensor is in one of them."""
    groups: list[list[str]] = [[]]
    size = 0
    for _, pieces in groupby(entries, file_name):
        names = list(pieces)
        tensor_size = sum(torch.Size(entries[name].shape).numel() * entries[name].dtype.itemsize for name in names)
        if groups[-1] and size + tensor_size > MAX_SHARD_BYTES:
            groups.append([])
            size = 0
        groups[-1] += names
        size += tensor_size
    if len(groups) == 1:
        return {SINGLE_FILE: groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": names for i, names in enumerate(groups, start=1)}
