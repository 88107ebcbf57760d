"""Weights in 4 bits, NF4 and FP4 as bitsandbytes stores them (Dettmers et al. 2023, QLoRA, section 3).

A weight is cut into blocks of consecutive values of a row; a value is one of sixteen code points times its block's
scale. With double quantization the scales are 8-bit codes themselves, in groups of 256 over the whole Hugging Face
tensor. Blocks within rows can be regrouped: rows of several tensors fused, rows or whole blocks of columns sliced for a
tensor-parallel rank, and every value stays what it was. So quantized values do not depend on the layout.

Quantizing runs on the CPU wherever the model runs: other devices round a few values differently, and a checkpoint is
merged on another machine than the one it was trained on.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from megatron_lora.errors import UserError
from megatron_lora.lora.base_weight import CHUNK_ELEMENTS, BaseWeight, ExpertWeight
from megatron_lora.lora.model_spec import LAYER, ROUTER, LinearSpec, ModelSpec, resolve

QuantType = Literal["nf4", "fp4"]
BLOCK_SIZE = 64
GROUP_SIZE = 256


@dataclass(frozen=True)
class ScaleGroups:
    """How 8-bit codes of scales become scales: code[c] * absmax[group] + offset.

    code [256] fp32. absmax [groups] fp32. first [rows] int64: the number of a row's first scale, counted so that scale
    n is in group n // size. offset [rows] fp32.
    """

    code: Tensor
    absmax: Tensor
    first: Tensor
    offset: Tensor
    size: int

    def scales(self, codes: Tensor) -> Tensor:
        """codes [rows, blocks] uint8 -> fp32."""
        numbers = self.first[:, None] + torch.arange(codes.shape[1], device=codes.device)
        return (self.code[codes.int()] * self.absmax[numbers // self.size]).add_(self.offset[:, None])


@dataclass(frozen=True)
class FourBitMatrix:
    """A matrix [rows, columns]. packed [rows, columns / 2] uint8: two values a byte. scales [rows, columns /
    block_size]: fp32, or codes of `groups`."""

    packed: Tensor
    scales: Tensor
    groups: ScaleGroups | None
    block_size: int
    quant_type: QuantType

    @property
    def shape(self) -> tuple[int, int]:
        return self.packed.shape[0], 2 * self.packed.shape[1]

    @property
    def num_bytes(self) -> int:
        groups = () if self.groups is None else (self.groups.absmax, self.groups.first, self.groups.offset)
        return sum(tensor.nbytes for tensor in (self.packed, self.scales, *groups))

    def rows(self, index: Tensor | slice) -> "FourBitMatrix":
        groups = self.groups
        if groups is not None:
            groups = replace(groups, first=groups.first[index], offset=groups.offset[index])
        return replace(self, packed=self.packed[index], scales=self.scales[index], groups=groups)

    def columns(self, start: int, stop: int) -> "FourBitMatrix":
        """Whole blocks of columns, in memory of their own. Raises UserError where they are none."""
        size = self.block_size
        if start % size or stop % size:
            raise UserError(
                f"columns {start} to {stop} of a weight cut through blocks of {size} {self.quant_type} values; use a "
                "tensor_parallel_size that keeps blocks whole"
            )
        groups = self.groups
        if groups is not None:
            groups = replace(groups, first=groups.first + start // size)
        packed, scales = self.packed[:, start // 2 : stop // 2], self.scales[:, start // size : stop // size]
        return replace(self, packed=packed.contiguous(), scales=scales.contiguous(), groups=groups)

    def to(self, device: torch.device) -> "FourBitMatrix":
        groups = self.groups
        if groups is not None:
            tensors = {name: getattr(groups, name).to(device) for name in ("code", "absmax", "first", "offset")}
            groups = replace(groups, **tensors)
        return replace(self, packed=self.packed.to(device), scales=self.scales.to(device), groups=groups)

    def block_scales(self) -> Tensor:
        """[rows, blocks] fp32."""
        return self.scales if self.groups is None else self.groups.scales(self.scales)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The values, rounded to `dtype`."""
        _load_bitsandbytes()
        return torch.ops.bitsandbytes.dequantize_4bit.default(
            self.packed.view(-1, 1),
            self.block_scales().view(-1),
            self.block_size,
            self.quant_type,
            list(self.shape),
            dtype,
        )


