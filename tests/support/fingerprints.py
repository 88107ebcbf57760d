"""The fingerprints that a proof of a refit compares, without an engine."""

import torch

from megatron_lora.policy.interface import AdapterTensors, Policy
from megatron_lora.rollout.adapter_factors import factors_fingerprint, scaled_factors, trainer_fingerprint


def fingerprints(policy: Policy, exported: AdapterTensors) -> list[tuple[str, str]]:
    """In two dtypes: (of the factors in the modules, of those exported). Collective."""
    cpu = torch.device("cpu")
    return [
        (trainer_fingerprint(policy, dtype), factors_fingerprint(scaled_factors(exported, dtype, cpu)))
        for dtype in (torch.float32, torch.bfloat16)
    ]
