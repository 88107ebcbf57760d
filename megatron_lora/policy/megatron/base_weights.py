"""A base's Hugging Face tensors into this rank's part of a Megatron model."""

import functools
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, VocabParallelEmbedding
from megatron.core.transformer.moe.router import Router as CoreRouter
from torch import Tensor

from megatron_lora.conversion.experts import unpacked
from megatron_lora.conversion.model_names import EMBEDDING, ModelParameter, fuse, model_parameters, shard_parameter
from megatron_lora.conversion.weight_source import WeightSource
from megatron_lora.lora.arithmetic import TensorParallel
from megatron_lora.lora.base_weight import BaseWeight, ExpertWeight
from megatron_lora.lora.expert_linear import ExpertLinear
from megatron_lora.lora.four_bit import FourBitExperts, FourBitWeight
from megatron_lora.lora.fp8 import Fp8Weight
from megatron_lora.lora.frozen_linear import (
    FrozenColumnParallelLinear,
    FrozenLinear,
    FrozenReplicatedLinear,
    FrozenRowParallelLinear,
)
from megatron_lora.lora.inject import expert_linears, global_linears
from megatron_lora.lora.layout import ModelSpec
from megatron_lora.lora.methods import ReadWeight
from megatron_lora.policy.fp8_base import fp8_names
from megatron_lora.policy.quantization import local_experts, local_matrix
from megatron_lora.runtime.world import World

# A parameter of a rank's experts as `lora.expert_linear` names it, and one expert's part under the global names of
# `conversion.model_names`.
_EXPERTS = re.compile(r"(.*\.mlp\.experts\.linear_fc[12])\.(weight|bias)")
_EXPERT = re.compile(r"(.*\.mlp\.experts\.linear_fc[12])\.(\d+)\.(weight|bias)")
# By the axis that tensor parallelism splits.
_FROZEN: dict[int | None, type[FrozenLinear]] = {
    0: FrozenColumnParallelLinear,
    1: FrozenRowParallelLinear,
    None: FrozenReplicatedLinear,
}
# A linear's weight in the form in which it is held, given its row in the table of the model's parameters and the tensor
# in whose place it stands, which has a shape and a dtype but no memory; None: dense.
Held = Callable[[ModelParameter, Tensor], BaseWeight | None]
# The same of one linear of a rank's experts, given the rows of the table (of each expert, or the one of all), the
# experts' numbers in the layer and the dtype of products.
HeldExperts = Callable[[Sequence[ModelParameter], Sequence[int], torch.dtype], ExpertWeight | None]


def global_names(chunk: GPTModel, first_expert: int) -> dict[str, Tensor]:
    """A chunk's parameters by name, with the global layer number (from 0); those of experts one by one, with the global
    number of the expert, the first of which that this rank holds is `first_expert`."""
    layers: Any = chunk.decoder.layers
    numbers = {str(index): layer.layer_number - 1 for index, layer in enumerate(layers)}
    result = {}
    # The bias by which a router chooses experts is a buffer in Megatron-Core and in transformers.
    buffers = ((name, buffer) for name, buffer in chunk.named_buffers() if name.endswith("router.expert_bias"))
    for name, parameter in (*chunk.named_parameters(), *buffers):
        parts = name.split(".")
        if parts[:2] == ["decoder", "layers"]:
            parts[2] = str(numbers[parts[2]])
        name = ".".join(parts)
        found = _EXPERTS.fullmatch(name)
        if found:
            result |= {f"{found[1]}.{first_expert + n}.{found[2]}": own for n, own in enumerate(parameter)}
        else:
            result[name] = parameter
    return result


def stored_weights(chunk: GPTModel) -> dict[str, BaseWeight]:
    """The weights of a chunk's linears that are no parameters, by name as in `global_names`."""
    linears = ((name, getattr(parent, attribute)) for name, parent, attribute in global_linears(chunk))
    found = {
        f"{name}.weight": linear.stored_weight
        for name, linear in linears
        if isinstance(linear, FrozenLinear) and linear.stored_weight is not None
    }
    for name, numbers, experts in expert_linears(chunk):
        if experts.stored_weight is not None:
            own = [experts.stored_weight.expert(place) for place in range(len(numbers))]
            found |= {f"{name}.{number}.weight": weight for number, weight in zip(numbers, own, strict=True)}
    return found


def hold_stored(
    chunks: Sequence[GPTModel],
    held: Held,
    held_experts: HeldExperts,
    shapes: ModelSpec,
    tp: TensorParallel,
    device: torch.device,
) -> None:
    """Put frozen linears over the weights that `held` gives in the place of those on the meta device, one after the
    other, and give experts those of `held_experts`; those that they leave dense get (empty) memory."""
    table = {parameter.name: parameter for parameter in model_parameters(shapes)}
    for chunk in chunks:
        for name, parent, attribute in list(global_linears(chunk)):
            base: Any = getattr(parent, attribute)
            if base.weight is None or not base.weight.is_meta:  # None: a head tied to the embedding
                continue
            entry = table[f"{name}.weight"]
            stored = held(entry, base.weight)
            if stored is None:
                base.weight = replaced(base.weight, torch.empty_like(base.weight, device=device))
                continue
            assert stored.shape == tuple(base.weight.shape), f"{name}: {stored.shape} for {tuple(base.weight.shape)}"
            setattr(parent, attribute, _FROZEN[entry.tp_axis](base, base.config, tp, stored))
        for name, numbers, experts in expert_linears(chunk):
            assert experts.weight is not None
            places = [f"{name}.weight"] if f"{name}.weight" in table else [f"{name}.{n}.weight" for n in numbers]
            of_experts = held_experts([table[place] for place in places], numbers, experts.weight.dtype)
            if of_experts is None:
                experts.weight = replaced(experts.weight, torch.empty_like(experts.weight, device=device))
            else:
                experts.hold(of_experts)


