"""An adapter as a rollout engine takes it: one pair of factors an HF linear, its scale in B."""

from collections.abc import Mapping

import torch
from torch import Tensor

from megatron_lora.lora.peft_config import read_patterns
from megatron_lora.lora.peft_format import PREFIX
from megatron_lora.policy.checksums import DifferentCopies, checksum, digest, to_numbers
from megatron_lora.policy.interface import AdapterTensors, Policy
from megatron_lora.rollout.generator import RolloutError

# HF linear -> (A [r, in], scale * B [out, r])
Factors = Mapping[str, tuple[Tensor, Tensor]]


def adapted_linears(adapter: AdapterTensors) -> list[str]:
    """The HF linears that an adapter is on."""
    ending = ".lora_A.weight"
    return [name[len(PREFIX) : -len(ending)] for name in adapter.tensors if name.endswith(ending)]


def largest_rank(adapter: AdapterTensors) -> int:
    return max(adapter.tensors[f"{PREFIX}{name}.lora_A.weight"].shape[0] for name in adapted_linears(adapter))


def scaled_factors(adapter: AdapterTensors, dtype: torch.dtype, device: torch.device) -> Factors:
    """The factors in the engine's dtype; each linear's own scale, multiplied in float32."""
    patterns = read_patterns(adapter.config)
    result = {}
    for name in adapted_linears(adapter):
        a = adapter.tensors[f"{PREFIX}{name}.lora_A.weight"]
        b = adapter.tensors[f"{PREFIX}{name}.lora_B.weight"]
        rank, alpha = patterns.rank_and_alpha(name)
        scale = alpha / rank**0.5 if patterns.use_rslora else alpha / rank
        result[name] = (a.to(device, dtype), (b.to(device).float() * scale).to(dtype))
    return result


def factors_fingerprint(factors: Factors) -> str:
    """The fingerprint that an engine which holds these factors has."""
    pieces = {}
    for name, (a, b) in factors.items():
        pieces[f"{PREFIX}{name}.lora_A.weight", 0, 0] = checksum(a)
        pieces[f"{PREFIX}{name}.lora_B.weight", 0, 0] = checksum(b)
    return digest("adapter", {name: value for (name, _, _), value in to_numbers(pieces).items()})


def trainer_fingerprint(policy: Policy, dtype: torch.dtype) -> str:
    """The fingerprint of the factors that the trainer computes with, in the engine's dtype. Collective.

    Raises RolloutError where the trainer's ranks differ in what they hold together.
    """
    try:
        return digest("adapter", policy.adapter_checksums(dtype))
    except DifferentCopies as error:
        raise RolloutError(f"in the trainer {error}") from error
