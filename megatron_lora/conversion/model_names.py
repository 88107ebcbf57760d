"""Every parameter of a Megatron model and the Hugging Face tensors it holds: names, shapes, fusing and its inverse.

Pure tables and tensor functions. Names are Megatron-Core's with Transformer Engine's layer specs (norms before fused
linears are theirs: `linear_qkv.layer_norm_weight`), layer numbers are global.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megatron_lora.errors import UserError
from megatron_lora.lora.layout import ModelShapes, features, module_name, segment_rows, segments_of
from megatron_lora.lora.peft_format import LAYER_KINDS, hf_name

Fusion = Literal["linear_qkv", "linear_fc1"]

# HF names within a layer of the norm before the MLP, and of the norms behind attention and MLP where a family has them.
_LLAMA_NORMS = ("post_attention_layernorm", None, None)
_GEMMA_NORMS = ("pre_feedforward_layernorm", "post_attention_layernorm", "post_feedforward_layernorm")
NORMS = {
    "llama": _LLAMA_NORMS,
    "mistral": _LLAMA_NORMS,
    "qwen2": _LLAMA_NORMS,
    "qwen3": _LLAMA_NORMS,
    "gemma3_text": _GEMMA_NORMS,
}
QKV_BIAS = ("qwen2",)
QK_NORM = ("qwen3", "gemma3_text")
EMBEDDING = "embedding.word_embeddings.weight"


@dataclass(frozen=True)
class ModelParameter:
    """One parameter of the whole model (TP=1, no vocabulary padding).

    name: Megatron's. hf_names: the HF tensors in it, in the order of the linear's segments. fusion: how several lie in
    one; None for one that is stored as it is. tp_axis: what tensor parallelism splits, None where every rank has all.
    """

    name: str
    hf_names: tuple[str, ...]
    shape: tuple[int, ...]
    tp_axis: int | None = None
    fusion: Fusion | None = None

    @property
    def is_vocabulary(self) -> bool:
        """Whether its rows are padded to a multiple that depends on the layout."""
        return self.name in (EMBEDDING, "output_layer.weight")


def model_parameters(shapes: ModelShapes) -> list[ModelParameter]:
    """Every parameter of a model, in the forward's order. Raises UserError for a family without a table."""
    if shapes.model_type not in NORMS:
        raise UserError(
            f"whole models of family {shapes.model_type!r} are not converted; the families are {', '.join(NORMS)}"
        )
    hidden = (shapes.hidden_size,)
    vocabulary = (shapes.vocab_size, shapes.hidden_size)
    result = [ModelParameter(EMBEDDING, ("model.embed_tokens.weight",), vocabulary, 0)]
    for layer in range(shapes.num_layers):
        result += _layer(layer, shapes)
    result.append(ModelParameter("decoder.final_layernorm.weight", ("model.norm.weight",), hidden))
    if not shapes.tied_embeddings:
        result.append(ModelParameter("output_layer.weight", ("lm_head.weight",), vocabulary, 0))
    return result


def _layer(layer: int, shapes: ModelShapes) -> list[ModelParameter]:
    family, hf = shapes.model_type, f"model.layers.{layer}"
    qkv, proj, fc1, fc2 = (module_name(kind, layer) for kind in LAYER_KINDS)
    before_mlp, after_attention, after_mlp = NORMS[family]
    linears = {kind: _linear(kind, layer, shapes) for kind in LAYER_KINDS}

    def norm(name: str, hf_end: str, size: int = shapes.hidden_size) -> ModelParameter:
        return ModelParameter(name, (f"{hf}.{hf_end}.weight",), (size,))

    result = [norm(f"{qkv}.layer_norm_weight", "input_layernorm"), linears["linear_qkv"]]
    if family in QKV_BIAS or shapes.attention_bias:
        result.append(_bias(linears["linear_qkv"]))
    if family in QK_NORM:
        parent = qkv.removesuffix(".linear_qkv")
        for end in "qk":
            result.append(norm(f"{parent}.{end}_layernorm.weight", f"self_attn.{end}_norm", shapes.head_dim))
    result.append(linears["linear_proj"])
    if shapes.attention_bias:
        result.append(_bias(linears["linear_proj"]))
    if after_attention is not None:
        result.append(norm(f"{proj}.post_layernorm.weight", after_attention))
    result += [norm(f"{fc1}.layer_norm_weight", before_mlp), linears["linear_fc1"], linears["linear_fc2"]]
    if shapes.mlp_bias:
        result += [_bias(linears["linear_fc1"]), _bias(linears["linear_fc2"])]
    if after_mlp is not None:
        result.append(norm(f"{fc2}.post_layernorm.weight", after_mlp))
    return result


