"""Hugging Face folders whose linears bitsandbytes has stored in 4 bits, and dense ones read as if they were.

Beside a packed `X.weight` lie `X.weight.absmax`, `.quant_map`, `.quant_state.bitsandbytes__nf4` (JSON in bytes) and,
with double quantization, `.nested_absmax` and `.nested_quant_map`.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_lora.conversion.experts import packed_as_rows, rows_as_packed
from megatron_lora.conversion.safetensors_io import SafetensorsFolder
from megatron_lora.conversion.weight_source import Described, WeightSource
from megatron_lora.errors import UserError
from megatron_lora.lora.four_bit import FourBitMatrix, QuantType, check_row_length, quantize, scale_groups

STATE = ".quant_state.bitsandbytes__"
PARTS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")
QUANT_TYPES: tuple[QuantType, ...] = ("nf4", "fp4")
FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Entry:
    """A tensor that is stored in another form: what it is when read."""

    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class _State:
    """What bitsandbytes' JSON says of one weight."""

    quant_type: QuantType
    block_size: int
    dtype: torch.dtype
    shape: tuple[int, int]
    group_size: int | None
    offset: float


class FourBitFolder:
    """The weights of such a folder under their own names, without the tensors that describe them.

    stored: what lies in the files. four_bit: names of the weights in 4 bits.
    """

    def __init__(self, stored: SafetensorsFolder):
        """Raises UserError where a weight's description is damaged or incomplete."""
        self.stored = stored
        self._states = {name.partition(STATE)[0]: _read_state(stored, name) for name in stored.entries if STATE in name}
        hidden = {f"{name}{part}" for name in self._states for part in PARTS}
        self.entries: dict[str, Described] = {}
        for name, entry in stored.entries.items():
            if name in self._states:
                self.entries[name] = Entry(self._states[name].dtype, self._states[name].shape)
            elif name not in hidden and STATE not in name:
                self.entries[name] = entry
        self.shards = {file: [name for name in names if name in self.entries] for file, names in stored.shards.items()}

    @property
    def folder(self) -> Path:
        return self.stored.folder

    @property
    def four_bit(self) -> Collection[str]:
        return self._states.keys()

    def read(self, name: str) -> Tensor:
        """The tensor, made dense."""
        matrix = self.read_four_bit(name)
        return self.stored.read(name) if matrix is None else matrix.dense(self._states[name].dtype)

    def read_four_bit(self, name: str) -> FourBitMatrix | None:
        """None for a tensor that is dense. Raises UserError where rows are no whole blocks."""
        state = self._states.get(name)
        if state is None:
            return None
        rows, columns = state.shape
        check_row_length(columns, state.block_size, f"those of {name} in {self.folder}")
        packed = self.stored.read(name).view(-1).view(torch.uint8)
        if packed.numel() * 2 != rows * columns:
            raise UserError(
                f"{name} in {self.folder} holds {packed.numel()} bytes, its description is of {state.shape}"
            )
        blocks = columns // state.block_size
        scales = self.stored.read(f"{name}.absmax").view(rows, blocks)
        matrix = FourBitMatrix(packed.view(rows, columns // 2), scales, None, state.block_size, state.quant_type)
        if state.group_size is None:
            return FourBitMatrix(matrix.packed, scales.float(), None, state.block_size, state.quant_type)
        code, absmax = (self.stored.read(f"{name}.nested_{part}").float() for part in ("quant_map", "absmax"))
        groups = scale_groups(matrix, code, absmax, torch.tensor(state.offset), state.group_size)
        return FourBitMatrix(matrix.packed, scales, groups, state.block_size, state.quant_type)

    @property
    def packed(self) -> Mapping[str, tuple[int, ...]]:
        return self.stored.packed

    def file_name(self, name: str) -> str:
        return self.stored.file_name(name)

    def sample(self, name: str) -> bytes:
        return self.stored.sample(name)


class QuantizedWeights:
    """A dense source whose linears are read as a run with `quantization` computes with them: quantized from the dtype
    that they are stored in, whatever the run computes in.

    linears: names of the weights that it quantizes. double: quantized scales.
    """

    def __init__(
        self, weights: WeightSource, linears: Collection[str], quant_type: QuantType = "nf4", *, double: bool = False
    ):
        self.weights, self.four_bit = weights, frozenset(linears)
        self.quant_type: QuantType = quant_type
        self.double = double

    @property
    def folder(self) -> Path:
        return self.weights.folder

    @property
    def entries(self) -> Mapping[str, Described]:
        return self.weights.entries

    @property
    def shards(self) -> Mapping[str, Sequence[str]]:
        return self.weights.shards

    @property
    def packed(self) -> Mapping[str, tuple[int, ...]]:
        return self.weights.packed

    def read(self, name: str) -> Tensor:
        """The tensor, quantized and made dense."""
        matrix, entry = self.read_four_bit(name), self.entries[name]
        if matrix is None:
            return self.weights.read(name)
        values = matrix.dense(entry.dtype)
        return rows_as_packed(values, entry.shape) if len(entry.shape) == 3 else values

    def read_four_bit(self, name: str) -> FourBitMatrix | None:
        """None for a tensor that stays dense. Of a tensor of all experts: `experts.packed_as_rows`."""
        if name not in self.four_bit:
            return None
        weight = self.weights.read(name)
        return quantize(packed_as_rows(weight) if weight.dim() == 3 else weight, self.quant_type, double=self.double)

    def file_name(self, name: str) -> str:
        return self.weights.file_name(name)

    def sample(self, name: str) -> bytes:
        return self.weights.sample(name)


def _read_state(stored: SafetensorsFolder, name: str) -> _State:
    weight, _, quant_type = name.partition(STATE)
    where = f"{name} in {stored.folder}"
    try:
        content: dict[str, Any] = json.loads(bytes(stored.read(name).view(torch.uint8).tolist()))
        nested = "nested_blocksize" in content
        state = _State(
            quant_type=quant_type,  # type: ignore[arg-type]
            block_size=int(content["blocksize"]),
            dtype=FLOATS[content["dtype"].removeprefix("torch.")],
            shape=(int(content["shape"][0]), int(content["shape"][1])),
            group_size=int(content["nested_blocksize"]) if nested else None,
            offset=float(content["nested_offset"]) if nested else 0.0,
        )
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise UserError(f"{where} does not describe a 4-bit weight ({error!r}); save the model again") from error
    needed = [weight, f"{weight}.absmax"]
    needed += [f"{weight}.nested_absmax", f"{weight}.nested_quant_map"] if nested else []
    missing = [part for part in needed if part not in stored.entries]
    if quant_type not in QUANT_TYPES or missing:
        problem = f"lacks {', '.join(missing)}" if missing else f"is of type {quant_type!r}"
        raise UserError(f"{where} {problem}; wanted bitsandbytes' {' or '.join(QUANT_TYPES)}, complete")
    return state