def stack_rows(parts: Sequence[FourBitMatrix]) -> FourBitMatrix:
    """One matrix with the rows of all, in order. Raises UserError where they are stored differently."""
    first = parts[0]
    kinds = {(part.quant_type, part.block_size, part.groups is None) for part in parts}
    group_sizes = {part.groups.size for part in parts if part.groups is not None}
    if len(kinds) > 1 or len(group_sizes) > 1:
        raise UserError(
            "linears that are one fused linear are stored in different 4-bit forms (type, block size or double "
            "quantization); quantize the base in one form"
        )
    packed = torch.cat([part.packed for part in parts])
    scales = torch.cat([part.scales for part in parts])
    if first.groups is None:
        return replace(first, packed=packed, scales=scales)
    groups = [part.groups for part in parts if part.groups is not None]
    before = [
        sum(group.absmax.numel() for group in groups[:number]) * group.size for number, group in enumerate(groups)
    ]
    joined = ScaleGroups(
        code=groups[0].code,
        absmax=torch.cat([group.absmax for group in groups]),
        first=torch.cat([group.first + start for group, start in zip(groups, before, strict=True)]),
        offset=torch.cat([group.offset for group in groups]),
        size=groups[0].size,
    )
    return replace(first, packed=packed, scales=scales, groups=joined)


