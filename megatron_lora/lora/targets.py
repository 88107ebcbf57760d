"""Which linears get an adapter: HF and fused Megatron names, full paths and wildcards of both, on both backends."""

import difflib
import fnmatch
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from megatron_lora.errors import UserError
from megatron_lora.lora.layout import Block, ModelSpec, ModuleLayout, module_name
from megatron_lora.lora.model_spec import ROUTER
from megatron_lora.lora.packed_experts import packed_name
from megatron_lora.lora.peft_config import fits_end
from megatron_lora.lora.peft_format import HFLinear, hf_linears

# Last names of a router, Megatron's and transformers'.
ROUTERS = (ROUTER, "gate")
Naming = Literal["megatron", "hf"]


@dataclass
class Selection:
    """linears: the HF linears to adapt, in model order. notices: how names of the other kind were understood."""

    linears: list[HFLinear]
    notices: list[str] = field(default_factory=list)


def select_linears(
    shapes: ModelSpec, target_modules: Sequence[str], exclude_modules: Sequence[str], *, key: str, naming: Naming
) -> Selection:
    """The linears that a recipe's section `key` adapts.

    A pattern is a linear's name (`linear_qkv`, `q_proj`), a full path (`decoder.layers.3.mlp.linear_fc1`,
    `model.layers.3.mlp.up_proj`) or a wildcard over full paths (`*.layers.1.*` is layer 1 alone: `*` stands for any
    text, the rest is literal). Without targets: every linear of attention and MLP but for routed experts' and the
    router's, less `exclude_modules`; a router is adapted where it is named (`router`, `gate`, `*.mlp.router`), experts
    are adapted where their linears are named (`linear_fc1`, `experts.linear_fc1`,
    `gate_up_proj`, `*.experts.*`), all of a layer alike, and Mamba's out_proj, which peft does not load, where it is
    named. A fused name
    stands for the HF linears that it covers; an HF name for its part of the fused linear alone. Layer numbers are
    global, whatever the pipeline layout. naming: the names that this backend has itself; others are translated, which
    the notices say. Raises UserError where a pattern matches nothing (with near names), for exclusions beside targets,
    where nothing is left, and for an adapter on an output layer that shares its weight with the embedding.
    """
    if exclude_modules and target_modules:
        raise UserError(
            f"{key}.exclude_modules={list(exclude_modules)} needs empty {key}.target_modules, got "
            f"{list(target_modules)}; name the targets alone, or the exclusions alone"
        )
    linears = list(hf_linears(shapes).values())
    matcher = _Matcher(linears, key, naming, _packed_names(shapes))
    wanted = {
        linear.name
        for linear in linears
        if linear.layer is not None and linear.expert is None and not _is_named_alone(shapes, linear)
    }
    if target_modules:
        wanted = {linear.name for pattern in target_modules for linear in matcher.find(pattern)}
    for pattern in exclude_modules:
        wanted -= {linear.name for linear in matcher.find(pattern)}
    if not wanted:
        raise UserError(f"{key}.exclude_modules={list(exclude_modules)} leaves no linear to adapt; exclude fewer")
    if "lm_head" in wanted and shapes.tied_embeddings:
        raise UserError(
            f"{key}.target_modules names the output layer, but this model's output layer is its embedding (tied): an "
            "adapter there trains but cannot be exported without untying; leave it out"
        )
    notices = list(matcher.notices)
    if shapes.num_experts and not target_modules:
        notices.append(_frozen_experts(shapes, key))
    chosen = [linear for linear in linears if linear.name in wanted]
    if any(_is_mambas(shapes, linear) for linear in chosen):
        notices.append(
            f"{key}: Mamba's out_proj gets adapters, which PEFT does not load (its kernels read the weight past them): "
            "merge the trained adapter, or leave out_proj out"
        )
    _check_whole_experts(shapes, chosen, key)
    return Selection(chosen, notices)


def _is_named_alone(shapes: ModelSpec, linear: HFLinear) -> bool:
    return linear.kind == ROUTER or _is_mambas(shapes, linear)