def all_dense(entries: Sequence[ModelParameter], numbers: Sequence[int], dtype: torch.dtype) -> None:
    """The `HeldExperts` of a base that has none in another form."""


def experts_in_four_bits(weights: WeightSource, shapes: ModelSpec, world: World) -> HeldExperts:
    """What `weights` has of experts in 4 bits, as it has it. They are read and quantized one expert after the other."""

    def held(entries: Sequence[ModelParameter], numbers: Sequence[int], dtype: torch.dtype) -> ExpertWeight | None:
        matrix = local_experts(entries, numbers, weights, shapes, world.etp_rank, world.etp)
        return None if matrix is None else FourBitExperts(matrix.to(world.device), len(numbers), dtype)

    return held


def in_four_bits(weights: WeightSource, shapes: ModelSpec, tp: TensorParallel, device: torch.device) -> Held:
    """What `weights` has in 4 bits, as it has it."""

    def held(entry: ModelParameter, weight: Tensor) -> BaseWeight | None:
        matrix = local_matrix(entry, weights, shapes, tp.rank, tp.size)
        return None if matrix is None else FourBitWeight(matrix.to(device), weight.dtype)

    return held


def in_fp8(read: ReadWeight, shapes: ModelSpec, world: World, gradients: torch.dtype) -> Held:
    """The parameters of `fp8_names`, each rank's part quantized on its device. read: as for `load_base_weights`.
    gradients: as for `Fp8Weight`."""
    names = fp8_names(shapes)

    def held(entry: ModelParameter, weight: Tensor) -> BaseWeight | None:
        if entry.name not in names:
            return None
        return Fp8Weight(local_tensor(entry, weight, read, shapes, world).to(world.device), gradients)

    return held


@contextmanager
def matrices_on_meta() -> Iterator[None]:
    """Layers that are built within it have no memory for their linears' weights, experts' among them. Embeddings, head
    and routers have."""
    original = torch.nn.Module.register_parameter

    def register(module: torch.nn.Module, name: str, parameter: torch.nn.Parameter | None) -> None:
        # Layers' linears are of subclasses, Transformer Engine's or this project's own.
        plain = type(module) in (ColumnParallelLinear, VocabParallelEmbedding) or isinstance(module, CoreRouter)
        if parameter is not None and name == "weight" and parameter.dim() == 2 and not plain:
            parameter = replaced(parameter, parameter.to("meta"))
        original(module, name, parameter)

    torch.nn.Module.register_parameter = register  # type: ignore[method-assign]
    ExpertLinear.on_meta = True
    try:
        yield
    finally:
        ExpertLinear.on_meta = False
        torch.nn.Module.register_parameter = original  # type: ignore[method-assign]


def replaced(parameter: Tensor, value: Tensor) -> torch.nn.Parameter:
    """A parameter with another value, which Megatron's marks are on as before."""
    new = torch.nn.Parameter(value.detach(), requires_grad=parameter.requires_grad)
    for name, mark in vars(parameter).items():
        setattr(new, name, mark)
    return new


def first_expert(shapes: ModelSpec, world: World) -> int:
    return world.ep_rank * (shapes.num_experts // world.ep)


@torch.no_grad()
def load_base_weights(
    chunks: Sequence[GPTModel],
    read: ReadWeight,
    shapes: ModelSpec,
    world: World,
    only: Collection[str] | None = None,
) -> None:
    """Fill every parameter of the chunks, or those of the names `only`, a fused tensor at a time. No communication:
    each rank reads what it needs. read: whole tensors by HF name."""
    table = {parameter.name: parameter for parameter in model_parameters(shapes)}
    # Weights and biases of both linears of all experts of a layer, which its experts ask for in turn.
    read_packed = functools.lru_cache(maxsize=4)(read)
    for chunk in chunks:
        for name, value in global_names(chunk, first_expert(shapes, world)).items():
            assert value.device.type == world.device.type, f"{name} is on {value.device}"
            if value.numel() == 0:
                continue  # Transformer Engine's stand-in for a bias that is not there
            if only is not None and name not in only:
                continue
            entry = table.get(name)
            if entry is None and (found := _EXPERT.fullmatch(name)):
                value.copy_(_unpacked(table[f"{found[1]}.{found[3]}"], int(found[2]), read_packed, shapes))
                continue
            if entry is None and name == "output_layer.weight":
                # A later pipeline stage's copy of the tied embedding.
                entry = table[EMBEDDING]
            assert entry is not None, f"no HF tensor is known for {name}"
            value.copy_(local_tensor(entry, value, read, shapes, world))


def _unpacked(entry: ModelParameter, expert: int, read: ReadWeight, shapes: ModelSpec) -> Tensor:
    """An expert's part of a tensor that holds all of a layer."""
    assert entry.packed is not None
    return unpacked(shapes.linear(entry.packed), entry.name.endswith(".bias"), read(entry.hf_names[0]), expert)


def local_tensor(entry: ModelParameter, value: Tensor, read: ReadWeight, shapes: ModelSpec, world: World) -> Tensor:
    """This rank's part of a fused tensor, in the dtype and rows of `value`, which it is for."""
    parts = [read(name).to(value.dtype) for name in entry.hf_names]
    rank, size = (world.tp_rank, world.tp) if entry.expert is None else (world.etp_rank, world.etp)
    local = shard_parameter(entry, fuse(entry, parts, shapes), rank, size, value.shape[0], shapes)
    assert local.shape == value.shape, f"{entry.name}: {tuple(local.shape)} for {tuple(value.shape)}"
    return local
