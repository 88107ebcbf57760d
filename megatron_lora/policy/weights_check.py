"""Looks at a base's files before anything is loaded."""

import json
from pathlib import Path

from megatron_lora.config.schema import PolicyConfig
from megatron_lora.conversion.fingerprint import fingerprint_base
from megatron_lora.conversion.safetensors_io import SafetensorsFolder
from megatron_lora.errors import UserError

MEGATRON_FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text")


def check_base_weights(policy: PolicyConfig) -> None:
    """Raise UserError for a family that the backend lacks, and for a local folder whose weights are missing or cut
    short. A hub name is checked when it is fetched."""
    folder = Path(policy.model_name)
    if not folder.is_dir():
        return
    model_type = json.loads((folder / "config.json").read_text()).get("model_type")
    if policy.backend == "megatron" and model_type not in MEGATRON_FAMILIES:
        raise UserError(
            f"policy.model_name={policy.model_name!r} is a {model_type!r} model; the Megatron backend trains "
            f"{', '.join(MEGATRON_FAMILIES)}; use one of these, or the other backend "
            "(policy.megatron_cfg.enabled=false)"
        )
    SafetensorsFolder(folder)


def local_fingerprint(model_name: str) -> str | None:
    """The fingerprint of a local base, kept with its adapters; None for a hub name."""
    folder = Path(model_name)
    return fingerprint_base(folder) if folder.is_dir() else None