def _is_mambas(shapes: ModelSpec, linear: HFLinear) -> bool:
    """Whether it is the linear of a Mamba mixer that peft refuses to adapt."""
    return bool(shapes.mixers) and linear.kind == "out_proj"


def _frozen_experts(shapes: ModelSpec, key: str) -> str:
    return (
        f"{key}: the {shapes.num_experts} experts of each layer and their router stay frozen; to adapt the experts "
        "name their linears in target_modules (linear_fc1, linear_fc2; or gate_proj, up_proj, down_proj); to adapt the "
        "router name it in target_modules (router)"
    )


def _packed_names(shapes: ModelSpec) -> dict[tuple[str, int | None], str]:
    """(kind, layer) -> transformers' name of the tensor of all experts."""
    return {
        (linear.kind, layer): packed_name(linear, layer)
        for layer in range(shapes.num_layers)
        for linear in shapes.adaptable(layer)
        if linear.experts
    }


def _check_whole_experts(shapes: ModelSpec, chosen: Sequence[HFLinear], key: str) -> None:
    """The experts of a layer are one tensor in transformers' model, gate and up in one: all are adapted or none."""
    counts = Counter((linear.kind, linear.layer) for linear in chosen if linear.expert is not None)
    for (kind, layer), count in counts.items():
        linear = shapes.linear(kind)
        if count < linear.experts * len(linear.parts):
            raise UserError(
                f"{key}.target_modules names {count} of the {linear.experts * len(linear.parts)} linears that "
                f"{module_name(kind, layer)} is ({', '.join(linear.segments)} of {linear.experts} experts); all "
                f"of them are adapted or none: name {kind}"
            )


def build_modules(
    linears: Sequence[HFLinear],
    rank: int,
    alpha: float,
    shapes: ModelSpec,
    *,
    ranks: Mapping[str, int] | None = None,
    alphas: Mapping[str, float] | None = None,
    use_rslora: bool = False,
    separate: bool = False,
    share_experts: bool = False,
) -> list[ModuleLayout]:
    """New adapters of the HF linears. Those of one fused Megatron linear with the same rank and alpha share one A,
    unless `separate`; experts of a layer one adapter with `share_experts`. ranks, alphas: what single HF linears have
    instead of `rank` and `alpha`."""
    ranks, alphas = ranks or {}, alphas or {}
    modules: dict[str, list[HFLinear]] = {}
    for linear in linears:
        if not (share_experts and linear.expert):
            expert = None if share_experts else linear.expert
            modules.setdefault(module_name(linear.kind, linear.layer, expert), []).append(linear)
    result = []
    for name, members in modules.items():
        groups: dict[tuple, list[str]] = {}
        for linear in members:
            size, scaled_by = ranks.get(linear.name, rank), alphas.get(linear.name, alpha)
            key = (size, scaled_by, linear.segment) if separate else (size, scaled_by)
            groups.setdefault(key, []).append(linear.segment)
        blocks: list[Block] = []
        for (size, scaled_by, *_), segments in groups.items():
            start = blocks[-1].stop if blocks else 0
            blocks.append(Block.build(segments, start, size, scaled_by, use_rslora))
        result.append(ModuleLayout(name, members[0].kind, tuple(blocks)))
    return result


def match_patterns[Value: (int, float)](
    shapes: ModelSpec, adapted: Sequence[HFLinear], patterns: Mapping[str, Value], *, key: str, naming: Naming
) -> dict[str, Value]:
    """HF linear -> its value in the recipe's `key`, for the adapted linears that a pattern names: in the forms of
    `select_linears`, or where it fits in none of them as peft's keys do, by a regular expression for the end of a name.
    The first pattern that names a linear counts. Raises UserError for one that names none."""
    matcher = _Matcher(list(hf_linears(shapes).values()), key, naming, _packed_names(shapes))
    names = {linear.name for linear in adapted}
    result: dict[str, Value] = {}
    for pattern, value in patterns.items():
        named = matcher.fitting(pattern) or matcher.fitting_as_in_peft(pattern) or matcher.find(pattern)
        found = [linear.name for linear in named if linear.name in names]
        if not found:
            raise UserError(f"{pattern!r} in {key} names no linear that has an adapter; add it to target_modules")
        for name in found:
            result.setdefault(name, value)
    return result


