"""What a run saves on this backend. Adapters are written as the Megatron backend writes them (docs/architecture.md,
"Adapter checkpoint"); whole models and the optimizer's state as torch distributed checkpoints, which load on any
layout. The optimizer's moments are under its parameters' HF names.
"""

import logging
import pickle
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from megatron_lora.conversion.adapter_checkpoint import read_adapter, write_adapter
from megatron_lora.conversion.megatron_weights import MegatronWeights
from megatron_lora.errors import UserError
from megatron_lora.lora.layout import ADAPTER_FILE, AdapterSpec, ModelSpec
from megatron_lora.lora.peft_format import fuse, to_hf
from megatron_lora.policy.adam_state import COMMON, STATE, AdamState
from megatron_lora.policy.adapter_start import check_same_adapter
from megatron_lora.policy.dtensor import adapter
from megatron_lora.policy.dtensor.optim import Schedule, TorchSchedule
from megatron_lora.runtime.agreement import same_on_every_rank
from megatron_lora.runtime.world import World

logger = logging.getLogger(__name__)

_RANDOM = "random"
_READ_ERRORS = (dcp.CheckpointException, RuntimeError, OSError, ValueError, KeyError, EOFError, pickle.UnpicklingError)


def save_adapter(model: nn.Module, spec: AdapterSpec, folder: Path, world: World) -> None:
    fused = fuse(adapter.gather(model), spec)
    with same_on_every_rank(world.size):
        if world.is_main:
            write_adapter(folder, spec, fused)


def load_adapter(model: nn.Module, spec: AdapterSpec, folder: Path) -> None:
    """Raises UserError where the folder holds an adapter of another model or of other shapes."""
    found, fused = read_adapter(folder)
    check_same_adapter(spec, found, folder)
    _, tensors = to_hf(spec, fused)
    with torch.no_grad():
        for name, parameter in adapter.peft_tensors(model):
            put(parameter, tensors[name])


