"""Short names for weights: two folders or adapters with the same weights have the same fingerprint."""

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from megatron_lora.conversion.four_bit_folder import FourBitFolder, QuantizedWeights
from megatron_lora.conversion.safetensors_io import SafetensorsFolder
from megatron_lora.conversion.weight_source import WeightSource

DIGITS = 32


def fingerprint_base(folder: Path | str) -> str:
    """Of an HF folder's safetensors: takes milliseconds a file. Raises UserError as `SafetensorsFolder` does."""
    return fingerprint_weights(SafetensorsFolder(Path(folder)))


def fingerprint_weights(weights: WeightSource) -> str:
    """Of a whole model: names, dtypes, shapes and about 1 KiB sampled from each tensor, whatever files they lie in."""
    if isinstance(weights, FourBitFolder):
        weights = weights.stored
    elif isinstance(weights, QuantizedWeights):
        weights = weights.weights
    # Sampled in the order in which they lie, which is the quick one.
    samples = {name: weights.sample(name) for names in weights.shards.values() for name in names}
    digest = hashlib.sha256()
    # As the files name them, whatever the model does.
    for name in sorted(samples, key=weights.file_name):
        entry = weights.entries[name]
        digest.update(f"{weights.file_name(name)}|{entry.dtype}|{entry.shape}|".encode())
        digest.update(samples[name])
    return digest.hexdigest()[:DIGITS]


def fingerprint_adapter(tensors: Mapping[str, Tensor]) -> str:
    """Of an adapter's tensors: names, dtypes, shapes and every byte. Any order."""
    return fingerprint_stream((name, tensors[name]) for name in sorted(tensors))


def fingerprint_stream(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """`fingerprint_adapter` of tensors that come one at a time, sorted by name."""
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:DIGITS]
