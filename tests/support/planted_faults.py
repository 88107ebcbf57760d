"""What can go wrong on the way from a trainer to its rollout engine, planted on purpose: each changes what is handed
over. Every proof of a refit has to tell each of them."""

from collections.abc import Callable

import torch
from torch import Tensor

from megatron_lora.policy.interface import AdapterTensors

Tensors = dict[str, Tensor]
SPLIT_BY_ROWS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")


def _doubled(now: Tensors, before: Tensors) -> Tensors:
    return {name: tensor * 2 if "lora_B" in name else tensor for name, tensor in now.items()}


def _swapped(now: Tensors, before: Tensors) -> Tensors:
    names = {
        name: name.replace("gate_proj", "<>").replace("up_proj", "gate_proj").replace("<>", "up_proj") for name in now
    }
    return {names[name]: tensor for name, tensor in now.items()}


def _without_last_shard(now: Tensors, before: Tensors) -> Tensors:
    """The second half of what a second tensor-parallel rank holds is zero."""
    found = {name: tensor.clone() for name, tensor in now.items()}
    for name, tensor in found.items():
        if "lora_B" in name and any(linear in name for linear in SPLIT_BY_ROWS):
            tensor[tensor.shape[0] // 2 :] = 0
        if "lora_A" in name and not any(linear in name for linear in (*SPLIT_BY_ROWS, "lm_head")):
            tensor[:, tensor.shape[1] // 2 :] = 0
    return found


def _without_a_layer(now: Tensors, before: Tensors) -> Tensors:
    return {name: torch.zeros_like(tensor) if ".layers.1." in name else tensor for name, tensor in now.items()}


# name -> what is handed over instead of the present factors (PEFT names), given those before the last step.
FAULTS: dict[str, Callable[[Tensors, Tensors], Tensors]] = {
    "version before": lambda now, before: before,
    "scale doubled": _doubled,
    "gate and up swapped": _swapped,
    "one TP shard missing": _without_last_shard,
    "one layer missing": _without_a_layer,
}


def plant(fault: str, now: AdapterTensors, before: AdapterTensors) -> AdapterTensors:
    return AdapterTensors(now.config, FAULTS[fault](now.tensors, before.tensors))


def plant_merged(fault: str, now: Tensors, before: Tensors, base: Tensors) -> Tensors:
    """The same faults in merged weights. All three under HF names; base: without an adapter."""
    if fault == "version before":
        return before
    found = dict(now)
    for name, tensor in now.items():
        if name not in base or tensor.dim() < 2:
            continue
        half = tensor.shape[0] // 2
        if fault == "scale doubled":
            found[name] = 2 * tensor - base[name]
        elif fault == "one layer missing" and ".layers.1." in name:
            found[name] = base[name]
        elif fault == "one TP shard missing" and any(linear in name for linear in SPLIT_BY_ROWS):
            found[name] = torch.cat([tensor[:half], base[name][half:]])
        elif fault == "gate and up swapped" and "gate_proj" in name:
            up = name.replace("gate_proj", "up_proj")
            found[name], found[up] = base[name] + now[up] - base[up], base[up] + tensor - base[name]
    return found
