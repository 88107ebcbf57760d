"""Every parameter of a Megatron model and the Hugging Face tensors it holds: names, shapes, fusing and its inverse.

Pure tables and tensor functions. Names are Megatron-Core's with Transformer Engine's layer specs (norms before fused
linears are theirs: `linear_qkv.layer_norm_weight`), layer numbers are global.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_lora.errors import UserError
from megatron_lora.lora.layout import ModelSpec, segment_rows, segments_of
from megatron_lora.lora.model_spec import (
    EMBEDDING,
    LAYER,
    OUTPUT_LAYER,
    LinearSpec,
    ParameterSpec,
    resolve,
)

# Before the HF name of a tensor that a checkpoint keeps for others.
KEPT = "kept."


@dataclass(frozen=True)
class ModelParameter:
    """One parameter of the whole model (TP=1, no vocabulary padding).

    name: Megatron's. hf_names: the HF tensors in it, in the order of the linear's segments. fusion: the kind of linear
    in which several lie; None for one that is stored as it is. tp_axis: what tensor parallelism splits (of an expert's,
    expert tensor parallelism), None where every rank has all. expert: its number in the layer, if it is an expert's.
    packed: the kind of linear of which it holds all experts of a layer as HF does. blocks: see `ParameterSpec`.
    """

    name: str
    hf_names: tuple[str, ...]
    shape: tuple[int, ...]
    tp_axis: int | None = None
    fusion: str | None = None
    expert: int | None = None
    packed: str | None = None
    blocks: tuple[int, ...] = ()

    @property
    def is_vocabulary(self) -> bool:
        """Whether its rows are padded to a multiple that depends on the layout."""
        return self.name in (EMBEDDING, OUTPUT_LAYER)


def model_parameters(shapes: ModelSpec) -> list[ModelParameter]:
    """Every parameter of a model, layer by layer."""
    plain = {other.name: _plain(other, None) for other in shapes.others if not other.name.startswith(LAYER)}
    result = [plain.pop(EMBEDDING)]
    for layer in range(shapes.num_layers):
        for linear in shapes.linears:
            if linear.is_in(layer):
                result += _linear(linear, layer)
        result += [_plain(other, layer) for other in shapes.layer_others if other.is_in(layer)]
    result += plain.values()
    if not shapes.tied_embeddings:
        vocabulary = (shapes.vocab_size, shapes.hidden_size)
        result.append(ModelParameter(OUTPUT_LAYER, ("lm_head.weight",), vocabulary, 0))
    return result


def _plain(other: ParameterSpec, layer: int | None) -> ModelParameter:
    axis = 0 if other.name == EMBEDDING else other.tp_axis
    names = (resolve(other.hf_name, layer),)
    return ModelParameter(resolve(other.name, layer), names, other.shape, axis, blocks=other.blocks)


def _linear(linear: LinearSpec, layer: int) -> list[ModelParameter]:
    """Weight and bias of a linear in one layer: of each expert."""
    if linear.packed:
        return _packed(linear, layer)
    result = []
    for expert in range(linear.experts) if linear.experts else (None,):
        name = resolve(linear.name, layer) + ("" if expert is None else f".{expert}")
        names = [resolve(part.name, layer, expert) for part in linear.parts]
        reordered = len(linear.parts) > 1 or any(part.blocks for part in linear.parts)
        fusion = linear.kind if reordered else None
        axis = {"column": 0, "row": 1, "replicated": None}[linear.parallel]
        shape = (linear.out_features, linear.in_features)
        weights, biases = (tuple(f"{hf}.{end}" for hf in names) for end in ("weight", "bias"))
        result.append(ModelParameter(f"{name}.weight", weights, shape, axis, fusion, expert))
        if linear.bias:
            # A row-parallel linear adds its bias once, to the sum over the ranks.
            axis = 0 if axis == 0 else None
            result.append(ModelParameter(f"{name}.bias", biases, shape[:1], axis, fusion, expert))
    return result


def _packed(linear: LinearSpec, layer: int) -> list[ModelParameter]:
    """Weight and bias of all experts of a layer, in the form that HF's tensors have: see `experts.unpacked`."""
    name, hf = resolve(linear.name, layer), resolve(linear.parts[0].name, layer)
    weight = ModelParameter(
        f"{name}.weight", (hf,), (linear.experts, linear.in_features, linear.out_features), packed=linear.kind
    )
    bias = ModelParameter(f"{name}.bias", (f"{hf}_bias",), (linear.experts, linear.out_features), packed=linear.kind)
    return [weight, bias]


def kept_parameter(hf_name: str, shape: tuple[int, ...]) -> ModelParameter:
    """A tensor that is no part of the model as it is built (`inventory.kept_tensors`), in a checkpoint of it."""
    return ModelParameter(f"{KEPT}{hf_name}", (hf_name,), shape)


