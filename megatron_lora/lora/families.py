"""What megatron-bridge's own mapping registry says of each family, as `families.json` holds it.

`python -m tools.bridge_families` writes that file, so reading it needs neither bridge nor Megatron-Core. A family whose
every tensor has a row in `model_tables.py` is known. Pure: no torch.
"""

import functools
import json
from collections.abc import Iterable, Sequence
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
# What published files call tensors and bridge maps, and what transformers' model does: it renames when it reads and
# writes. (there, here), in this order.
FILE_NAMES: dict[str, tuple[tuple[str, str], ...]] = {
    "nemotron_h": (("backbone.", "model."),),
    "ernie4_5_moe": ((".mlp.moe_statics.", ".mlp.gate.moe_statics."),),
    "exaone_moe": ((".mlp.e_score_correction_bias", ".mlp.gate.e_score_correction_bias"),),
    "hy_v3": (
        (".mlp.router.gate.", ".mlp.gate."),
        (".mlp.expert_bias", ".mlp.e_score_correction_bias"),
        (".mlp.shared_mlp.", ".mlp.shared_experts."),
    ),
    "minimax_m2": (
        (".block_sparse_moe.", ".mlp."),
        (".w1.", ".gate_proj."),
        (".w3.", ".up_proj."),
        (".w2.", ".down_proj."),
    ),
}
# Mapped by bridge, in no model that is taken: the norm of a layer without its own linear's, experts in a smaller space.
_LEFT_OUT = ("decoder.layers.*.norm.weight", "decoder.layers.*.mlp.fc1_latent_proj.weight")
_LEFT_OUT += ("decoder.layers.*.mlp.fc2_latent_proj.weight",)
# What a family needs that no layer here computes.
_GEMMA4 = (
    "its layers have heads of two sizes, norms on values, keys and values of earlier layers, and a further embedding "
    "of each token"
)
_NEEDS = {
    "bailing_moe_v2": "transformers has no class of it, only megatron-bridge brings one",
    "deepseek_v4": (
        "a layer has several residual streams, attention over compressed keys and experts that go by the token's number"
    ),
    "falcon_h1": "a layer has attention and Mamba side by side, here it has one of them",
    "gemma4": _GEMMA4,
    "gemma4_text": _GEMMA4,
    "glm_moe_dsa": "its attention sees the keys that an indexer picks (DeepSeek's sparse attention)",
}
FAMILIES_FILE = Path(__file__).with_name("families.json")


@functools.cache
def families() -> dict[str, dict[str, Any]]:
    """HF model_type -> what megatron-bridge says of it; see `tools/bridge_families.py`."""
    return json.loads(FAMILIES_FILE.read_text())


@functools.cache
def mapping(family: str) -> dict[str, Any]:
    """Megatron's name -> the HF name, or segment -> name; a hybrid's under the names of the usual model."""
    result = {}
    for _, name, hf in families().get(family, {}).get("parameters", ()):
        if family in _HYBRID_NAMES and name in _LEFT_OUT:
            continue
        for theirs, ours in _HYBRID_NAMES.get(family, ()):
            name = name.replace(theirs, ours)
        parts = hf if isinstance(hf, dict) else {"": hf}
        parts = {key: replaced(part, FILE_NAMES.get(family, ())) for key, part in parts.items()}
        result[name] = parts.get("", parts)
    return result


def replaced(name: str, pairs: Iterable[Sequence[str]]) -> str:
    """A name with the first of each pair replaced by the second."""
    for old, new in pairs:
        name = name.replace(old, new)
    return name


def file_name(family: str, name: str) -> str:
    """What published files call a tensor of transformers' model; a name of theirs stays as it is."""
    return replaced(name, ((ours, theirs) for theirs, ours in reversed(FILE_NAMES.get(family, ()))))


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
    if family in _NEEDS:
        return f" ({_NEEDS[family]})"
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
