"""A Megatron policy of a case, in a worker's process."""

import os
from typing import Any

import torch
import torch.distributed as dist

from megatron_lora.config.schema import PolicyConfig
from megatron_lora.policy.megatron.policy import MegatronPolicy
from megatron_lora.runtime.world import init_megatron_world
from tests.distributed.build import adapter_keys, critic_of, optimizer_keys, policy_values
from tests.distributed.cases import SEED


def policy_config(case: dict[str, Any], megatron: dict[str, Any] | None = None) -> PolicyConfig:
    """The case's recipe; `megatron` replaces its megatron_cfg where a check needs another layout."""
    megatron = dict(case["megatron"] if megatron is None else megatron)
    peft, optimizer = adapter_keys(case), optimizer_keys(case)
    sections = {"peft": peft | megatron.pop("peft", {}), "optimizer": optimizer | megatron.pop("optimizer", {})}
    defaults = {"use_fused_linear_logprobs": True, "fused_linear_logprobs_chunk_size": 16}
    return PolicyConfig.model_validate(
        policy_values(case) | case["policy"] | {"megatron_cfg": defaults | megatron | sections | {"enabled": True}}
    )


def leave_groups() -> None:
    """End the process groups of the policy before: each has threads that would go on polling."""
    if not dist.is_initialized():
        return
    dist.barrier()
    for group in list(dist.distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)


def forget_kernels() -> None:
    """Megatron's choice of kernels for the model before, of which one process usually has one only."""
    for name in [name for name in os.environ if name.startswith("NVTE_")]:
        del os.environ[name]


def build_policy(case: dict[str, Any], megatron: dict[str, Any] | None = None, seed: int = SEED) -> MegatronPolicy:
    """A fresh policy in its own process groups; those of the policy before are gone."""
    forget_kernels()
    config = policy_config(case, megatron)
    leave_groups()
    world = init_megatron_world(config, seed)
    # Tensors this small only wait for more threads.
    torch.set_num_threads(1)
    return MegatronPolicy(config, world, pad_token_id=0, seed=seed, num_steps=10, critic=critic_of(case))
