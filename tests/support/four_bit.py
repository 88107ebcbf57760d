"""Bases in 4 bits: as transformers and bitsandbytes write them, and the same values dense."""

import json
import shutil
from pathlib import Path

import torch
from bitsandbytes import functional as bnb
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from megatron_lora.conversion.base_model import WEIGHT_ENDINGS
from megatron_lora.conversion.four_bit_folder import QuantizedWeights
from megatron_lora.conversion.hf_model import read_hf_model
from megatron_lora.conversion.safetensors_io import SafetensorsFolder, write_tensor_dict
from megatron_lora.lora.four_bit import weight_names


def save_four_bit(base: Path, folder: Path, kind: str = "nf4", *, double: bool = False) -> Path:
    """The model of a dense folder, quantized by bitsandbytes and saved by transformers."""
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = AutoModelForCausalLM.from_pretrained(
        base, quantization_config=quantization, dtype=torch.float32, device_map="cpu"
    )
    model.save_pretrained(folder)
    return folder


def save_dequantized(base: Path, folder: Path, *, double: bool = False) -> Path:
    """A dense folder with the values that a run with `quantization: nf4` over `base` computes with."""
    stored = SafetensorsFolder(base)
    weights = QuantizedWeights(stored, weight_names(read_hf_model(base).shapes), double=double)
    folder.mkdir(parents=True)
    for path in base.iterdir():
        if path.is_file() and not path.name.endswith(WEIGHT_ENDINGS):
            shutil.copyfile(path, folder / path.name)
    write_tensor_dict(folder / "model.safetensors", {name: weights.read(name) for name in stored.entries})
    return folder


def save_with_experts(base: Path, folder: Path) -> Path:
    """A folder of the form that transformers 4 wrote of a model with experts: every layer's linears in 4 bits."""
    stored, names = SafetensorsFolder(base), weight_names(read_hf_model(base).shapes)
    tensors: dict[str, torch.Tensor] = {}
    for name in stored.entries:
        tensors[name] = stored.read(name)
        if name in names:
            packed, state = bnb.quantize_4bit(tensors[name], quant_type="nf4")
            tensors |= {name: packed} | {f"{name}.{part}": value for part, value in state.as_dict(packed=True).items()}
    folder.mkdir()
    content = json.loads((base / "config.json").read_text())
    quantization = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    (folder / "config.json").write_text(json.dumps(content | {"quantization_config": quantization}))
    write_tensor_dict(folder / "model.safetensors", tensors)
    return folder
