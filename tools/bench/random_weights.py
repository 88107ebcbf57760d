"""Random weights that are made where they are read: a model folder whose file of weights has a header and no data.

A tensor's values follow from its name, so every engine and every rank has the same ones; nothing is written or read.
"""

import json
import struct
import zlib
from pathlib import Path

import torch
from torch import Tensor

from megatron_lora.conversion import safetensors_io
from megatron_lora.conversion.hf_model import read_hf_model
from megatron_lora.conversion.inventory import expected_tensors
from tools.bench.task import Shape, config_of

STANDARD_DEVIATION = 0.02


def write_hollow_model(shape: Shape, folder: Path, dtype: torch.dtype) -> None:
    """config.json, and a sparse file with the header of all its weights; left alone where it is there already."""
    if (folder / "config.json").exists():
        return
    folder.mkdir(parents=True)
    config_of(shape).save_pretrained(folder)
    header, end = {}, 0
    for name, size in expected_tensors(read_hf_model(folder)).items():
        start, end = end, end + torch.Size(size).numel() * dtype.itemsize
        header[name] = {"dtype": safetensors_io.NAMES[dtype], "shape": list(size), "data_offsets": [start, end]}
    raw = json.dumps(header).encode()
    with (folder / safetensors_io.SINGLE_FILE).open("wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        file.truncate(8 + len(raw) + end)


def make_weights_on(device: torch.device) -> None:
    """From now on this process makes every tensor that it would read of a model folder, on the device."""
    safetensors_io.read_tensor = lambda entry: random_tensor(entry.name, entry.shape, entry.dtype, device)


def random_tensor(name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The values of the Hugging Face tensor `name`: norms 1, biases 0, the rest normally distributed."""
    if name.endswith("norm.weight"):
        return torch.ones(shape, dtype=dtype, device=device)
    if name.endswith("bias"):
        return torch.zeros(shape, dtype=dtype, device=device)
    generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
    return torch.empty(shape, dtype=dtype, device=device).normal_(0, STANDARD_DEVIATION, generator=generator)
