"""Small vision-language models: what each family's whole config needs beside the language model's sizes."""

import dataclasses
from typing import Any

VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
    # Qwen's names.
    "depth": 1,
    "embed_dim": 32,
    "num_heads": 2,
    "spatial_merge_size": 1,
    "temporal_patch_size": 1,
    "fullatt_block_indexes": [0],
    "deepstack_visual_indexes": [0],
    "num_position_embeddings": 16,
}


def tower_config(family: str, text: dict[str, Any], *, tied: bool) -> Any:
    """transformers' config of a small vision-language model. text: the fields of its language model; those that the
    family's class lacks are left out."""
    from transformers import CONFIG_MAPPING

    kind: Any = CONFIG_MAPPING[family]
    default = kind()
    declared = {field.name for field in dataclasses.fields(default.text_config)}
    text = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0} | text
    own = {name: value for name, value in text.items() if name in declared} | {"tie_word_embeddings": tied}
    own["model_type"] = default.text_config.model_type
    if family in ("qwen2_vl", "qwen2_5_vl"):
        half = text["hidden_size"] // text["num_attention_heads"] // 2
        sections = [half // 4, half // 4, half - 2 * (half // 4)]
        own["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": sections}
    if family in ("qwen3_5", "qwen3_5_moe"):
        own["rope_parameters"] = {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.25,
            "mrope_interleaved": True,
            "mrope_section": [2, 1, 1],
        }
    seen = {field.name for field in dataclasses.fields(default.vision_config)}
    vision = {name: value for name, value in VISION.items() if name in seen}
    # Qwen2-VL's is the language model's size.
    out = "hidden_size" if family == "qwen2_vl" else "out_hidden_size"
    vision |= {out: text["hidden_size"]} if out in seen else {}
    vision["model_type"] = default.vision_config.model_type
    return kind(text_config=own, vision_config=vision, tie_word_embeddings=tied)
