"""Megatron's distributed checkpoint of what trains, its optimizer and random states: loads on any layout.

Adapters are written under their full names (docs/architecture.md, "Adapter checkpoint"), whole models as Megatron-Core
writes them. The optimizer's state is written in the parameters' own shapes (optimizer_state.py).
"""

import pickle
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue, AsyncRequest
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.utils import make_sharded_tensor_for_checkpoint, make_tp_sharded_tensor_for_checkpoint
from torch.distributed.checkpoint import CheckpointException, FileSystemReader

from megatron_lora.errors import UserError, first_line
from megatron_lora.lora.held import HeldFactor
from megatron_lora.lora.inject import Adapted
from megatron_lora.lora.layout import without_expert
from megatron_lora.policy.interface import PendingSave
from megatron_lora.policy.megatron.optimizer_state import load_optimizer_state, sharded_optimizer_state
from megatron_lora.runtime.processes import die_with_parent, helpers_survive_signals
from megatron_lora.runtime.world import World

READ_ERRORS = (
    dist_checkpointing.core.CheckpointingException,
    CheckpointException,
    RuntimeError,
    OSError,
    ValueError,
    KeyError,
    EOFError,
    pickle.UnpicklingError,
)


def metadata() -> dict[str, Any]:
    """What Megatron-Core's sharded state dicts want to know of the layout."""
    return {
        "non_homogeneous_layers": True,
        "singleton_local_shards": False,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }


def trained_factors(adapted: Sequence[Adapted]) -> dict[str, tuple[HeldFactor, list[Adapted]]]:
    """What trains, by its key in a state: the factor, of which experts' any, and the linears that it serves."""
    result: dict[str, tuple[HeldFactor, list[Adapted]]] = {}
    for linear in adapted:
        for held in linear.held_factors:
            name = linear.layout.name if held.place is None else without_expert(linear.layout.name)
            result.setdefault(f"{name}.{held.factor.name}", (held, []))[1].append(linear)
    return result


def adapter_state(adapted: Sequence[Adapted]) -> dict[str, Any]:
    """Sharded tensors of the factors that this rank holds, under `<module>.<factor>`; those of experts, which train in
    one tensor, become one of each expert when they are written."""
    state: dict[str, Any] = {}
    for key, (held, linears) in trained_factors(adapted).items():
        if held.place is None:
            state[key] = _sharded_factor(held.parameter, key, held, linears[0])
            if _is_stacked(held, linears[0]):
                # A rank holds [gate shard; up shard]; the whole is [gate; up].
                state[key] = apply_swiglu_sharded_factory(state[key], ())
        else:
            state[key] = _by_expert(key, held, linears)
    return state


def _is_stacked(held: HeldFactor, linear: Adapted) -> bool:
    return held.axis is not None and linear.shapes.linear(linear.layout.kind).stacked


def _sharded_factor(value: Any, key: str, held: HeldFactor, linear: Adapted) -> ShardedTensor:
    groups = _groups(linear, split=held.axis is not None)
    if held.axis is None:
        return make_sharded_tensor_for_checkpoint(value, key, **groups)
    # The padded vocabulary depends on the TP size.
    mismatch = linear.layout.kind == "output_layer"
    return make_tp_sharded_tensor_for_checkpoint(value, key, held.axis, allow_shape_mismatch=mismatch, **groups)


def _by_expert(key: str, held: HeldFactor, linears: Sequence[Adapted]) -> ShardedTensorFactory:
    """One tensor of a rank's experts, on disk a tensor of each expert under its number in the layer."""
    stacked = _is_stacked(held, linears[0])

    def build(key: str, tensor: Any, replica_id: Any, flattened_range: Any) -> Any:
        module, _, factor = key.rpartition(".")
        return [
            _parts(value, f"{module}.{linear.expert}.{factor}", linear)
            for value, linear in zip(tensor, linears, strict=True)
        ]

    def _parts(value: Any, key: str, linear: Adapted) -> list[ShardedTensor]:
        if not stacked:
            return [_sharded_factor(value, key, held, linear)]
        tp, peers = linear.split, _expert_peers()
        return [
            ShardedTensor.from_rank_offsets(
                key, half, (0, number * tp.size + tp.rank, 2 * tp.size), replica_id=(0, 0, peers.rank())
            )
            for number, half in enumerate(value.chunk(2))
        ]

    def merge(parts: Any) -> torch.Tensor:
        return torch.stack([torch.cat(own) for own in parts])

    return ShardedTensorFactory(key, held.parameter, build, merge)


def _groups(linear: Adapted, *, split: bool) -> dict[str, Any]:
    """The ranks that share a linear's weight, and those that hold the same part of it; which copy of several a factor
    is. split: over the former."""
    if linear.expert is None:
        return {"tp_group": linear.split.group, "dp_cp_group": parallel_state.get_data_parallel_group(True)}
    peers = _expert_peers()
    groups = {"tp_group": linear.split.group, "dp_cp_group": peers}
    if linear.layout.expert is not None:
        return groups
    # Ranks with other experts of the layer hold the same, too.
    copy = parallel_state.get_expert_model_parallel_rank() * peers.size() + peers.rank()
    return groups | {"replica_id": (0, 0 if split else linear.split.rank, copy)}


