"""Which linears get an adapter: names, full paths and wildcards over global layer numbers."""

import difflib
import fnmatch
from collections.abc import Sequence

from megatron_lora.errors import UserError
from megatron_lora.lora.layout import KINDS, ModelShapes, module_name

DEFAULT_TARGETS = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
HF_NAMES = {
    "q_proj": "linear_qkv",
    "k_proj": "linear_qkv",
    "v_proj": "linear_qkv",
    "o_proj": "linear_proj",
    "gate_proj": "linear_fc1",
    "up_proj": "linear_fc1",
    "down_proj": "linear_fc2",
    "lm_head": "output_layer",
}


def all_linears(shapes: ModelShapes) -> list[str]:
    """Full names of every linear that can carry an adapter, layer by layer, the output layer last."""
    layers = [kind for kind in KINDS if kind != "output_layer"]
    names = [module_name(kind, layer) for layer in range(shapes.num_layers) for kind in layers]
    return [*names, "output_layer"]


def select_targets(shapes: ModelShapes, target_modules: Sequence[str], exclude_modules: Sequence[str]) -> list[str]:
    """Full names of the linears to adapt, in model order.

    A pattern is a linear's name (`linear_qkv`), a full path (`decoder.layers.3.mlp.linear_fc1`) or a wildcard over the
    full path (`*.layers.1.*` is layer 1 alone: `*` stands for any text, the rest is literal). Without targets: the four
    fused linears of every layer, less `exclude_modules`. Layer numbers are global, whatever the pipeline layout.
    Raises UserError where a pattern matches nothing (with near names), for exclusions beside targets, and for an
    adapter on an output layer that shares its weight with the embedding.
    """
    if exclude_modules and target_modules:
        raise UserError(
            f"peft.exclude_modules={list(exclude_modules)} needs empty peft.target_modules, got "
            f"{list(target_modules)}; name the targets alone, or the exclusions alone"
        )
    names = all_linears(shapes)
    wanted = {name for pattern in target_modules or DEFAULT_TARGETS for name in _matching(pattern, names, shapes)}
    for pattern in exclude_modules:
        wanted -= set(_matching(pattern, names, shapes))
    if not wanted:
        raise UserError(f"peft.exclude_modules={list(exclude_modules)} leaves no linear to adapt; exclude fewer")
    if "output_layer" in wanted and shapes.tied_embeddings:
        raise UserError(
            "peft.target_modules names output_layer, but this model's output layer is its embedding (tied): an adapter "
            "there trains but cannot be exported without untying; leave output_layer out"
        )
    return [name for name in names if name in wanted]


def _matching(pattern: str, names: Sequence[str], shapes: ModelShapes) -> list[str]:
    def fits(name: str) -> bool:
        if name == pattern or name.rsplit(".", 1)[-1] == pattern:
            return True
        # A wildcard never reaches the output layer unless it names it: it is no part of a layer.
        return _is_wildcard(pattern) and name != "output_layer" and fnmatch.fnmatchcase(name, pattern)

    found = [name for name in names if fits(name)]
    if found:
        return found
    translated = HF_NAMES.get(pattern)
    if translated:
        raise UserError(
            f"{pattern!r} is a Hugging Face name; in Megatron it is part of {translated!r}: write that in "
            "policy.megatron_cfg.peft"
        )
    near = difflib.get_close_matches(pattern, [*KINDS, *names], n=3, cutoff=0.3) or list(KINDS)
    raise UserError(
        f"{pattern!r} in policy.megatron_cfg.peft matches no linear of this model ({shapes.num_layers} layers); "
        f"near names: {', '.join(near)}"
    )


def _is_wildcard(pattern: str) -> bool:
    return any(sign in pattern for sign in "*?[")
