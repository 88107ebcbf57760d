"""The other backend's checkpoint taken over: a whole model's weights and Adam's state, read under Hugging Face names.
(An adapter's weights have one format on both backends.)"""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factory_merges
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess
from torch import Tensor

from megatron_lora.conversion.adapter_checkpoint import read_adapter
from megatron_lora.conversion.megatron_weights import MegatronWeights
from megatron_lora.conversion.model_names import fuse, model_parameters
from megatron_lora.errors import UserError
from megatron_lora.lora.layout import AdapterSpec, ModelSpec
from megatron_lora.lora.peft_format import fuse as fuse_adapter
from megatron_lora.policy.adam_state import AdamState, read_adam
from megatron_lora.policy.megatron.optimizer_state import load_optimizer_state, sharded_optimizer_state

logger = logging.getLogger(__name__)

Read = Callable[[str], Tensor]


def load_whole_model(state: Mapping[str, Any], shapes: ModelSpec, folder: Path) -> dict[str, Any]:
    """Fill the model's sharded tensors. Raises UserError where the folder is of another model."""
    return _fill(state, _fused_reader(MegatronWeights(folder, shapes).read, shapes))


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
    state = read_adam(folder, spec, shapes)
    _load_schedule(scheduler, state)
    if not state.moments:
        logger.warning("%s holds no Adam moments: the optimizer starts anew", folder)
        optimizer.reload_model_params()
        return
    readers: dict[str, Read] = {}
    if spec is not None:
        readers["param"] = read_adapter(weights)[1].__getitem__
        readers |= {kind: _fused_adapter(moments, spec, folder) for kind, moments in state.moments.items()}
    else:
        readers["param"] = _fused_reader(MegatronWeights(weights, shapes).read, shapes)
        readers |= {kind: _fused_reader(moments.__getitem__, shapes) for kind, moments in state.moments.items()}

    def read(key: str) -> Tensor:
        # optimizer.<param | exp_avg | exp_avg_sq>.<the weight's name>
        _, kind, name = key.split(".", 2)
        return readers[kind](name)

    wanted = sharded_optimizer_state(optimizer, weights_state, loading=True)["tensors"]
    load_optimizer_state(optimizer, weights_state, {"step": state.step, "tensors": _fill(wanted, read)})


def _load_schedule(scheduler: Any, state: AdamState) -> None:
    if "num_steps" in state.schedule:
        scheduler.load_state_dict(state.schedule)
    else:
        # A torch scheduler of `policy.scheduler`: only how far the run is carries over.
        scheduler.step(increment=state.step)


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


def _fused_reader(read_hf: Read, shapes: ModelSpec) -> Read:
    """Megatron's whole tensors by name, from those of HF names. The last one is kept: gate and up are asked for one
    after the other."""
    table = {parameter.name: parameter for parameter in model_parameters(shapes)}
    last: dict[str, Tensor] = {}

    def read(name: str) -> Tensor:
        if name not in last:
            last.clear()
            try:
                parts = [read_hf(hf_name) for hf_name in table[name].hf_names]
            except KeyError as error:
                raise UserError(f"the checkpoint is of another model: it lacks {error}") from error
            last[name] = fuse(table[name], parts, shapes)
        return last[name]

    return read


def _fused_adapter(moments: Mapping[str, Tensor], spec: AdapterSpec, folder: Path) -> Read:
    try:
        return fuse_adapter(dict(moments), spec).__getitem__
    except KeyError as error:
        raise UserError(f"{folder} holds the optimizer of another adapter: it lacks {error}") from error
