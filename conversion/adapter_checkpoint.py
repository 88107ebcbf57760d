"""Adapter-only distributed checkpoints (Megatron-Core's `torch_dist`) read and written in one process.

On disk `torch_dist` is a plain torch distributed checkpoint: `.metadata` (a chunk table), `__R_N.distcp` files,
`metadata.json` (the backend's name) and one object, `common_state`. So neither torchrun nor Megatron is needed here.
"""

import json
import pickle
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from megatron_lora.errors import UserError
from megatron_lora.lora.layout import ADAPTER_FILE, AdapterSpec
from megatron_lora.lora.peft_format import check_tensors

BACKEND_FILE = "metadata.json"
BACKEND = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
# Megatron-Core's name for its one object with what is not sharded; an adapter has nothing there.
COMMON_STATE = "common_state/shard_0_1"


def weights_folder(checkpoint: Path | str) -> Path:
    """The folder with the weights: of a step folder, of its `policy`, or the weights folder itself.

    Raises UserError where there is none, or it holds no adapter.
    """
    checkpoint = Path(checkpoint)
    if not checkpoint.is_dir():
        raise UserError(f"adapter checkpoint {checkpoint} is not a folder; give a run's step_N folder")
    for folder in (checkpoint / "policy" / "weights", checkpoint / "weights", checkpoint):
        if (folder / ADAPTER_FILE).is_file():
            return folder
    if (checkpoint / "policy" / "weights" / ".metadata").is_file():
        raise UserError(
            f"{checkpoint} holds full weights and no {ADAPTER_FILE}: it is of full fine-tuning, not of an adapter; "
            "use convert_megatron_to_hf.py"
        )
    raise UserError(f"{checkpoint} holds no policy/weights/{ADAPTER_FILE}; give a complete step_N folder of a LoRA run")


def read_adapter(checkpoint: Path | str) -> tuple[AdapterSpec, dict[str, Tensor]]:
    """(spec, `<module>.lora_A|lora_B` -> full CPU tensor) whatever layout wrote it.

    Holds the adapter once. Raises UserError for missing or truncated files and tensors that the spec does not name.
    """
    folder = weights_folder(checkpoint)
    spec = AdapterSpec.load(folder / ADAPTER_FILE)
    metadata = _read_metadata(folder)
    _check_files(folder, metadata)
    wanted = spec.factor_shapes()
    stored = {
        name: entry for name, entry in metadata.state_dict_metadata.items() if isinstance(entry, TensorStorageMetadata)
    }
    missing, unexpected = sorted(set(wanted) - set(stored)), sorted(set(stored) - set(wanted))
    if missing or unexpected:
        raise UserError(
            f"{folder} does not hold the tensors that its {ADAPTER_FILE} names: missing {missing[:3] or 'none'}, "
            f"unexpected {unexpected[:3] or 'none'}; the checkpoint is incomplete or of another adapter"
        )
    tensors = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in stored.items()}
    try:
        with _one_process():
            dcp.load(dict(tensors), storage_reader=dcp.FileSystemReader(folder), no_dist=True)
    except (dcp.CheckpointException, RuntimeError, OSError, pickle.UnpicklingError, EOFError, ValueError) as error:
        raise UserError(f"{folder} could not be read; a file of it is damaged ({_first_line(error)})") from error
    for name in tensors:
        if name == "output_layer.lora_B" and tensors[name].shape[0] > spec.shapes.vocab_size:
            # Written with the vocabulary padding of its tensor-parallel layout.
            tensors[name] = tensors[name][: spec.shapes.vocab_size].clone()
    check_tensors(spec, tensors)
    return spec, {name: tensors[name] for name in wanted}


def write_adapter(folder: Path | str, spec: AdapterSpec, tensors: dict[str, Tensor]) -> None:
    """Write what Megatron-Core's `dist_checkpointing.load` and `read_adapter` read, into the empty folder."""
    check_tensors(spec, tensors)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    with _one_process():
        dcp.save(
            {**tensors, COMMON_STATE: [{}]}, storage_writer=dcp.FileSystemWriter(folder), planner=planner, no_dist=True
        )
    (folder / BACKEND_FILE).write_text(json.dumps(BACKEND))
    spec.save(folder / ADAPTER_FILE)


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
    except (pickle.UnpicklingError, EOFError, AttributeError, ValueError, IndexError) as error:
        raise UserError(
            f"{folder}/.metadata is damaged ({_first_line(error)}); the checkpoint was cut short"
        ) from error


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


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
