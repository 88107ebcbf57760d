"""A whole model in a distributed checkpoint, read under Hugging Face names, one tensor at a time."""

from pathlib import Path

import torch
from torch import Tensor

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
        self.shards = _plan_shards(self.entries)

    def read(self, name: str) -> Tensor:
        parameter = self._parameters[name]
        if self._last is None or self._last[0] != parameter.name:
            self._last = None
            self._last = (parameter.name, self._stored.read([parameter.name])[parameter.name])
        return unfuse(parameter, self._last[1], name, self.shapes)

    def file_name(self, name: str) -> str:
        return name if self._names is None else self._names.in_file(name)

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


def _plan_shards(entries: dict[str, StoredTensor]) -> dict[str, list[str]]:
    """Safetensors files of at most 5 GB, as transformers names them."""
    groups: list[list[str]] = [[]]
    size = 0
    for name, entry in entries.items():
        tensor_size = torch.Size(entry.shape).numel() * entry.dtype.itemsize
        if groups[-1] and size + tensor_size > MAX_SHARD_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += tensor_size
    if len(groups) == 1:
        return {SINGLE_FILE: groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": names for i, names in enumerate(groups, start=1)}
