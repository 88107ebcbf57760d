"""The other backend's checkpoint taken over: a whole model's weights and Adam's moments, which lie under Hugging Face
names. (An adapter's weights have one format on both backends.)"""

import logging
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factory_merges
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess
from torch import Tensor

from megatron_lora.conversion.adapter_checkpoint import read_adapter
from megatron_lora.conversion.megatron_weights import HF_EMBEDDING
from megatron_lora.conversion.model_names import fuse, model_parameters
from megatron_lora.conversion.torch_dist import TorchDistFolder
from megatron_lora.errors import UserError
from megatron_lora.lora.layout import AdapterSpec, ModelSpec
from megatron_lora.lora.peft_format import PREFIX
from megatron_lora.lora.peft_format import fuse as fuse_adapter
from megatron_lora.policy.megatron.optimizer_state import MOMENTS, load_optimizer_state, sharded_optimizer_state

logger = logging.getLogger(__name__)

# Names of policy/dtensor/checkpoint.py.
_COMMON, _STATE = "common", "state"
Read = Callable[[str], Tensor]


def is_whole_model(weights: Path) -> bool:
    """Whether the DTensor backend wrote this `policy/weights` in full fine-tuning."""
    return HF_EMBEDDING in _stored(weights)


def is_optimizer(optimizer: Path) -> bool:
    """Whether the DTensor backend wrote this `policy/optimizer`."""
    return _COMMON in _stored(optimizer)


def load_whole_model(state: Mapping[str, Any], shapes: ModelSpec, folder: Path) -> dict[str, Any]:
    """Fill the model's sharded tensors. Raises UserError where the folder is of another model."""
    return _fill(state, _fused_reader(TorchDistFolder(folder), shapes, "{}"))


def load_optimizer(
    optimizer: Any,
    scheduler: Any,
    weights_state: Mapping[str, Any],
    shapes: ModelSpec,
    spec: AdapterSpec | None,
    weights: Path,
    folder: Path,
) -> None:
    """Put the other backend's Adam moments, step and schedule, and the fp32 weights that it trained, into Megatron's
    optimizer.

    weights_state: sharded tensors of what trains. weights, folder: `policy/weights` and `policy/optimizer`. Another
    kind of optimizer starts anew, with a warning. Raises UserError where the folders do not fit.
    """
    stored = TorchDistFolder(folder)
    common = pickle.loads(stored.read([_COMMON])[_COMMON].numpy().tobytes())
    steps = [int(value) for name, value in common["values"].items() if name.endswith(".step")]
    taken = max(steps, default=0)
    _load_schedule(scheduler, common["schedule"], taken)
    if not any(name.endswith(f".{MOMENTS[0]}") for name in stored.tensors):
        logger.warning("%s holds no Adam moments: the optimizer starts anew", folder)
        optimizer.reload_model_params()
        return
    readers: dict[str, Read] = {}
    if spec is not None:
        readers["param"] = read_adapter(weights)[1].__getitem__
        readers |= {moment: _adapter_moment(stored, moment, spec).__getitem__ for moment in MOMENTS}
    else:
        readers["param"] = _fused_reader(TorchDistFolder(weights), shapes, "{}")
        readers |= {moment: _fused_reader(stored, shapes, f"{_STATE}.{{}}.{moment}") for moment in MOMENTS}

    def read(key: str) -> Tensor:
        # optimizer.<param | exp_avg | exp_avg_sq>.<the weight's name>
        _, kind, name = key.split(".", 2)
        return readers[kind](name)

    wanted = sharded_optimizer_state(optimizer, weights_state, loading=True)["tensors"]
    load_optimizer_state(optimizer, weights_state, {"step": taken, "tensors": _fill(wanted, read)})


def _load_schedule(scheduler: Any, stored: Mapping[str, Any], steps: int) -> None:
    if "num_steps" in stored:
        scheduler.load_state_dict(stored)
    else:
        # A torch scheduler of `policy.scheduler`: only how far the run is carries over.
        scheduler.step(increment=steps)


def _fill(state: Mapping[str, Any], read: Read) -> dict[str, Any]:
    """Tensors in the place of a state's sharded tensors. read: the whole tensor of a key on disk."""
    sharded, _, factories = load_preprocess(state)  # type: ignore[arg-type]
    dict_list_map_inplace(
        lambda leaf: _part(read(leaf.key), leaf) if isinstance(leaf, ShardedTensor) else leaf, sharded
    )
    return apply_factory_merges(sharded, factories)  # type: ignore[arg-type]


def _part(whole: Tensor, sharded: ShardedTensor) -> Tensor:
    """This rank's part; padding of the vocabulary, which files do not hold, is zero."""
    result = torch.zeros(sharded.local_shape, dtype=sharded.dtype)
    ranges = zip(sharded.global_offset, sharded.local_shape, strict=True)
    piece = whole[tuple(slice(start, start + size) for start, size in ranges)]
    result[tuple(slice(0, size) for size in piece.shape)] = piece
    assert sharded.data is not None
    return result.to(sharded.data.device)


def _fused_reader(stored: TorchDistFolder, shapes: ModelSpec, pattern: str) -> Read:
    """Megatron's whole tensors by name, from tensors stored as `pattern` of HF names. The last one is kept: gate and up
    are asked for one after the other."""
    table = {parameter.name: parameter for parameter in model_parameters(shapes)}
    last: dict[str, Tensor] = {}

    def read(name: str) -> Tensor:
        if name not in last:
            last.clear()
            keys = [pattern.format(hf_name) for hf_name in table[name].hf_names]
            missing = [key for key in keys if key not in stored.tensors]
            if missing:
                raise UserError(f"{stored.folder} is of another model: it lacks {missing[0]}")
            tensors = stored.read(keys)
            last[name] = fuse(table[name], [tensors[key] for key in keys], shapes)
        return last[name]

    return read


def _adapter_moment(stored: TorchDistFolder, moment: str, spec: AdapterSpec) -> dict[str, Tensor]:
    """One moment of the fused factors; an A that linears share is stored once, under the first one's name."""
    start, end = f"{_STATE}.", f".{moment}"
    keys = [key for key in stored.tensors if key.startswith(start) and key.endswith(end)]
    found = stored.read(keys)
    named = {
        PREFIX + key.removeprefix(start).removesuffix(end).replace(".default", ""): value
        for key, value in found.items()
    }
    try:
        return fuse_adapter(named, spec)
    except KeyError as error:
        raise UserError(f"{stored.folder} holds the optimizer of another adapter: it lacks {error}") from error


def _stored(folder: Path) -> Mapping[str, Any]:
    return TorchDistFolder(folder).tensors if (folder / ".metadata").is_file() else {}
