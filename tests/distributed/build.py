"""A policy of a case, in a worker's process."""

from importlib import import_module
from typing import Any

from megatron_lora.policy.backend import BackendPolicy
from tests.distributed.cases import SEED


def build_policy(case: dict[str, Any], keys: dict[str, Any] | None = None, seed: int = SEED) -> BackendPolicy:
    """keys: of the backend's section, instead of the case's own."""
    # Importing Megatron takes seconds, which the other backend does not need.
    builder = import_module(f"tests.distributed.{case['backend']}_build")
    return builder.build_policy(case, keys, seed)


def keys_of(case: dict[str, Any], adapter: dict[str, Any]) -> dict[str, Any]:
    """The backend's keys of a case, with some of the adapter's changed."""
    section, name = (case["megatron"], "peft") if case["backend"] == "megatron" else (case["dtensor"], "lora_cfg")
    return section | {name: section.get(name, {}) | adapter}
