"""A model's config.json with some of its fields replaced (`policy.hf_config_overrides`). Pure: dictionaries in and out.

Rotary embeddings have two spellings: `rope_scaling`, `rope_theta` and `rope_local_base_freq`, and since transformers 5
`rope_parameters`, where bases stand within. Whichever the folder has and the recipe uses, what the recipe says wins,
and a base that it does not name stays the folder's.
"""

import copy
from collections.abc import Mapping
from typing import Any

ROPE_DICTS = ("rope_parameters", "rope_scaling")
_GLOBAL, _LOCAL = "full_attention", "sliding_attention"
# Name beside the rotary dictionary -> (the layers whose dictionary has it, its name there).
_BESIDE = {
    "rope_theta": (_GLOBAL, "rope_theta"),
    "partial_rotary_factor": (_GLOBAL, "partial_rotary_factor"),
    "rope_local_base_freq": (_LOCAL, "rope_theta"),
}


def overridden(content: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """config.json's content with the fields of `overrides` in place of its own; neither is changed."""
    result = copy.deepcopy(dict(content))
    given = copy.deepcopy(dict(overrides))
    if any(name in given for name in ROPE_DICTS):
        _replace_rope(result, given)
    else:
        for name in _BESIDE.keys() & given.keys():
            part = _part_with(result, name)
            if part is not None:
                part[_BESIDE[name][1]] = given[name]
    result.update(given)
    return result


def _replace_rope(content: dict[str, Any], given: dict[str, Any]) -> None:
    """Take the folder's rotary dictionary out of `content`, its bases kept for a new one that names none."""
    bases = {name: _base(content, name) for name in _BESIDE}
    for name in (*ROPE_DICTS, *_BESIDE):
        content.pop(name, None)
    rope = given.get("rope_parameters", given.get("rope_scaling"))
    if isinstance(rope, dict) and _is_by_layer(rope):
        given.pop("rope_scaling", None)
        given["rope_parameters"] = rope
        return
    for name in ROPE_DICTS:
        given.pop(name, None)
    # The older spelling: each class knows which of its layers a dictionary without layers is for.
    given["rope_scaling"] = rope
    for name, value in bases.items():
        if value is not None and name not in given and not (name == "rope_theta" and name in (rope or {})):
            given[name] = value
    if isinstance(rope, dict) and "rope_theta" in given:
        rope.setdefault("rope_theta", given["rope_theta"])


def _base(content: Mapping[str, Any], name: str) -> Any:
    found = (_part_with(content, name) or {}).get(_BESIDE[name][1])
    return content.get(name) if found is None else found


def _part_with(content: Mapping[str, Any], name: str) -> dict[str, Any] | None:
    """Of the rotary dictionary, the part that may have the value which `name` has beside it."""
    layers = _BESIDE[name][0]
    for rope in (content.get(key) for key in ROPE_DICTS):
        if isinstance(rope, dict) and _is_by_layer(rope):
            return rope.setdefault(layers, {})
        if isinstance(rope, dict) and rope and layers == _GLOBAL:
            return rope
    return None


def _is_by_layer(rope: Mapping[str, Any]) -> bool:
    return bool(rope) and all(isinstance(value, dict) for value in rope.values())
