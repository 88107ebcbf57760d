"""What megatron-bridge's own mapping registry says of each family, as `families.json` holds it.

`python -m tools.bridge_families` writes that file, so reading it needs neither bridge nor Megatron-Core. A family whose
every tensor has a row in `model_tables.py` is known. Pure: no torch.
"""

import functools
import json
from pathlib import Path
from typing import Any

from megatron_lora.lora.model_spec import LAYER
from megatron_lora.lora.model_tables import PATHS, QUERIES, has_place

# Families that bridge builds as Megatron-Core's hybrid model, under names of its own: (there, here). Here each layer is
# one of the usual model's, with its mixer in the place of attention.
_HYBRID_NAMES = {
    "nemotron_h": (
        (".mixer.norm.", ".self_attention.out_norm."),
        (".mixer.conv1d_", ".self_attention.conv1d."),
        (".mixer.", ".self_attention."),
        ("decoder.final_norm.", "decoder.final_layernorm."),
    )
}
# transformers' names of tensors for those that files have, which bridge maps.
_HF_NAMES = {"nemotron_h": ("backbone.", "model.")}
# Mapped by bridge, in no model that is taken: the norm of a layer without its own linear's, experts in a smaller space.
_LEFT_OUT = ("decoder.layers.*.norm.weight", "decoder.layers.*.mlp.fc1_latent_proj.weight")
_LEFT_OUT += ("decoder.layers.*.mlp.fc2_latent_proj.weight",)
FAMILIES_FILE = Path(__file__).with_name("families.json")


@functools.cache
def families() -> dict[str, dict[str, Any]]:
    """HF model_type -> what megatron-bridge says of it; see `tools/bridge_families.py`."""
    return json.loads(FAMILIES_FILE.read_text())


@functools.cache
def mapping(family: str) -> dict[str, Any]:
    """Megatron's name -> the HF name, or segment -> name."""
    found = {megatron: hf for _, megatron, hf in families().get(family, {}).get("parameters", ())}
    return _as_usual(family, found) if family in _HYBRID_NAMES else found


def _as_usual(family: str, found: dict[str, Any]) -> dict[str, Any]:
    """A hybrid's mapping under the names of the usual model."""
    result = {}
    for name, hf in found.items():
        if name in _LEFT_OUT:
            continue
        for theirs, ours in _HYBRID_NAMES[family]:
            name = name.replace(theirs, ours)
        parts = hf if isinstance(hf, dict) else {"": hf}
        parts = {key: part.replace(*_HF_NAMES[family]) for key, part in parts.items()}
        result[name] = parts.get("", parts)
    return result


@functools.cache
def linear_names(family: str) -> dict[str, Any]:
    """A linear's Megatron name -> its HF modules by segment, or the one HF module."""
    result = {}
    for megatron, hf in mapping(family).items():
        name = megatron.removesuffix("*")
        if name.endswith(".weight"):
            parts = hf if isinstance(hf, dict) else {"": hf}
            modules = {key: part.removesuffix(".weight") for key, part in parts.items()}
            result[name.removesuffix(".weight")] = modules.get("", modules)
    return result


@functools.cache
def known_families() -> tuple[str, ...]:
    """The families whose every tensor has a place in this description."""
    return tuple(name for name in families() if unknown_reason(name) is None)


def unknown_reason(family: object) -> str | None:
    """Why a family cannot be described, as it follows its name in a message; None for one that can."""
    if not isinstance(family, str) or family not in families():
        return " (megatron-bridge maps no such family)"
    if "failed" in families()[family]:
        return f" (megatron-bridge gives no mapping: {families()[family]['failed']})"
    strange = [name for name in mapping(family) if not has_place(name)]
    if strange:
        return f" (nothing here knows {', '.join(strange[:3])}{', ...' if len(strange) > 3 else ''})"
    if not any(LAYER + PATHS[kind] in linear_names(family) for kind in QUERIES):
        return f" (it has no {' and no '.join(QUERIES)})"
    if not isinstance(linear_names(family).get(LAYER + PATHS["linear_qkv"], {}), dict):
        return " (its queries, keys and values are one tensor)"
    return None
