"""Safetensors read and written one tensor at a time, with the file's own bytes and nothing mapped into memory.

The format: 8 bytes little-endian header length, a JSON header (name -> dtype, shape, data_offsets), the data.
"""

import json
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_lora.errors import UserError

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
MAX_HEADER_BYTES = 100_000_000
# Weights that are not read: what a folder without safetensors holds instead.
OTHER_FORMATS = (".bin", ".bin.index.json", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".safetensors")

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a file: start and stop are byte positions in the file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    path: Path
    start: int
    stop: int


def read_header(path: Path) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    """(entries by name, metadata) of one file. Raises UserError where it is missing, truncated or no safetensors."""
    if not path.is_file():
        raise UserError(f"{path} does not exist; the folder is incomplete, fetch it again")
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else MAX_HEADER_BYTES
        if length >= MAX_HEADER_BYTES or 8 + length > size:
            raise UserError(f"{path} is truncated or no safetensors file ({size} bytes); fetch it again")
        raw = file.read(length)
    try:
        header: dict[str, Any] = json.loads(raw)
        metadata = header.pop("__metadata__", {})
        entries = {name: _entry(name, value, path, 8 + length) for name, value in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} has an unreadable safetensors header ({error}); fetch it again") from error
    wanted = max((entry.stop for entry in entries.values()), default=8 + length)
    if size < wanted:
        raise UserError(f"{path} is truncated: {size} bytes, its header names {wanted}; fetch it again")
    return entries, metadata


def _entry(name: str, value: Mapping[str, Any], path: Path, data_start: int) -> TensorEntry:
    start, stop = value["data_offsets"]
    dtype, shape = DTYPES.get(value["dtype"]), tuple(value["shape"])
    if dtype is None:
        raise UserError(
            f"{name} in {path} is stored as {value['dtype']}, which is not read here (known are {', '.join(DTYPES)}); "
            "give the model in bfloat16 or float32"
        )
    if start < 0 or stop - start != torch.Size(shape).numel() * dtype.itemsize:
        raise ValueError(f"{name} of shape {list(shape)} does not fill its bytes {start} to {stop}")
    return TensorEntry(name, dtype, shape, path, data_start + start, data_start + stop)


def read_tensor(entry: TensorEntry) -> Tensor:
    """The tensor in memory of its own."""
    tensor = torch.empty(entry.shape, dtype=entry.dtype)
    with entry.path.open("rb") as file:
        file.seek(entry.start)
        if file.readinto(tensor_bytes(tensor)) != entry.stop - entry.start:
            raise UserError(f"{entry.path} ended within {entry.name}; fetch it again")
    return tensor