@dataclass
class _Matcher:
    linears: Sequence[HFLinear]
    key: str
    naming: Naming
    # (kind, layer) -> the HF tensor of all experts, by which their linears can be named too.
    packed: Mapping[tuple[str, int | None], str]
    # A dict for its order: each translation is told once.
    notices: dict[str, None] = field(default_factory=dict)

    def find(self, pattern: str) -> list[HFLinear]:
        """Raises UserError where there is none."""
        found = self.fitting(pattern)
        if not found:
            raise self._no_match(pattern)
        return found

    def fitting(self, pattern: str) -> list[HFLinear]:
        by_naming = {
            "hf": [
                linear for linear in self.linears if _fits(pattern, linear.name) or self._fits_packed(pattern, linear)
            ],
            "megatron": [linear for linear in self.linears if _fits(pattern, _fused_name(linear))],
        }
        own = by_naming.pop(self.naming)
        if own:
            return own
        [other] = by_naming.values()
        if other:
            self.notices[self._translation(pattern, other)] = None
        return other

    def fitting_as_in_peft(self, pattern: str) -> list[HFLinear]:
        """Where peft's `rank_pattern` and `alpha_pattern` reach (`peft_config.PeftPatterns`)."""
        try:
            return [linear for linear in self.linears if fits_end(pattern, linear.name)]
        except re.error:
            return []

    def _fits_packed(self, pattern: str, linear: HFLinear) -> bool:
        return linear.expert is not None and _fits(pattern, self.packed[linear.kind, linear.layer])

    def _translation(self, pattern: str, found: Sequence[HFLinear]) -> str:
        if self.naming == "hf":
            leaves = dict.fromkeys(_leaf(linear.name) for linear in found)
            return f"{pattern!r} is a fused Megatron name; here it is {', '.join(leaves)}"
        parts: dict[str, dict[str, None]] = {}
        for linear in found:
            parts.setdefault(linear.kind, {})[linear.segment] = None
        where = ", ".join(f"{kind} ({', '.join(segments)})" for kind, segments in parts.items())
        return f"{pattern!r} is a Hugging Face name; here it is {where}"

    def _no_match(self, pattern: str) -> UserError:
        # One expert stands for all.
        linears = [linear for linear in self.linears if not linear.expert]
        hf_paths, fused_paths = ([linear.name for linear in linears], list(map(_fused_name, linears)))
        hf_leaves, fused_leaves = (
            list(dict.fromkeys(map(_leaf, hf_paths))),
            list(dict.fromkeys(linear.kind for linear in self.linears)),
        )
        own = [*fused_leaves, *fused_paths] if self.naming == "megatron" else [*hf_leaves, *hf_paths]
        other = [*hf_leaves, *hf_paths] if self.naming == "megatron" else [*fused_leaves, *fused_paths]
        near = difflib.get_close_matches(pattern, dict.fromkeys([*own, *other]), n=3, cutoff=0.3)
        near = near or (fused_leaves if self.naming == "megatron" else hf_leaves)
        num_layers = len({linear.layer for linear in self.linears if linear.layer is not None})
        return UserError(
            f"{pattern!r} in {self.key} matches no linear of this model ({num_layers} layers); "
            f"near names: {', '.join(near)}"
        )


def _fused_name(linear: HFLinear) -> str:
    return module_name(linear.kind, linear.layer)


def _leaf(name: str) -> str:
    return name.rsplit(".", 1)[-1]


def _fits(pattern: str, name: str) -> bool:
    if name == pattern or name.endswith(f".{pattern}"):
        return True
    # A wildcard never reaches the output layer unless it names it: it is no part of a layer. Nor a router.
    wildcard = any(sign in pattern for sign in "*?[") and (_leaf(name) not in ROUTERS or _leaf(pattern) == _leaf(name))
    return wildcard and name not in ("lm_head", "output_layer") and fnmatch.fnmatchcase(name, pattern)