def _linear(kind: str, layer: int, shapes: ModelShapes) -> ModelParameter:
    inputs, outputs = features(kind, shapes)
    names = tuple(f"{hf_name(segment, layer)}.weight" for segment in segments_of(kind, shapes))
    fusion: Fusion | None = kind if kind in ("linear_qkv", "linear_fc1") else None  # type: ignore[assignment]
    axis = 0 if fusion is not None else 1
    return ModelParameter(f"{module_name(kind, layer)}.weight", names, (outputs, inputs), axis, fusion)


def _bias(linear: ModelParameter) -> ModelParameter:
    names = tuple(name.removesuffix("weight") + "bias" for name in linear.hf_names)
    # A row-parallel linear adds its bias once, to the sum over the ranks.
    axis = 0 if linear.tp_axis == 0 else None
    name = linear.name.removesuffix("weight") + "bias"
    return ModelParameter(name, names, linear.shape[:1], axis, linear.fusion)


def hf_shape(parameter: ModelParameter, hf_tensor: str, shapes: ModelShapes) -> tuple[int, ...]:
    """The shape of one HF tensor."""
    if parameter.fusion is None:
        return parameter.shape
    return (_rows(parameter, hf_tensor, shapes).numel(), *parameter.shape[1:])


def fuse(parameter: ModelParameter, tensors: Sequence[Tensor], shapes: ModelShapes) -> Tensor:
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


def unfuse(parameter: ModelParameter, fused: Tensor, hf_tensor: str, shapes: ModelShapes) -> Tensor:
    """One HF tensor, contiguous, from Megatron's whole tensor; vocabulary padding is cut off."""
    if parameter.fusion is None:
        return fused[: parameter.shape[0]].contiguous()
    return fused[_rows(parameter, hf_tensor, shapes).to(fused.device)]


def unshard_parameter(parameter: ModelParameter, shards: Sequence[Tensor], shapes: ModelShapes) -> Tensor:
    """The whole tensor from the tensor-parallel ranks' parts in rank order; vocabulary padding is cut off."""
    if parameter.tp_axis is None:
        return shards[0]
    if parameter.fusion == "linear_fc1":
        # A rank holds [gate shard; up shard].
        parts = [shard.chunk(len(parameter.hf_names)) for shard in shards]
        return torch.cat([part[index] for index in range(len(parameter.hf_names)) for part in parts])
    return torch.cat(list(shards), parameter.tp_axis)[: parameter.shape[0]]


def shard_parameter(parameter: ModelParameter, whole: Tensor, rank: int, size: int, local_rows: int) -> Tensor:
    """A tensor-parallel rank's part of the whole tensor. local_rows: of a vocabulary's part; padding is zero."""
    if parameter.tp_axis is None or (size == 1 and not parameter.is_vocabulary):
        return whole
    if parameter.is_vocabulary:
        part = whole[rank * local_rows : (rank + 1) * local_rows]
        return torch.cat([part, part.new_zeros(local_rows - part.shape[0], *part.shape[1:])])
    if parameter.fusion == "linear_fc1":
        segments = whole.chunk(len(parameter.hf_names))
        return torch.cat([segment.chunk(size)[rank] for segment in segments])
    return whole.chunk(size, parameter.tp_axis)[rank]


def check_names(parameters: Sequence[ModelParameter], found: Collection[str], where: object) -> None:
    """Raise UserError unless `found` (Megatron's names) are exactly the model's tensors."""
    wanted = {parameter.name for parameter in parameters}
    missing, unexpected = sorted(wanted - set(found)), sorted(set(found) - wanted)
    if missing or unexpected:
        raise UserError(
            f"{where} does not hold the tensors of the model that its config describes: missing "
            f"{_some(missing)}, unexpected {_some(unexpected)}; is it complete, and of this model?"
        )


def _rows(parameter: ModelParameter, hf_tensor: str, shapes: ModelShapes) -> Tensor:
    assert parameter.fusion is not None
    segment = segments_of(parameter.fusion, shapes)[parameter.hf_names.index(hf_tensor)]
    return segment_rows(parameter.fusion, shapes, segment)


def _some(names: list[str]) -> str:
    if not names:
        return "none"
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
