"""A DTensor policy of a case, in a worker's process."""

from typing import Any

import torch

from megatron_lora.config.schema import PolicyConfig
from megatron_lora.policy.dtensor.policy import DTensorPolicy
from megatron_lora.runtime.world import init_dtensor_world
from tests.distributed.build import adapter_keys, critic_of, optimizer_keys, policy_values
from tests.distributed.cases import SEED


def policy_config(case: dict[str, Any], dtensor: dict[str, Any] | None = None) -> PolicyConfig:
    """The case's recipe; `dtensor` replaces its dtensor_cfg where a check needs another layout."""
    dtensor = dict(case["dtensor"] if dtensor is None else dtensor)
    adapter, optimizer = adapter_keys(case), optimizer_keys(case)
    values = policy_values(case) | {
        "dtensor_cfg": dtensor | {"lora_cfg": adapter | dtensor.pop("lora_cfg", {})},
        "megatron_cfg": {
            # Chunks that do not divide the tokens.
            "fused_linear_logprobs_chunk_size": 24,
            "optimizer": optimizer,
            "scheduler": {"lr_decay_style": "constant"},
        },
    }
    return PolicyConfig.model_validate(values | case["policy"])


def build_policy(case: dict[str, Any], dtensor: dict[str, Any] | None = None, seed: int = SEED) -> DTensorPolicy:
    config = policy_config(case, dtensor)
    world = init_dtensor_world(config, seed)
    # Tensors this small only wait for more threads.
    torch.set_num_threads(1)
    return DTensorPolicy(config, world, pad_token_id=0, seed=seed, num_steps=10, critic=critic_of(case))
