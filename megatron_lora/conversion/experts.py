"""The experts of a layer: files hold a matrix of each, transformers' model one tensor of all of them.

transformers names them `experts.gate_up_proj` [experts, 2 f, h] and `experts.down_proj` [experts, h, f], without
`.weight`.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_lora.lora.model_spec import LinearSpec, ModelSpec, name_in_packed, resolve
from megatron_lora.lora.packed_experts import packed_name


def fused_tensors(spec: ModelSpec) -> dict[str, tuple[LinearSpec, int]]:
    """transformers' name of each tensor of all experts -> (the linear, the layer); empty without experts."""
    result = {}
    for linear in spec.linears:
        if linear.experts and not linear.packed:
            for layer in range(spec.num_layers) if linear.layers is None else linear.layers:
                result[packed_name(linear, layer)] = (linear, layer)
    return result


def is_fused(name: str, spec: ModelSpec) -> bool:
    return bool(spec.num_experts) and name in fused_tensors(spec)


def expert_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """HF name in the files -> shape, of every expert's matrices."""
    found: dict[str, tuple[int, ...]] = {}
    for linear, layer in fused_tensors(spec).values():
        found |= fused_pieces(linear, layer)
    return found


def fused_pieces(linear: LinearSpec, layer: int) -> dict[str, tuple[int, ...]]:
    """HF name in most files -> shape, of the matrices in such a tensor, in the order of its bytes."""
    return {
        f"{resolve(part.name, layer, expert)}.weight": (part.rows, linear.in_features)
        for expert in range(linear.experts)
        for part in linear.parts
    }


def fused_shape(linear: LinearSpec) -> tuple[int, ...]:
    return linear.experts, linear.out_features, linear.in_features


def read_fused(linear: LinearSpec, layer: int, read: Callable[[str], Any]) -> Tensor:
    """transformers' tensor of a layer's experts, from the matrices of each."""
    experts = range(linear.experts)
    return torch.stack(
        [torch.cat([read(f"{resolve(part.name, layer, n)}.weight") for part in linear.parts]) for n in experts]
    )


def split_fused(name: str, value: Tensor, spec: ModelSpec) -> Iterator[tuple[str, Tensor]]:
    """A tensor of transformers' model under the names that files have: that of all experts as one of each."""
    if not is_fused(name, spec):
        yield name, value
        return
    linear, layer = fused_tensors(spec)[name]
    for number, expert in enumerate(value.unbind()):
        parts = expert.split([part.rows for part in linear.parts])
        for part, rows in zip(linear.parts, parts, strict=True):
            yield f"{resolve(part.name, layer, number)}.weight", rows


def expert_views(model: torch.nn.Module, spec: ModelSpec) -> dict[str, Tensor]:
    """HF linear of the files -> its weight in transformers' model, a part of the tensor of all experts."""
    result = {}
    for name, (linear, layer) in fused_tensors(spec).items():
        for number, expert in enumerate(model.get_parameter(name).data.unbind()):
            rows = expert.split([part.rows for part in linear.parts])
            for part, weight in zip(linear.parts, rows, strict=True):
                result[resolve(part.name, layer, number)] = weight
    for linear in spec.linears:
        if linear.packed:
            for layer in range(spec.num_layers) if linear.layers is None else linear.layers:
                name = packed_name(linear, layer)
                result |= dict(packed_views(linear, name, model.get_parameter(name).data))
    return result


def packed_views(linear: LinearSpec, name: str, packed: Tensor) -> Iterator[tuple[str, Tensor]]:
    """(linear, its weight [out, in], a view) of every expert's part of the HF tensor `name` of all (GPT-OSS)."""
    for expert, own in enumerate(packed.unbind()):
        for number, part in enumerate(linear.parts):
            yield name_in_packed(name, expert, part.segment), own.t()[number :: len(linear.parts)]


def packed_as_rows(packed: Tensor) -> Tensor:
    """The HF tensor of all experts [experts, in, out] (GPT-OSS) as a matrix [experts * out, in]: `packed_rows` finds
    an expert's linear in it."""
    return packed.transpose(1, 2).flatten(0, 1)


def rows_as_packed(rows: Tensor, shape: Sequence[int]) -> Tensor:
    """The inverse of `packed_as_rows`. shape: the tensor's."""
    experts, inputs, outputs = shape
    return rows.view(experts, outputs, inputs).transpose(1, 2).contiguous()


def packed_rows(linear: LinearSpec, experts: Sequence[int]) -> Tensor:
    """For each row of Megatron's matrices of these experts, one below the other, its place in `packed_as_rows`."""
    own = torch.arange(linear.out_features)
    order = torch.cat([own[part :: len(linear.parts)] for part in range(len(linear.parts))])
    return torch.cat([order + expert * linear.out_features for expert in experts])


def unpacked(linear: LinearSpec, bias: bool, packed: Tensor, expert: int) -> Tensor:
    """Megatron's matrix (or bias) of one expert, from the HF tensor of all (GPT-OSS): there matrices are [in, out], and
    rows of gate and up alternate."""
    own = packed[expert] if bias else packed[expert].t()
    return torch.cat([own[part :: len(linear.parts)] for part in range(len(linear.parts))])
