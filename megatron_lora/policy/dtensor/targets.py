"""Which linears get an adapter on this backend: HF names and fused Megatron names, paths and wildcards of both."""

import difflib
import fnmatch
from collections.abc import Sequence

from megatron_lora.config.schema_adapters import LoraConfig
from megatron_lora.errors import UserError
from megatron_lora.lora.layout import KINDS, Block, ModelShapes, ModuleLayout, module_name, segments_of
from megatron_lora.lora.peft_format import HFLinear, hf_linears

_KEY = "policy.dtensor_cfg.lora_cfg"


def select_linears(config: LoraConfig, shapes: ModelShapes) -> tuple[list[HFLinear], list[str]]:
    """(HF linears to adapt in model order, notices for the user).

    A pattern is a linear's name (`q_proj`, `linear_qkv`), a full path (`model.layers.3.mlp.up_proj`,
    `decoder.layers.3.mlp.linear_fc1`) or a wildcard over full paths. A fused Megatron name stands for the HF linears
    that it covers. The output layer is adapted by name only. Raises UserError where a pattern matches nothing (with
    near names), where nothing is left, and for a tied output layer.
    """
    linears = list(hf_linears(shapes).values())
    notices: list[str] = []
    targets = list(config.target_modules)
    if config.match_all_linear and targets:
        notices.append(f"{_KEY}.match_all_linear=true: target_modules={targets} is not used")
        targets = []
    if targets:
        wanted = {linear.name for pattern in targets for linear in _matching(pattern, linears, notices)}
    else:
        wanted = {linear.name for linear in linears if linear.layer is not None}
    for pattern in config.exclude_modules:
        wanted -= {linear.name for linear in _matching(pattern, linears, notices)}
    if not wanted:
        raise UserError(f"{_KEY}.exclude_modules={config.exclude_modules} leaves no linear to adapt; exclude fewer")
    if "lm_head" in wanted and shapes.tied_embeddings:
        raise UserError(
            f"{_KEY}.target_modules names the output layer, but this model's output layer is its embedding (tied): an "
            "adapter there trains but cannot be exported without untying; leave it out"
        )
    return [linear for linear in linears if linear.name in wanted], notices


def build_modules(linears: Sequence[HFLinear], rank: int, alpha: float, shapes: ModelShapes) -> list[ModuleLayout]:
    """Adapters of the HF linears, those of one fused Megatron linear sharing one A, as on the Megatron backend."""
    segments: dict[str, list[HFLinear]] = {}
    for linear in linears:
        segments.setdefault(module_name(linear.kind, linear.layer), []).append(linear)
    modules = []
    for name, members in segments.items():
        order = segments_of(members[0].kind, shapes)
        present = sorted((linear.segment for linear in members), key=order.index)
        modules.append(ModuleLayout(name, members[0].kind, (Block.build(present, 0, rank, alpha),)))
    return modules


def _matching(pattern: str, linears: Sequence[HFLinear], notices: list[str]) -> list[HFLinear]:
    found = [linear for linear in linears if _fits(pattern, linear.name)]
    if found:
        return found
    found = [linear for linear in linears if _fits(pattern, module_name(linear.kind, linear.layer))]
    if found:
        leaves = dict.fromkeys(linear.name.rsplit(".", 1)[-1] for linear in found)
        notice = f"{pattern!r} is a fused Megatron name; here it is {', '.join(leaves)}"
        if notice not in notices:
            notices.append(notice)
        return found
    leaves = list(dict.fromkeys(linear.name.rsplit(".", 1)[-1] for linear in linears))
    paths = [linear.name for linear in linears]
    near = difflib.get_close_matches(pattern, [*leaves, *KINDS, *paths], n=3, cutoff=0.3) or leaves
    raise UserError(f"{pattern!r} in {_KEY} matches no linear of this model; near names: {', '.join(near)}")


def _fits(pattern: str, name: str) -> bool:
    if name == pattern or name.rsplit(".", 1)[-1] == pattern:
        return True
    # A wildcard never reaches the output layer unless it names it: it is no part of a layer.
    wildcard = any(sign in pattern for sign in "*?[")
    return wildcard and name not in ("lm_head", "output_layer") and fnmatch.fnmatchcase(name, pattern)
