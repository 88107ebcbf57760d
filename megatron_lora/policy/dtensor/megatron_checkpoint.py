"""A Megatron run's checkpoint taken over: a whole model's weights, and Adam's moments, which lie under Megatron's fused
names. (An adapter's weights have one format on both backends.)"""

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn

from megatron_lora.conversion.megatron_weights import MegatronWeights
from megatron_lora.conversion.model_names import EMBEDDING, model_parameters, unfuse
from megatron_lora.conversion.torch_dist import COMMON_STATE, TorchDistFolder
from megatron_lora.lora.layout import AdapterSpec, ModelSpec
from megatron_lora.lora.peft_format import to_hf
from megatron_lora.policy.dtensor.checkpoint import load_state, put
from megatron_lora.policy.dtensor.optim import Schedule

logger = logging.getLogger(__name__)

MOMENTS = ("exp_avg", "exp_avg_sq")


def is_whole_model(weights: Path) -> bool:
    """Whether the Megatron backend wrote this `policy/weights` in full fine-tuning."""
    return EMBEDDING in _keys(weights)


def is_optimizer(optimizer: Path) -> bool:
    """Whether the Megatron backend wrote this `policy/optimizer`."""
    return COMMON_STATE in _keys(optimizer)


def load_whole_model(parameters: Mapping[str, nn.Parameter], shapes: ModelSpec, folder: Path) -> None:
    """Fill a transformers model's parameters (by HF name). Raises UserError where the folder does not fit."""
    source = MegatronWeights(folder, shapes)
    with torch.no_grad():
        for name, parameter in parameters.items():
            put(parameter, source.read(name))


def load_optimizer(
    optimizer: torch.optim.Optimizer,
    schedule: Schedule,
    parameters: Mapping[str, nn.Parameter],
    spec: AdapterSpec | None,
    shapes: ModelSpec,
    folder: Path,
) -> None:
    """Put Megatron's Adam moments, step and schedule into this backend's optimizer of the same parameters.

    parameters: what trains, under PEFT names for an adapter (spec), else under HF names. An optimizer of another kind
    starts anew, with a warning. Raises UserError where the folder does not fit.
    """
    state: dict = {COMMON_STATE: None}
    load_state(state, folder)
    common = state[COMMON_STATE]
    common = common[0] if isinstance(common, list) else common
    schedule.load_state_dict(common["scheduler"])
    if not isinstance(optimizer, torch.optim.Adam):
        logger.warning("%s holds Adam's moments; %s starts anew", folder, type(optimizer).__name__)
        return
    step = torch.tensor(float(common["optimizer"]["step"]))
    fields: dict[nn.Parameter, dict[str, Tensor]] = {
        parameter: {"step": step.clone()} for parameter in parameters.values()
    }
    for moment in MOMENTS:
        for name, whole in _moment(folder, moment, spec, shapes):
            parameter = parameters[name]
            fields[parameter][moment] = torch.zeros_like(parameter.detach())
            put(fields[parameter][moment], whole)
    content = optimizer.state_dict()
    order = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    content["state"] = {index: fields[parameter] for index, parameter in enumerate(order)}
    optimizer.load_state_dict(content)


def _moment(folder: Path, moment: str, spec: AdapterSpec | None, shapes: ModelSpec) -> Iterator[tuple[str, Tensor]]:
    """(name, whole tensor) of one moment of everything that trains."""
    stored = TorchDistFolder(folder)
    prefix = f"optimizer.{moment}."
    if spec is not None:
        wanted = {f"{prefix}{factor}": shape for factor, shape in spec.factor_shapes().items()}
        # The output layer's rows may be padded.
        fused = {key.removeprefix(prefix): value[: wanted[key][0]] for key, value in stored.read(wanted).items()}
        yield from to_hf(spec, fused)[1].items()
        return
    for parameter in model_parameters(shapes):
        key = f"{prefix}{parameter.name}"
        whole = stored.read([key])[key]
        for name in parameter.hf_names:
            yield name, unfuse(parameter, whole, name, shapes)


def _keys(folder: Path) -> set[str]:
    if not (folder / ".metadata").is_file():
        return set()
    return set(dcp.FileSystemReader(folder).read_metadata().state_dict_metadata)
