"""A base's Hugging Face tensors into this rank's part of a Megatron model."""

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from megatron_lora.conversion.model_names import EMBEDDING, ModelParameter, fuse, model_parameters, shard_parameter
from megatron_lora.conversion.weight_source import WeightSource
from megatron_lora.lora.layout import ModelSpec
from megatron_lora.runtime.world import World


def global_names(chunk: GPTModel) -> dict[str, Tensor]:
    """A chunk's parameters by name, with the global layer number (from 0)."""
    layers: Any = chunk.decoder.layers
    numbers = {str(index): layer.layer_number - 1 for index, layer in enumerate(layers)}
    result = {}
    for name, parameter in chunk.named_parameters():
        parts = name.split(".")
        if parts[:2] == ["decoder", "layers"]:
            parts[2] = str(numbers[parts[2]])
        result[".".join(parts)] = parameter
    return result


@torch.no_grad()
def load_base_weights(chunks: Sequence[GPTModel], weights: WeightSource, shapes: ModelSpec, world: World) -> None:
    """Fill every parameter of the chunks, a fused tensor at a time. No communication: each rank reads what it needs."""
    table = {parameter.name: parameter for parameter in model_parameters(shapes)}
    for chunk in chunks:
        for name, value in global_names(chunk).items():
            if value.numel() == 0:
                continue  # Transformer Engine's stand-in for a bias that is not there
            entry = table.get(name)
            if entry is None and name == "output_layer.weight":
                # A later pipeline stage's copy of the tied embedding.
                entry = table[EMBEDDING]
            assert entry is not None, f"no HF tensor is known for {name}"
            value.copy_(_local(entry, value, weights, shapes, world))


def _local(entry: ModelParameter, value: Tensor, weights: WeightSource, shapes: ModelSpec, world: World) -> Tensor:
    parts = [weights.read(name).to(value.dtype) for name in entry.hf_names]
    local = shard_parameter(entry, fuse(entry, parts, shapes), world.tp_rank, world.tp, value.shape[0], shapes)
    assert local.shape == value.shape, f"{entry.name}: {tuple(local.shape)} for {tuple(value.shape)}"
    return local
