"""The optimizer of a Megatron run taken over: Adam's moments lie under the fused adapters' names, whole."""

import logging
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_lora.lora.layout import AdapterSpec
from megatron_lora.lora.peft_format import to_hf
from megatron_lora.policy.dtensor import adapter
from megatron_lora.policy.dtensor.checkpoint import load_state, put
from megatron_lora.policy.dtensor.optim import Schedule

logger = logging.getLogger(__name__)

# Megatron-Core's name for its one object with what is not sharded.
COMMON_STATE = "common_state/shard_0_1"
MOMENTS = ("exp_avg", "exp_avg_sq")


def is_from_megatron(folder: Path) -> bool:
    """Whether the Megatron backend wrote this `policy/optimizer`."""
    if not (folder / ".metadata").is_file():
        return False
    return COMMON_STATE in dcp.FileSystemReader(folder).read_metadata().state_dict_metadata


def load_from_megatron(
    optimizer: torch.optim.Optimizer, schedule: Schedule, model: nn.Module, spec: AdapterSpec, folder: Path
) -> None:
    """Put Megatron's Adam moments, step and schedule into this backend's optimizer of the same adapters.

    An optimizer of another kind starts anew, with a warning. Raises UserError where the folder does not fit.
    """
    state: dict = {COMMON_STATE: None}
    load_state(state, folder)
    common = state[COMMON_STATE]
    common = common[0] if isinstance(common, list) else common
    schedule.load_state_dict(common["scheduler"])
    if not isinstance(optimizer, torch.optim.Adam):
        logger.warning("%s holds Adam's moments; %s starts anew", folder, type(optimizer).__name__)
        return
    moments = {name: _moment(folder, name, spec) for name in MOMENTS}
    content = optimizer.state_dict()
    order = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    places = {parameter: index for index, parameter in enumerate(order)}
    content["state"] = {}
    for name, parameter in adapter.peft_tensors(model):
        fields: dict[str, Tensor] = {"step": torch.tensor(float(common["optimizer"]["step"]))}
        for moment in MOMENTS:
            fields[moment] = torch.zeros_like(parameter.detach())
            put(fields[moment], moments[moment][name])
        content["state"][places[parameter]] = fields  # type: ignore[index]
    optimizer.load_state_dict(content)


def _moment(folder: Path, name: str, spec: AdapterSpec) -> dict[str, Tensor]:
    """One moment of every factor under PEFT names."""
    stored = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    keys = {f"optimizer.{name}.{factor}": shape for factor, shape in spec.factor_shapes().items()}
    state: dict[str, Tensor] = {}
    for key, shape in keys.items():
        entry = stored.get(key)
        # The output layer's rows may be padded.
        state[key] = torch.empty(entry.size if isinstance(entry, TensorStorageMetadata) else shape)
    load_state(state, folder)
    fused = {key.removeprefix(f"optimizer.{name}."): state[key][: shape[0]] for key, shape in keys.items()}
    return to_hf(spec, fused)[1]