def quantize(weight: Tensor, quant_type: QuantType = "nf4", *, double: bool = False) -> FourBitMatrix:
    """weight [rows, columns] on the CPU, one whole Hugging Face tensor. Raises UserError where rows are no whole
    blocks."""
    _load_bitsandbytes()
    rows, columns = weight.shape
    check_row_length(columns, BLOCK_SIZE, "a weight's rows")
    packed = torch.empty(rows, columns // 2, dtype=torch.uint8)
    scales = torch.empty(rows, columns // BLOCK_SIZE)
    step = max(1, CHUNK_ELEMENTS // columns)
    for start in range(0, rows, step):
        part = slice(start, start + step)
        values, absmax = torch.ops.bitsandbytes.quantize_4bit.default(
            weight[part].contiguous(), BLOCK_SIZE, quant_type, torch.uint8
        )
        packed[part], scales[part] = values.view(-1, columns // 2), absmax.view(-1, columns // BLOCK_SIZE)
    matrix = FourBitMatrix(packed, scales, None, BLOCK_SIZE, quant_type)
    return _with_double_quantization(matrix) if double else matrix


def _with_double_quantization(matrix: FourBitMatrix) -> FourBitMatrix:
    from bitsandbytes.functional import quantize_blockwise

    flat = matrix.scales.reshape(-1)
    offset = flat.mean()
    codes, state = quantize_blockwise(flat - offset, blocksize=GROUP_SIZE)
    assert state.code is not None
    groups = scale_groups(matrix, state.code, state.absmax, offset, GROUP_SIZE)
    return replace(matrix, scales=codes.view(matrix.scales.shape), groups=groups)


def scale_groups(matrix: FourBitMatrix, code: Tensor, absmax: Tensor, offset: Tensor, size: int) -> ScaleGroups:
    """Of a whole tensor, as bitsandbytes counts them: scale after scale, row by row."""
    rows, blocks = matrix.scales.shape
    return ScaleGroups(code, absmax, torch.arange(rows) * blocks, offset.reshape(1).float().expand(rows).clone(), size)


class FourBitWeight(BaseWeight):
    """W in 4 bits. dtype: of products."""

    def __init__(self, matrix: FourBitMatrix, dtype: torch.dtype):
        self.matrix = matrix
        self._dtype = dtype

    @property
    def shape(self) -> tuple[int, int]:
        return self.matrix.shape

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype

    @property
    def device(self) -> torch.device:
        return self.matrix.packed.device

    @property
    def num_bytes(self) -> int:
        return self.matrix.num_bytes

    def dense(self, start: int = 0, stop: int | None = None) -> Tensor:
        whole = start == 0 and stop is None
        return (self.matrix if whole else self.matrix.rows(slice(start, stop))).dense(self._dtype)

    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Of few tokens on a GPU bitsandbytes' own kernel reads the 4 bits; of many it goes through the dense form."""
        matrix = self.matrix
        _load_bitsandbytes()
        return torch.ops.bitsandbytes.gemm_4bit.default(
            x,
            matrix.packed.view(-1, 1),
            list(matrix.shape),
            matrix.block_scales().view(-1),
            matrix.block_size,
            matrix.quant_type,
            bias=bias,
        )


class FourBitExperts(ExpertWeight):
    """W of several experts in 4 bits: the rows of `matrix`, expert after expert. dtype: of products."""

    def __init__(self, matrix: FourBitMatrix, num_experts: int, dtype: torch.dtype):
        self.matrix, self.num_experts = matrix, num_experts
        self._dtype = dtype

    @property
    def shape(self) -> tuple[int, int, int]:
        rows, columns = self.matrix.shape
        return self.num_experts, rows // self.num_experts, columns

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype

    @property
    def device(self) -> torch.device:
        return self.matrix.packed.device

    def dense(self) -> Tensor:
        return self.matrix.dense(self._dtype).view(self.shape)

    def expert(self, place: int) -> BaseWeight:
        rows = self.shape[1]
        return FourBitWeight(self.matrix.rows(slice(place * rows, (place + 1) * rows)), self._dtype)


def check_row_length(columns: int, block_size: int, what: str) -> None:
    """Raise UserError where rows of so many values are no whole blocks."""
    if columns % block_size:
        raise UserError(
            f"4-bit quantization keeps blocks of {block_size} values within rows, and {what} have {columns}; use a "
            "model whose sizes are multiples, or train it unquantized"
        )


def check_blocks(linears: Sequence[LinearSpec], tp: int, key: str, block_size: int = BLOCK_SIZE) -> None:
    """Raise UserError where the rows of a linear, or a tensor-parallel rank's part of them, are no whole blocks: ranks
    would hold other values than one process. key: the recipe's, of the size of the tensor parallelism of these linears
    (of experts', expert tensor parallelism)."""
    for linear in linears:
        check_row_length(linear.in_features, block_size, f"those of {linear.kind}")
    split = {linear.kind: linear.in_features for linear in linears if linear.parallel == "row"}
    if any(columns % (tp * block_size) for columns in split.values()):
        fits = [size for size in range(1, tp) if all(columns % (size * block_size) == 0 for columns in split.values())]
        sizes = ", ".join(f"{kind} {columns}" for kind, columns in split.items())
        raise UserError(
            f"{key}={tp} cuts through blocks of {block_size} 4-bit values (columns of {sizes}), so ranks would hold "
            f"other values than one process; use {' or '.join(map(str, fits))}"
        )


def layer_linears(spec: ModelSpec) -> list[LinearSpec]:
    """The linears that are held in 4 bits: those of layers, experts' among them. Embeddings, norms, routers and head
    stay dense."""
    return [linear for linear in spec.linears if linear.name.startswith(LAYER) and linear.kind != ROUTER]


def weight_names(spec: ModelSpec) -> set[str]:
    """The HF weights of `layer_linears`, of the layers that have them; of experts each one's, or the tensor of all."""
    names: set[str] = set()
    for linear in layer_linears(spec):
        for layer in filter(linear.is_in, range(spec.num_layers)):
            names |= _packed_name(linear, layer) if linear.packed else _own_names(linear, layer)
    return names


def _packed_name(linear: LinearSpec, layer: int) -> set[str]:
    return {resolve(linear.parts[0].name, layer)}


def _own_names(linear: LinearSpec, layer: int) -> set[str]:
    return {
        f"{linear.hf_name(segment, layer, expert)}.weight"
        for segment in linear.segments
        for expert in linear.expert_numbers
    }


def _load_bitsandbytes() -> None:
    """Its operations register on import. Raises UserError where it is not installed."""
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"4-bit weights need bitsandbytes, which does not import here ({error}); install the package's own "
            "dependencies again"
        ) from error
