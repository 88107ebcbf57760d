"""A random model whose linears are in bitsandbytes' 4-bit form, written tensor by tensor: the whole of it is never in
memory, in any dtype."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_lora.conversion.four_bit_folder import STATE
from megatron_lora.conversion.hf_model import HFModel
from megatron_lora.conversion.inventory import expected_tensors
from megatron_lora.conversion.safetensors_io import write_tensors
from megatron_lora.lora.four_bit import BLOCK_SIZE, weight_names
from tools.bench.task import Shape, config_of

# Largest magnitude of each block: the values then spread as a trained model's do.
LARGEST = 0.04


def save_random_four_bit(shape: Shape, folder: Path, device: str) -> None:
    """Left alone where it is there already. device: where numbers are drawn."""
    if (folder / "config.json").exists():
        return
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    config = config_of(shape)
    config.dtype = dtype
    content = config.to_dict() | {"architectures": [type(config).__name__.replace("Config", "ForCausalLM")]}
    name = str(dtype).removeprefix("torch.")
    content["quantization_config"] = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": False,
        "bnb_4bit_compute_dtype": name,
    }
    model = HFModel(str(folder), content, config)
    described: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    four_bit = weight_names(model.shapes)
    for weight, size in expected_tensors(model).items():
        described |= _described(size, weight, dtype) if weight in four_bit else {weight: (dtype, size)}
    temporary = folder.with_name(folder.name + ".part")
    temporary.mkdir(parents=True)
    write_tensors(temporary / "model.safetensors", described, _drawn(described, expected_tensors(model), name, device))
    (temporary / "config.json").write_text(json.dumps(content, indent=2, default=str) + "\n")
    temporary.rename(folder)


def _state(size: tuple[int, ...], dtype: str) -> Tensor:
    content: dict[str, Any] = {"quant_type": "nf4", "blocksize": BLOCK_SIZE, "dtype": dtype, "shape": list(size)}
    return torch.tensor(list(json.dumps(content).encode()), dtype=torch.uint8)


def _described(
    size: tuple[int, ...], weight: str, dtype: torch.dtype
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    rows, columns = size
    name = str(dtype).removeprefix("torch.")
    return {
        weight: (torch.uint8, (rows * columns // 2, 1)),
        f"{weight}.absmax": (torch.float32, (rows * columns // BLOCK_SIZE,)),
        f"{weight}.quant_map": (torch.float32, (16,)),
        f"{weight}{STATE}nf4": (torch.uint8, tuple(_state(size, name).shape)),
    }


def _drawn(
    described: dict[str, tuple[torch.dtype, tuple[int, ...]]],
    sizes: dict[str, tuple[int, ...]],
    dtype: str,
    device: str,
) -> Iterator[tuple[str, Tensor]]:
    from bitsandbytes.functional import get_4bit_type

    generator = torch.Generator(device).manual_seed(0)
    for name, (kind, size) in described.items():
        if STATE in name:
            yield name, _state(sizes[name.partition(STATE)[0]], dtype)
        elif name.endswith(".quant_map"):
            yield name, get_4bit_type("nf4", device="cpu")
        elif name.endswith(".absmax"):
            yield name, torch.rand(size, generator=generator, device=device).add_(0.5).mul_(LARGEST).cpu()
        elif kind == torch.uint8:
            yield name, torch.randint(0, 256, size, generator=generator, device=device, dtype=kind).cpu()
        elif len(size) == 1:
            yield name, torch.full(size, 1.0 if "norm" in name else 0.0, dtype=kind)
        else:
            yield name, torch.randn(size, generator=generator, device=device).mul_(0.02).to(kind).cpu()