def _expert_peers() -> Any:
    """The ranks that hold the same part of the same experts."""
    return parallel_state.get_expert_data_parallel_group()


def model_state(chunks: Sequence[GPTModel]) -> dict[str, Any]:
    """Sharded tensors of the whole model: full fine-tuning."""
    state: dict[str, Any] = {}
    for index, chunk in enumerate(chunks):
        part = chunk.sharded_state_dict(metadata=metadata())
        # Virtual stages number their layers from 0 each; the names on disk are the sharded tensors' own.
        state |= {f"{index}.{key}": value for key, value in part.items() if not key.endswith("_extra_state")}
    return state


def optimizer_state(optimizer: Any, scheduler: Any, weights: dict[str, Any], world: World, loading: bool) -> dict:
    """Optimizer moments and masters in the weights' shapes, the schedule's position, this rank's random states."""
    state: dict[str, Any] = {
        "optimizer": sharded_optimizer_state(optimizer, weights, loading=loading),
        "scheduler": scheduler.state_dict(),
    }
    state["rng"] = ShardedObject(f"rng.{_layout(world)}", random_state(), (world.size,), (world.rank,), replica_id=0)
    return state


def save_state(state: dict[str, Any], folder: Path, *, asynchronous: bool = False) -> Any:
    """Write into the empty folder; returns Megatron's request where asynchronous, else None when all is written."""
    folder.mkdir(parents=True, exist_ok=True)
    with helpers_survive_signals():
        return dist_checkpointing.save(
            state, str(folder), validate_access_integrity=True, async_sharded_save=asynchronous, async_strategy="mcore"
        )


def schedule_requests(requests: Sequence[AsyncRequest]) -> PendingSave:
    """Write Megatron's requests in the background, one after the other; the answer polls, or waits. Collective."""
    queue = AsyncCallsQueue()
    queue.schedule_async_request(_in_one_process(requests))

    def poll(blocking: bool) -> bool:
        queue.maybe_finalize_async_calls(blocking=blocking)
        return queue.get_num_unfinalized_calls() == 0

    return poll


def _in_one_process(requests: Sequence[AsyncRequest]) -> AsyncRequest:
    """One request that does what these do, in their order.

    Megatron's writers hand their results back through one queue of the process, first come, first served. Two writers
    at a time may take each other's results, and the metadata then lacks tensors that are on disk.
    """
    # A rank that has nothing to write has no function either, but takes part in the end.
    writing = [request for request in requests if request.async_fn is not None]

    def stage() -> list[Any]:
        return [request.preload_fn() if request.preload_fn else request.async_fn_args[1] for request in writing]

    return AsyncRequest(
        async_fn=_write_in_order if writing else None,
        async_fn_args=(writing, None, None),
        finalize_fns=[finish for request in requests for finish in request.finalize_fns],
        preload_fn=stage if writing else None,
    )


def _write_in_order(requests: Sequence[AsyncRequest], staged: Sequence[Any], _: None) -> None:
    # The run that goes on after a kill may write to a folder of the same name.
    die_with_parent()
    for request, buckets in zip(requests, staged, strict=True):
        write: Any = request.async_fn
        rank, _unstaged, results = request.async_fn_args
        write(rank, buckets, results, **request.async_fn_kwargs)


def load_weights(state: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Fill sharded tensors from the folder. Raises UserError where they do not fit."""
    return _load(state, folder, strict="raise_all")


def _load(state: dict[str, Any], folder: Path, **options: Any) -> Any:
    try:
        return dist_checkpointing.load(state, str(folder), **options)
    except READ_ERRORS as error:
        raise UserError(f"{folder} does not fit this run, or is damaged: {first_line(error)}") from error


def load_optimizer(optimizer: Any, scheduler: Any, weights: dict[str, Any], folder: Path, world: World) -> None:
    """Restore the optimizer from any layout; random states where the layout is the same."""
    state = optimizer_state(optimizer, scheduler, weights, world, loading=True)
    if not _has_random_state(folder, world):
        del state["rng"]
    loaded: Any = _load(state, folder)
    load_optimizer_state(optimizer, weights, loaded["optimizer"])
    scheduler.load_state_dict(loaded["scheduler"])
    if "rng" in loaded:
        set_random_state(loaded["rng"])


def random_state() -> dict[str, Any]:
    """Every generator of this process."""
    tracker: Any = get_cuda_rng_tracker()
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(),
        "megatron": tracker.get_states(),
    }


def set_random_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    torch.cuda.set_rng_state(state["cuda"])
    tracker: Any = get_cuda_rng_tracker()
    tracker.set_states(state["megatron"])


def _layout(world: World) -> str:
    return f"tp{world.tp}.pp{world.pp}.cp{world.cp}.dp{world.dp}"


def _has_random_state(folder: Path, world: World) -> bool:
    keys = FileSystemReader(folder).read_metadata().state_dict_metadata
    wanted = f"rng.{_layout(world)}"
    return any(re.match(rf"{re.escape(wanted)}(/|$)", key) for key in keys)
