"""Megatron-Core's `torch_dist` checkpoints read and written in one process, a tensor at a time where there are many.

On disk `torch_dist` is a plain torch distributed checkpoint: `.metadata` (a chunk table), `__R_N.distcp` files,
`metadata.json` (the backend's name) and one object, `common_state`. So neither torchrun nor Megatron is needed here.
"""

import json
import pickle
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from megatron_lora.errors import UserError, first_line

BACKEND_FILE = "metadata.json"
BACKEND = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
# Megatron-Core's name for its one object with what is not sharded; weights have nothing there.
COMMON_STATE = "common_state/shard_0_1"
# What unpickling says of bytes that are not those written.
_DAMAGED = (
    pickle.UnpicklingError, EOFError, ValueError, AttributeError, IndexError, KeyError, TypeError, ImportError,
    MemoryError, OverflowError,
)  # fmt: skip


@dataclass(frozen=True)
class StoredTensor:
    """A whole tensor of a checkpoint, however many chunks it lies in."""

    dtype: torch.dtype
    shape: tuple[int, ...]


class TorchDistFolder:
    """A checkpoint open for reading. tensors: every tensor by its key. keys: of objects, too."""

    def __init__(self, folder: Path):
        """Raises UserError where the folder holds no checkpoint, or a file of it is missing or truncated."""
        self.folder = folder
        metadata = _read_metadata(folder)
        _check_files(folder, metadata)
        self.keys = frozenset(metadata.state_dict_metadata)
        self.tensors = {
            name: StoredTensor(entry.properties.dtype, tuple(entry.size))
            for name, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The named tensors, whole, in memory. Raises UserError where a file is damaged."""
        stored = {name: self.tensors[name] for name in names}
        tensors = {name: torch.empty(entry.shape, dtype=entry.dtype) for name, entry in stored.items()}
        self._load(dict(tensors))
        return tensors

    def read_object(self, key: str) -> Any:
        """An object that is no tensor. Raises UserError where a file is damaged."""
        state: dict[str, Any] = {key: None}
        self._load(state)
        # Megatron-Core wraps what every rank has alike in a list.
        return state[key][0] if isinstance(state[key], list) else state[key]

    def _load(self, state: dict[str, Any]) -> None:
        try:
            with _one_process():
                dcp.load(state, storage_reader=dcp.FileSystemReader(self.folder), no_dist=True)
        except (dcp.CheckpointException, RuntimeError, OSError, *_DAMAGED) as error:
            raise UserError(
                f"{self.folder} could not be read; a file of it is damaged ({first_line(error)})"
            ) from error


def write_torch_dist(folder: Path, entries: Mapping[str, StoredTensor], read: Callable[[str], Tensor]) -> None:
    """Write what Megatron-Core's `dist_checkpointing.load` reads, into the folder.

    read: gives a tensor by its key, asked for one at a time. Raises ValueError where one is not as announced.
    """
    folder.mkdir(parents=True, exist_ok=True)
    announced = {name: torch.empty(entry.shape, dtype=entry.dtype, device="meta") for name, entry in entries.items()}
    # Where there is a GPU torch fetches ahead of what it writes, and the planner frees one tensor when it gets another.
    writer = dcp.FileSystemWriter(folder, per_thread_copy_ahead=0)
    try:
        with _one_process():
            dcp.save(
                {**announced, COMMON_STATE: [{}]},
                storage_writer=writer,
                planner=_StreamingPlanner(read),
                no_dist=True,
            )
    except dcp.CheckpointException as error:
        # What went wrong in the writer, a full disk for one, rather than torch's wrapper around it.
        cause = next(iter(error.failures.values()))[0] if error.failures else error
        raise _system_error(cause) or cause from error
    (folder / BACKEND_FILE).write_text(json.dumps(BACKEND))


def _system_error(error: BaseException) -> OSError | None:
    """The error of the system behind an error: torch's archive writer complains of its own position when a write
    fails, and only the context says why."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError):
            return seen
        seen = seen.__cause__ or seen.__context__
    return None


class _StreamingPlanner(DefaultSavePlanner):
    """Plans with tensors on the meta device and fetches each one when its turn comes.

    torch's writer keeps every tensor until the file is closed. So it is given copies, and the memory of one is freed
    when the next is asked for: by then it is written.
    """

    def __init__(self, read: Callable[[str], Tensor]):
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._read = read
        self._written: Tensor | None = None

    def lookup_object(self, index: MetadataIndex) -> Any:
        announced = super().lookup_object(index)
        if not isinstance(announced, Tensor):
            return announced
        if self._written is not None:
            self._written.untyped_storage().resize_(0)
        tensor = self._read(index.fqn).clone(memory_format=torch.contiguous_format)
        self._written = tensor
        if (tensor.dtype, tensor.shape) != (announced.dtype, announced.shape):
            raise ValueError(f"{index.fqn} is {tensor.dtype} {tuple(tensor.shape)}, not what was announced")
        return tensor


@contextmanager
def _one_process() -> Iterator[None]:
    """torch warns that it runs in a single process; that is what is wanted here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        yield


def _read_metadata(folder: Path) -> Metadata:
    if not (folder / ".metadata").is_file():
        raise UserError(f"{folder} holds no weights (.metadata is missing); the checkpoint was cut short")
    try:
        return dcp.FileSystemReader(folder).read_metadata()
    except _DAMAGED as error:
        raise UserError(f"{folder}/.metadata is damaged ({first_line(error)}); the checkpoint was cut short") from error


def _check_files(folder: Path, metadata: Metadata) -> None:
    """Every chunk lies within its file: says more than what the reader raises, and before anything is read."""
    needed: dict[str, int] = {}
    for stored in metadata.storage_data.values():
        needed[stored.relative_path] = max(needed.get(stored.relative_path, 0), stored.offset + stored.length)
    for name, size in needed.items():
        path = folder / name
        if not path.is_file():
            raise UserError(f"{folder} lacks its shard {name}; the checkpoint is incomplete")
        if path.stat().st_size < size:
            raise UserError(f"{path} is truncated: {path.stat().st_size} bytes of {size}; the checkpoint is incomplete")