def sample_positions(size: int, pieces: int = 16, piece_bytes: int = 64) -> list[tuple[int, int]]:
    """(start, stop) of evenly spaced bytes of a tensor of `size` bytes: all of it where it is small."""
    if size <= pieces * piece_bytes:
        return [(0, size)]
    starts = [piece * (size - piece_bytes) // (pieces - 1) for piece in range(pieces)]
    return [(start, start + piece_bytes) for start in starts]


def read_sample(entry: TensorEntry) -> bytes:
    """The bytes of the tensor at `sample_positions`."""
    sample = bytearray()
    with entry.path.open("rb") as file:
        for start, stop in sample_positions(entry.stop - entry.start):
            file.seek(entry.start + start)
            sample += file.read(stop - start)
    return bytes(sample)


def write_tensors(
    path: Path,
    shapes: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    tensors: Iterable[tuple[str, Tensor]],
    metadata: Mapping[str, str] | None = None,
) -> int:
    """Write a file from tensors that come one at a time, in the order of `shapes`; returns the bytes of data. A tensor
    may come in pieces, under its name each, in the order of its bytes.

    Raises ValueError where a tensor is not the announced one.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    offset = 0
    for name, (dtype, shape) in shapes.items():
        size = torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    wanted, current, missing = iter(shapes), "", 0
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        for name, tensor in tensors:
            if not missing:
                current = next(wanted, "")
                missing = torch.Size(shapes[current][1]).numel() * shapes[current][0].itemsize if current else 0
                whole = missing
            dtype, shape = shapes.get(name, (None, ()))
            other_shape = tensor.nbytes == whole and tuple(tensor.shape) != shape
            if name != current or tensor.dtype != dtype or tensor.nbytes > missing or other_shape:
                raise ValueError(f"{name} {tensor.dtype} {tuple(tensor.shape)} is not what the header says comes next")
            file.write(tensor_bytes(tensor.contiguous()))
            missing -= tensor.nbytes
        if missing or next(wanted, None) is not None:
            raise ValueError(f"{path} got fewer tensors than its header names")
        file.flush()
    return offset


def write_tensor_dict(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors that are all there. Wider dtypes first, as the format's own writer does, for alignment."""
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    shapes = {name: (tensors[name].dtype, tuple(tensors[name].shape)) for name in order}
    write_tensors(path, shapes, ((name, tensors[name]) for name in order), metadata)


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, not copied."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())


class SafetensorsFolder:
    """The weights of an HF folder: the files that transformers takes, in its order. A single file comes before an
    index; of the files that an index names every tensor counts, whichever file it names for it.

    entries: every tensor by name, the files' until `rename`. shards: file name -> its tensors' names in the order they
    lie in the file. packed: of `WeightSource`.
    """

    def __init__(self, folder: Path):
        """Raises UserError where weights are missing, truncated, not in safetensors, or twice there and different."""
        if not folder.is_dir():
            raise UserError(f"{folder} is not a folder; give a Hugging Face model folder")
        self.folder = folder
        self.entries: dict[str, TensorEntry] = {}
        self.shards: dict[str, list[str]] = {}
        self.packed: dict[str, tuple[int, ...]] = {}
        for name in self._files():
            entries, _ = read_header(folder / name)
            for tensor in entries.keys() & self.entries.keys():
                self._check_copy(self.entries[tensor], entries.pop(tensor))
            self.shards[name] = sorted(entries, key=lambda tensor: entries[tensor].start)
            self.entries |= entries

    def _check_copy(self, first: TensorEntry, second: TensorEntry) -> None:
        same = (first.dtype, first.shape) == (second.dtype, second.shape)
        if not same or tensor_bytes(read_tensor(first)) != tensor_bytes(read_tensor(second)):
            raise UserError(
                f"{first.name} lies in {first.path.name} and in {second.path.name} of {self.folder}, and they differ; "
                "remove the files that do not belong to the model"
            )

    def _files(self) -> list[str]:
        index = self.folder / INDEX_FILE
        if (self.folder / SINGLE_FILE).is_file():
            return [SINGLE_FILE]
        if not index.is_file():
            others = [path.name for path in sorted(self.folder.iterdir()) if path.name.endswith(OTHER_FORMATS)]
            raise UserError(
                f"{self.folder} holds no {SINGLE_FILE} and no {INDEX_FILE}; the base's weights must be in safetensors"
                + (
                    f": it has {', '.join(others[:3])}, so load it in transformers and write it with save_pretrained"
                    if others
                    else ""
                )
            )
        try:
            weight_map: dict[str, str] = json.loads(index.read_text())["weight_map"]
            names = sorted(set(weight_map.values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{index} is damaged ({error}); fetch it again") from error
        if not names or not all(isinstance(name, str) for name in names):
            raise UserError(f"{index} is damaged (its weight_map names no files); fetch it again")
        return names

    def rename(self, in_model: Callable[[str], str]) -> None:
        """Take every tensor under another name. Raises UserError where two would have one name."""
        entries = {in_model(name): entry for name, entry in self.entries.items()}
        if len(entries) < len(self.entries):
            raise UserError(f"{self.folder} holds tensors of the language model under two names; keep one of them")
        self.entries = entries
        self.shards = {file: [in_model(name) for name in names] for file, names in self.shards.items()}

    def split(self, name: str, pieces: Mapping[str, tuple[int, ...]]) -> None:
        """Take a tensor as pieces that lie one after the other in its bytes, by name, with their shapes."""
        whole = self.entries.pop(name)
        self.packed[whole.name] = whole.shape
        start = whole.start
        for piece, shape in pieces.items():
            stop = start + torch.Size(shape).numel() * whole.dtype.itemsize
            self.entries[piece] = replace(whole, shape=shape, start=start, stop=stop)
            start = stop
        assert start == whole.stop, f"{name}: pieces of {start - whole.start} bytes"
        for names in self.shards.values():
            if name in names:
                place = names.index(name)
                names[place : place + 1] = pieces

    def read(self, name: str) -> Tensor:
        return read_tensor(self.entries[name])

    def file_name(self, name: str) -> str:
        return self.entries[name].name

    def sample(self, name: str) -> bytes:
        return read_sample(self.entries[name])

    def __iter__(self) -> Iterator[TensorEntry]:
        return iter(self.entries.values())