def hf_shape(parameter: ModelParameter, hf_tensor: str, shapes: ModelSpec) -> tuple[int, ...]:
    """The shape of one HF tensor."""
    if parameter.fusion is None:
        return parameter.shape
    return (_rows(parameter, hf_tensor, shapes).numel(), *parameter.shape[1:])


def fuse(parameter: ModelParameter, tensors: Sequence[Tensor], shapes: ModelSpec) -> Tensor:
    """Megatron's tensor from the HF tensors, in the order of `hf_names`. Raises UserError where their dtypes differ."""
    if parameter.fusion is None:
        return tensors[0]
    dtypes = {tensor.dtype for tensor in tensors}
    if len(dtypes) > 1:
        raise UserError(
            f"{', '.join(parameter.hf_names)} have different dtypes ({', '.join(sorted(map(str, dtypes)))}), but are "
            "one tensor in Megatron; save the base in one dtype"
        )
    fused = tensors[0].new_empty(parameter.shape)
    for name, tensor in zip(parameter.hf_names, tensors, strict=True):
        fused[_rows(parameter, name, shapes).to(tensor.device)] = tensor
    return fused


def unfuse(parameter: ModelParameter, fused: Tensor, hf_tensor: str, shapes: ModelSpec) -> Tensor:
    """One HF tensor, contiguous, from Megatron's whole tensor; vocabulary padding is cut off."""
    if parameter.fusion is None:
        return fused[: parameter.shape[0]].contiguous()
    return fused[_rows(parameter, hf_tensor, shapes).to(fused.device)]


def unshard_parameter(parameter: ModelParameter, shards: Sequence[Tensor], shapes: ModelSpec) -> Tensor:
    """The whole tensor from the tensor-parallel ranks' parts in rank order; vocabulary padding is cut off."""
    if parameter.tp_axis is None:
        return shards[0]
    if parameter.blocks:
        parts = [shard.split([size // len(shards) for size in parameter.blocks]) for shard in shards]
        return torch.cat([part[index] for index in range(len(parameter.blocks)) for part in parts])
    if parameter.fusion is not None and shapes.linear(parameter.fusion).stacked:
        # A rank holds [gate shard; up shard].
        parts = [shard.chunk(len(parameter.hf_names)) for shard in shards]
        return torch.cat([part[index] for index in range(len(parameter.hf_names)) for part in parts])
    return torch.cat(list(shards), parameter.tp_axis)[: parameter.shape[0]]


def shard_parameter(
    parameter: ModelParameter, whole: Tensor, rank: int, size: int, local_rows: int, shapes: ModelSpec
) -> Tensor:
    """A tensor-parallel rank's part of the whole tensor. local_rows: of a vocabulary's part; padding is zero."""
    if parameter.tp_axis is None or (size == 1 and not parameter.is_vocabulary):
        return whole
    if parameter.is_vocabulary:
        part = whole[rank * local_rows : (rank + 1) * local_rows]
        return torch.cat([part, part.new_zeros(local_rows - part.shape[0], *part.shape[1:])])
    if parameter.blocks:
        return torch.cat([block.chunk(size)[rank] for block in whole.split(parameter.blocks)])
    if parameter.fusion is not None and shapes.linear(parameter.fusion).stacked:
        segments = whole.chunk(len(parameter.hf_names))
        return torch.cat([segment.chunk(size)[rank] for segment in segments])
    return whole.chunk(size, parameter.tp_axis)[rank]


def fused_rows(parameter: ModelParameter, shapes: ModelSpec) -> Tensor:
    """[rows] int64: for each row of Megatron's tensor its place in the HF tensors laid one below the other."""
    if parameter.fusion is None:
        return torch.arange(parameter.shape[0])
    places = torch.cat([_rows(parameter, name, shapes) for name in parameter.hf_names])
    order = torch.empty_like(places)
    order[places] = torch.arange(places.numel())
    return order


def check_names(parameters: Sequence[ModelParameter], found: Collection[str], where: object) -> None:
    """Raise UserError unless `found` (Megatron's names) are exactly the model's tensors."""
    wanted = {parameter.name for parameter in parameters}
    missing, unexpected = sorted(wanted - set(found)), sorted(set(found) - wanted)
    if missing or unexpected:
        raise UserError(
            f"{where} does not hold the tensors of the model that its config describes: missing "
            f"{_some(missing)}, unexpected {_some(unexpected)}; is it complete, and of this model?"
        )


def _rows(parameter: ModelParameter, hf_tensor: str, shapes: ModelSpec) -> Tensor:
    assert parameter.fusion is not None
    segment = segments_of(parameter.fusion, shapes)[parameter.hf_names.index(hf_tensor)]
    return segment_rows(parameter.fusion, shapes, segment)


def _some(names: list[str]) -> str:
    if not names:
        return "none"
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