def save_model(parameters: Mapping[str, nn.Parameter], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    dcp.save({name: parameter.detach() for name, parameter in parameters.items()}, checkpoint_id=folder)


def load_model(parameters: Mapping[str, nn.Parameter], folder: Path) -> None:
    """Raises UserError where the folder holds no full weights of this model."""
    if (folder / ADAPTER_FILE).is_file():
        raise UserError(f"{folder} holds an adapter, and this run trains the whole model; enable lora_cfg")
    state: dict[str, Any] = {name: parameter.detach() for name, parameter in parameters.items()}
    load_state(state, folder)


def take_over_model(parameters: Mapping[str, nn.Parameter], shapes: ModelSpec, folder: Path) -> None:
    """Fill the parameters (by HF name) from the other backend's weights. Raises UserError where they do not fit."""
    source = MegatronWeights(folder, shapes)
    with torch.no_grad():
        for name, parameter in parameters.items():
            put(parameter, source.read(name))


def save_optimizer(
    optimizer: torch.optim.Optimizer, schedule: Schedule, names: Mapping[nn.Parameter, str], folder: Path, world: World
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    state: dict[str, Any] = {}
    common: dict[str, Any] = {"schedule": schedule.state_dict(), "values": {}}
    for parameter, fields in optimizer.state.items():
        for key, value in fields.items():
            name = f"{STATE}.{names[cast(nn.Parameter, parameter)]}.{key}"
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                state[name] = value
            else:
                common["values"][name] = value.cpu() if isinstance(value, Tensor) else value
    # Layouts cut the parameters into different groups, but what decays and learns alike has the same settings in all.
    common["groups"] = {_group_key(group): _settings(group) for group in optimizer.param_groups}
    state[COMMON] = _to_bytes(common)
    state[_random_key(world)] = _to_bytes(_random_state())
    dcp.save(state, checkpoint_id=folder)


def load_optimizer(
    optimizer: torch.optim.Optimizer, schedule: Schedule, names: Mapping[nn.Parameter, str], folder: Path, world: World
) -> None:
    """Restore moments, schedule and, on the same layout, random states, as `save_optimizer` wrote them."""
    stored = _tensors_in(folder)
    if COMMON not in stored:
        raise UserError(f"{folder} holds no optimizer of this backend; resume with the backend that wrote it")
    common_bytes = torch.empty(stored[COMMON].size, dtype=torch.uint8)
    by_name = {name: parameter for parameter, name in names.items()}
    state: dict[str, Any] = {COMMON: common_bytes}
    for key, entry in stored.items():
        if key.startswith(f"{STATE}."):
            parameter = by_name.get(key.removeprefix(f"{STATE}.").rpartition(".")[0])
            if parameter is None or tuple(entry.size) != tuple(parameter.shape):
                raise UserError(f"{folder} holds the optimizer of another model or adapter ({key})")
            state[key] = torch.zeros_like(parameter.detach(), dtype=entry.properties.dtype)
    if _random_key(world) in stored:
        state[_random_key(world)] = torch.empty(stored[_random_key(world)].size, dtype=torch.uint8)
    load_state(state, folder)
    _put_optimizer_state(optimizer, schedule, names, state, pickle.loads(common_bytes.numpy().tobytes()))
    if _random_key(world) in state:
        _set_random_state(pickle.loads(state[_random_key(world)].numpy().tobytes()))


def take_over_optimizer(
    optimizer: torch.optim.Optimizer, schedule: Schedule, parameters: Mapping[str, nn.Parameter], state: AdamState
) -> None:
    """Put the other backend's step, moments and schedule into this backend's optimizer of the same parameters.

    parameters: what trains, under PEFT names for an adapter, else under HF names. An optimizer of another kind starts
    anew, with a warning.
    """
    schedule.load_state_dict(dict(state.schedule))
    if not isinstance(optimizer, torch.optim.Adam):
        logger.warning("the checkpoint holds Adam's moments; %s starts anew", type(optimizer).__name__)
        return
    step = torch.tensor(float(state.step))
    fields: dict[nn.Parameter, dict[str, Tensor]] = {p: {"step": step.clone()} for p in parameters.values()}
    for kind, moments in state.moments.items():
        for name, parameter in parameters.items():
            fields[parameter][kind] = torch.zeros_like(parameter.detach())
            put(fields[parameter][kind], moments[name])
    content = optimizer.state_dict()
    order = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    content["state"] = {index: fields[parameter] for index, parameter in enumerate(order)}
    optimizer.load_state_dict(content)


def _put_optimizer_state(
    optimizer: torch.optim.Optimizer,
    schedule: Schedule,
    names: Mapping[nn.Parameter, str],
    state: dict[str, Any],
    common: dict[str, Any],
) -> None:
    fields: dict[str, dict[str, Any]] = {}
    for key, value in {**state, **common["values"]}.items():
        if key.startswith(f"{STATE}."):
            name, _, field = key.removeprefix(f"{STATE}.").rpartition(".")
            fields.setdefault(name, {})[field] = value
    recipes = [_settings(group) for group in optimizer.param_groups]
    content = optimizer.state_dict()
    order = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    content["state"] = {
        index: fields[names[parameter]] for index, parameter in enumerate(order) if names[parameter] in fields
    }
    for group in content["param_groups"]:
        group.update(common["groups"][_group_key(group)])
    optimizer.load_state_dict(content)
    # What the recipe says now, as on the Megatron backend; torch's schedulers go on from the rate that they find.
    kept = {"lr", "initial_lr"} if isinstance(schedule, TorchSchedule) else set()
    for group, settings in zip(optimizer.param_groups, recipes, strict=True):
        group.update({key: value for key, value in settings.items() if key not in kept})
    schedule.load_state_dict(common["schedule"])


def _group_key(group: Mapping[str, Any]) -> Any:
    """What tells groups apart whatever the layout: the decay, and whether the learning rate is LoRA+'s."""
    return (group["wd_mult"], "max_lr") if "max_lr" in group else group["wd_mult"]


def _settings(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "params"}


def put(parameter: Tensor, value: Tensor) -> None:
    """Copy a whole value, which every rank has, into this rank's part of a parameter."""
    value = value.to(parameter.device, parameter.dtype)
    if not isinstance(parameter, DTensor):
        parameter.copy_(value)
        return
    mesh, placements = parameter.device_mesh, parameter.placements
    if mesh.ndim == 1:
        local = distribute_tensor(value, mesh, placements, src_data_rank=None)
    else:
        # FSDP shards what TP has split already: TP's slice first.
        split = distribute_tensor(value, mesh["tp"], [parameter.placements[1]], src_data_rank=None).to_local()
        local = distribute_tensor(split, mesh["dp"], [Shard(0)], src_data_rank=None)
    parameter.to_local().copy_(local.to_local())


def _tensors_in(folder: Path) -> dict[str, TensorStorageMetadata]:
    try:
        metadata = dcp.FileSystemReader(folder).read_metadata()
    except (OSError, EOFError, pickle.UnpicklingError, ValueError) as error:
        raise UserError(f"{folder} holds no readable checkpoint ({error}); it was cut short") from error
    return {k: v for k, v in metadata.state_dict_metadata.items() if isinstance(v, TensorStorageMetadata)}


def load_state(state: dict[str, Any], folder: Path) -> None:
    """Fill `state` from a distributed checkpoint. Raises UserError where that does not fit."""
    try:
        dcp.load(state, checkpoint_id=folder)
    except _READ_ERRORS as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
        raise UserError(f"{folder} does not fit this run, or is damaged: {reason}") from error


def _to_bytes(value: Any) -> Tensor:
    return torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)


def _random_key(world: World) -> str:
    return f"{_RANDOM}.tp{world.tp}.dp{world.dp}.{world.rank}"


def _random_state() -> dict[str, Any]:
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": cuda,
    }


def _set_random_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
