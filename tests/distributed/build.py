"""A policy of a case, in a worker's process."""

from importlib import import_module
from typing import Any

from megatron_lora.config.schema_critic import CriticConfig
from megatron_lora.policy.backend import BackendPolicy
from tests.distributed.cases import SEED
from tests.support.critic import CRITIC


def build_policy(case: dict[str, Any], keys: dict[str, Any] | None = None, seed: int = SEED) -> BackendPolicy:
    """keys: of the backend's section, instead of the case's own."""
    # Importing Megatron takes seconds, which the other backend does not need.
    builder = import_module(f"tests.distributed.{case['backend']}_build")
    return builder.build_policy(case, keys, seed)


def keys_of(case: dict[str, Any], adapter: dict[str, Any]) -> dict[str, Any]:
    """The backend's keys of a case, with some of the adapter's changed."""
    section, name = (case["megatron"], "peft") if case["backend"] == "megatron" else (case["dtensor"], "lora_cfg")
    return section | {name: section.get(name, {}) | adapter}


def policy_values(case: dict[str, Any]) -> dict[str, Any]:
    """What a case's recipe has in common on both backends: keys of `policy`."""
    return {
        "model_name": case["base_folder"],
        "precision": "float32",
        "train_global_batch_size": 6,
        "train_micro_batch_size": 2,
        "max_total_sequence_length": 64,
    }


def adapter_keys(case: dict[str, Any]) -> dict[str, Any]:
    return {"enabled": case["adapter"] is not None, "init_adapter": case["adapter_folder"], "dim": 4, "alpha": 8}


def critic_of(case: dict[str, Any]) -> CriticConfig | None:
    """options.critic: whether the policy has one."""
    return CriticConfig.model_validate(CRITIC) if case["options"].get("critic") else None


def optimizer_keys(case: dict[str, Any]) -> dict[str, Any]:
    return {
        "lr": case["learning_rate"],
        "weight_decay": 0.1,
        "adam_beta2": 0.98,
        "adam_eps": case["options"].get("adam_eps", case["adam_eps"]),
    }
