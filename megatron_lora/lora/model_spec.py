"""One description of a model: sizes, and every tensor of it under Megatron's and Hugging Face's names.

Names come from megatron-bridge's own mapping registry as `families.json` holds it (`python -m tools.bridge_families`
writes that file), sizes from config.json. Neither bridge nor Megatron-Core nor the base is needed to read either.
Pure: no torch. In names of both kinds the first `*` stands for the global layer number, the second for an expert's.
"""

import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from megatron_lora.errors import UserError

FAMILIES_FILE = Path(__file__).with_name("families.json")
LAYER = "decoder.layers.*."
EMBEDDING, OUTPUT_LAYER = "embedding.word_embeddings.weight", "output_layer.weight"


@dataclass(frozen=True)
class HFPart:
    """One HF linear within a Megatron one. segment: its short name there. name: of its module in the HF model. rows:
    its out features."""

    segment: str
    name: str
    rows: int


@dataclass(frozen=True)
class LinearSpec:
    """A kind of linear that can carry an adapter: one in each of `layers`, or the output layer.

    kind: its name below attention or MLP. name: Megatron's, with its place. parts: the HF linears that it covers, whose
    rows lie one part after the other, within each of `query_groups` equal groups where there are any. parallel: what
    tensor parallelism splits, rows (with their groups, or of each part) or columns. layers: None for every layer.
    experts: how many there are of it in a layer, 0 where it is no expert's. bias: whether it has one.
    """

    kind: str
    name: str
    parts: tuple[HFPart, ...]
    in_features: int
    parallel: Literal["column", "row"]
    query_groups: int = 0
    layers: tuple[int, ...] | None = None
    experts: int = 0
    bias: bool = False

    @property
    def interleaved(self) -> bool:
        return self.query_groups > 0

    @property
    def stacked(self) -> bool:
        """Whether a tensor-parallel rank holds a piece of each part instead of one piece of the whole."""
        return len(self.parts) > 1 and not self.interleaved

    @property
    def groups(self) -> int:
        """Equal groups of rows, in each of which the parts lie one after the other."""
        return self.query_groups or 1

    @property
    def segments(self) -> tuple[str, ...]:
        return tuple(part.segment for part in self.parts)

    @property
    def out_features(self) -> int:
        return sum(part.rows for part in self.parts)

    def part(self, segment: str) -> HFPart:
        return next(part for part in self.parts if part.segment == segment)

    def hf_name(self, segment: str, layer: int | None) -> str:
        """The HF module of a segment in one layer; layer is None for the output layer."""
        return resolve(self.part(segment).name, layer)

    def is_in(self, layer: int | None) -> bool:
        """Whether this layer (None: what is in none) has one."""
        if not self.name.startswith(LAYER) or layer is None:
            return layer is None and not self.name.startswith(LAYER)
        return self.layers is None or layer in self.layers

    def on_rank(self, tp_size: int, *, vocab_rows: int | None = None) -> "LinearSpec":
        """The part of a column-parallel linear that one of `tp_size` ranks holds. vocab_rows: of the output layer."""
        rows = [part.rows // tp_size if vocab_rows is None else vocab_rows for part in self.parts]
        parts = tuple(replace(part, rows=number) for part, number in zip(self.parts, rows, strict=True))
        return replace(self, parts=parts, query_groups=self.query_groups // tp_size)


@dataclass(frozen=True)
class ParameterSpec:
    """A tensor that is no adaptable linear's: a norm, a router, the embedding. layers: as in `LinearSpec`."""

    name: str
    hf_name: str
    shape: tuple[int, ...]
    layers: tuple[int, ...] | None = None

    def is_in(self, layer: int) -> bool:
        return self.name.startswith(LAYER) and (self.layers is None or layer in self.layers)


@dataclass(frozen=True)
class ModelSpec:
    """The sizes of a decoder that decide every factor's shape, and its tensors. vocab_size is the model's own, without
    padding. attention_bias: q, k, v and o have biases; mlp_bias: gate, up and down have. num_experts: of a layer, 0 for
    a dense model; moe_ffn_hidden_size: of one expert; dense_layers: those without experts in a model that has them.
    linears, others: filled in from the sizes where they are not given."""

    model_type: str
    hidden_size: int
    ffn_hidden_size: int
    num_layers: int
    num_attention_heads: int
    num_query_groups: int
    head_dim: int
    vocab_size: int
    tied_embeddings: bool
    gated: bool = True
    attention_bias: bool = False
    mlp_bias: bool = False
    num_experts: int = 0
    num_experts_per_token: int = 0
    moe_ffn_hidden_size: int = 0
    dense_layers: tuple[int, ...] = ()
    linears: tuple[LinearSpec, ...] = ()
    others: tuple[ParameterSpec, ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        if not self.linears:
            object.__setattr__(self, "linears", _build_linears(self))
        if not self.others:
            object.__setattr__(self, "others", _build_others(self))

    def linear(self, kind: str) -> LinearSpec:
        """Raises KeyError for a kind that the model does not have."""
        found = next((linear for linear in self.linears if linear.kind == kind), None)
        if found is None:
            raise KeyError(kind)
        return found

    def adaptable(self, layer: int | None) -> list[LinearSpec]:
        """The linears of a layer (None: of none) that can carry an adapter."""
        return [linear for linear in self.linears if linear.is_in(layer) and not linear.experts]

    @property
    def layer_others(self) -> list[ParameterSpec]:
        """Those of `others` that stand in layers."""
        return [other for other in self.others if other.name.startswith(LAYER)]

    def num_copies(self, layers: tuple[int, ...] | None) -> int:
        return self.num_layers if layers is None else len(layers)

    @property
    def kinds(self) -> tuple[str, ...]:
        return tuple(linear.kind for linear in self.linears)

    @property
    def sizes(self) -> dict[str, Any]:
        """The numbers, by name."""
        return {item.name: getattr(self, item.name) for item in fields(self) if item.name not in ("linears", "others")}

    def differences(self, other: "ModelSpec", ours: str = "") -> list[str]:
        """`name=OTHER'S (OURS)` for everything in which another model differs. ours: a word before our value."""
        theirs = other.sizes
        found = [
            f"{name}={theirs[name]} ({ours}{value})" for name, value in self.sizes.items() if theirs[name] != value
        ]
        return found or (["linears of other names"] if self.linears != other.linears else [])

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "ModelSpec":
        """What `dataclasses.asdict` made, also of releases that wrote sizes alone. Raises KeyError or TypeError."""
        values = dict(content)
        if "linears" not in values and _BIASES[0] in _mapping(values["model_type"]):
            # They left out the biases that every model of the family has (Qwen2).
            values["attention_bias"] = True
        for name, kind in (("linears", _linear_from_json), ("others", _parameter_from_json)):
            values[name] = tuple(kind(entry) for entry in values.get(name, ()))
        values["dense_layers"] = tuple(values.get("dense_layers", ()))
        return cls(**values)

    @classmethod
    def from_hf_config(cls, config: Mapping[str, Any]) -> "ModelSpec":
        """The description of the model of an HF `config.json` (its content as a mapping, defaults filled in).

        Raises UserError for a family that megatron-bridge does not map, or not in a way that is known here, and where a
        size is missing.
        """
        family = config.get("model_type")
        reason = unknown_reason(family)
        if reason is not None:
            raise UserError(
                f"model_type={family!r} in the base model's config.json is not a family whose linears are known"
                f"{reason}; use one of {', '.join(known_families())}"
            )
        try:
            spec = cls(**_sizes_of(str(family), config))
        except KeyError as error:
            raise UserError(f"the base model's config.json has no {error.args[0]!r}; is the file complete?") from error
        if spec.dense_layers and "linear_fc1" not in spec.kinds:
            raise UserError(
                f"layers {', '.join(map(str, spec.dense_layers))} of the model have no experts (mlp_only_layers, "
                f"decoder_sparse_step), and megatron-bridge maps none such for {family}; use a model with experts in "
                "every layer"
            )
        return spec


def resolve(name: str, layer: int | None, expert: int | None = None) -> str:
    """A name with the layer's number in it, and the expert's."""
    for number in (layer, expert):
        if number is not None:
            name = name.replace("*", str(number), 1)
    return name


@functools.cache
def families() -> dict[str, dict[str, Any]]:
    """HF model_type -> what megatron-bridge says of it; see `tools/bridge_families.py`."""
    return json.loads(FAMILIES_FILE.read_text())


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
    strange = [name for name in _mapping(family) if not _has_place(name)]
    if strange:
        return f" (nothing here knows {', '.join(strange[:3])}{', ...' if len(strange) > 3 else ''})"
    missing = [kind for kind in _ATTENTION if LAYER + PATHS[kind] not in _linear_names(family)]
    return f" (it has no {', '.join(missing)})" if missing else None


# One row a kind of linear: its path in a layer, and how its sizes follow from the model's.
@dataclass(frozen=True)
class _Linear:
    path: str
    parallel: Literal["column", "row"]
    in_features: Callable[[ModelSpec], int]
    rows: Callable[[ModelSpec], dict[str, int]]
    in_dense: bool = True
    in_sparse: bool = True


def _query(spec: ModelSpec) -> int:
    return spec.num_attention_heads * spec.head_dim


def _qkv_rows(spec: ModelSpec) -> dict[str, int]:
    key = spec.num_query_groups * spec.head_dim
    return {"q": _query(spec), "k": key, "v": key}


def _gate_up(size: int, gated: bool) -> dict[str, int]:
    return {"gate": size, "up": size} if gated else {"up": size}


_LINEARS: dict[str, _Linear] = {
    "linear_qkv": _Linear("self_attention.linear_qkv", "column", lambda s: s.hidden_size, _qkv_rows),
    "linear_proj": _Linear("self_attention.linear_proj", "row", _query, lambda s: {"o": s.hidden_size}),
    "linear_fc1": _Linear(
        "mlp.linear_fc1",
        "column",
        lambda s: s.hidden_size,
        lambda s: _gate_up(s.ffn_hidden_size, s.gated),
        in_sparse=False,
    ),
    "linear_fc2": _Linear(
        "mlp.linear_fc2", "row", lambda s: s.ffn_hidden_size, lambda s: {"down": s.hidden_size}, in_sparse=False
    ),
    "experts.linear_fc1": _Linear(
        "mlp.experts.linear_fc1",
        "column",
        lambda s: s.hidden_size,
        lambda s: _gate_up(s.moe_ffn_hidden_size, s.gated),
        in_dense=False,
    ),
    "experts.linear_fc2": _Linear(
        "mlp.experts.linear_fc2",
        "row",
        lambda s: s.moe_ffn_hidden_size,
        lambda s: {"down": s.hidden_size},
        in_dense=False,
    ),
}


PATHS = {kind: row.path for kind, row in _LINEARS.items()}
_ATTENTION = ("linear_qkv", "linear_proj")
_BIASES = tuple(f"{LAYER}{PATHS[kind]}.bias" for kind in _ATTENTION)


def _hidden(spec: ModelSpec) -> tuple[int, ...]:
    return (spec.hidden_size,)


def _head(spec: ModelSpec) -> tuple[int, ...]:
    return (spec.head_dim,)


# What else stands in a layer, in the forward's order: path -> (shape, in dense layers, in layers with experts).
_OTHERS: dict[str, tuple[Callable[[ModelSpec], tuple[int, ...]], bool, bool]] = {
    "self_attention.linear_qkv.layer_norm_weight": (_hidden, True, True),
    "self_attention.q_layernorm.weight": (_head, True, True),
    "self_attention.k_layernorm.weight": (_head, True, True),
    "self_attention.linear_proj.post_layernorm.weight": (_hidden, True, True),
    "mlp.linear_fc1.layer_norm_weight": (_hidden, True, False),
    "mlp.linear_fc2.post_layernorm.weight": (_hidden, True, False),
    "pre_mlp_layernorm.weight": (_hidden, False, True),
    "mlp.router.weight": (lambda s: (s.num_experts, s.hidden_size), False, True),
}
_WHOLE = (EMBEDDING, OUTPUT_LAYER, "decoder.final_layernorm.weight")
# The same tensors under the names that other layer specifications give them.
_ALIASES = (
    "input_layernorm.weight",
    "mlp.experts.local_experts.*.linear_fc1.weight",
    "mlp.experts.local_experts.*.linear_fc2.weight",
)


def _has_place(name: str) -> bool:
    """Whether a parameter of a registry is described here. Multi-token prediction (mtp.) is not built."""
    path = name.removeprefix(LAYER)
    linear = path.removesuffix("*").removesuffix(".weight").removesuffix(".bias")
    known = linear in {row.path for row in _LINEARS.values()}
    return name in _WHOLE or path in _OTHERS or path in _ALIASES or known or name.startswith("mtp.")


@functools.cache
def _mapping(family: str) -> dict[str, Any]:
    """Megatron's name -> the HF name, or segment -> name."""
    return {megatron: hf for _, megatron, hf in families().get(family, {}).get("parameters", ())}


@functools.cache
def _linear_names(family: str) -> dict[str, Any]:
    """A linear's Megatron name -> its HF modules by segment, or the one HF module."""
    result = {}
    for megatron, hf in _mapping(family).items():
        name = megatron.removesuffix("*")
        if name.endswith(".weight"):
            parts = hf if isinstance(hf, dict) else {"": hf}
            modules = {key: part.removesuffix(".weight") for key, part in parts.items()}
            result[name.removesuffix(".weight")] = modules.get("", modules)
    return result


def _family_of(spec: ModelSpec) -> str:
    # A description that an older release wrote has the form of Llama's.
    return spec.model_type if spec.model_type in families() else "llama"


def _layers(spec: ModelSpec, in_dense: bool, in_sparse: bool) -> tuple[int, ...] | None:
    """The layers that a row of the tables is in; None for all."""
    if not spec.num_experts:
        return None if in_dense else ()
    dense = set(spec.dense_layers)
    layers = tuple(n for n in range(spec.num_layers) if (in_dense if n in dense else in_sparse))
    return None if len(layers) == spec.num_layers else layers


def _build_linears(spec: ModelSpec) -> tuple[LinearSpec, ...]:
    names = _linear_names(_family_of(spec))
    result = []
    for kind, row in _LINEARS.items():
        layers = _layers(spec, row.in_dense, row.in_sparse)
        name = LAYER + row.path
        if name not in names or layers == ():
            continue
        rows, hf = row.rows(spec), names[name]
        parts = tuple(HFPart(key, hf if isinstance(hf, str) else hf[key], size) for key, size in rows.items())
        result.append(
            LinearSpec(
                kind,
                name,
                parts,
                row.in_features(spec),
                row.parallel,
                query_groups=spec.num_query_groups if kind == "linear_qkv" else 0,
                layers=layers,
                experts=0 if row.in_dense else spec.num_experts,
                bias=_has_bias(spec, kind),
            )
        )
    head = (HFPart("lm_head", "lm_head", spec.vocab_size),)
    return (*result, LinearSpec("output_layer", "output_layer", head, spec.hidden_size, "column"))


def _has_bias(spec: ModelSpec, kind: str) -> bool:
    if kind in ("linear_fc1", "linear_fc2"):
        return spec.mlp_bias
    mapped = [name for name in _BIASES if name in _mapping(_family_of(spec))]
    # Where bridge maps no bias, the switch of transformers' class is for all four linears of attention.
    return spec.attention_bias and kind in _ATTENTION and (not mapped or f"{LAYER}{_LINEARS[kind].path}.bias" in mapped)


def _build_others(spec: ModelSpec) -> tuple[ParameterSpec, ...]:
    mapping = _mapping(_family_of(spec))
    result = [ParameterSpec(EMBEDDING, mapping[EMBEDDING], (spec.vocab_size, spec.hidden_size))]
    for path, (shape, in_dense, in_sparse) in _OTHERS.items():
        layers = _layers(spec, in_dense, in_sparse)
        if LAYER + path in mapping and layers != ():
            result.append(ParameterSpec(LAYER + path, mapping[LAYER + path], shape(spec), layers))
    norm = "decoder.final_layernorm.weight"
    return (*result, ParameterSpec(norm, mapping[norm], (spec.hidden_size,)))


def _sizes_of(family: str, config: Mapping[str, Any]) -> dict[str, Any]:
    heads = int(config["num_attention_heads"])
    hidden = int(config["hidden_size"])
    # Where bridge maps no head of its own (Gemma), the family's is tied by default, and config.json may not say so.
    tied = config.get("tie_word_embeddings")
    layers = int(config["num_hidden_layers"])
    sizes = {
        "model_type": family,
        "hidden_size": hidden,
        "ffn_hidden_size": int(config["intermediate_size"]),
        "num_layers": layers,
        "num_attention_heads": heads,
        "num_query_groups": int(config.get("num_key_value_heads") or heads),
        "head_dim": int(config.get("head_dim") or hidden // heads),
        "vocab_size": int(config["vocab_size"]),
        "tied_embeddings": OUTPUT_LAYER not in _mapping(family) if tied is None else bool(tied),
        "gated": any(
            isinstance(_linear_names(family).get(LAYER + PATHS[kind]), dict)
            for kind in ("linear_fc1", "experts.linear_fc1")
        ),
        "attention_bias": bool(config.get("attention_bias", _BIASES[0] in _mapping(family))),
        "mlp_bias": bool(config.get("mlp_bias")),
    }
    if f"{LAYER}mlp.experts.linear_fc1" in _linear_names(family):
        sizes |= _expert_sizes(config, layers)
    return sizes


def _expert_sizes(config: Mapping[str, Any], num_layers: int) -> dict[str, Any]:
    number = config.get("num_experts") or config.get("num_local_experts") or config.get("n_routed_experts")
    if number is None:
        raise KeyError("num_experts")
    # Qwen3-MoE's rule: transformers' Qwen3MoeDecoderLayer.
    step, dense = int(config.get("decoder_sparse_step") or 1), config.get("mlp_only_layers") or []
    if not isinstance(dense, list | tuple):
        raise UserError(f"mlp_only_layers={dense!r} in the base model's config.json: wanted a list of layer numbers")
    sparse = [n for n in range(num_layers) if n not in dense and (n + 1) % step == 0]
    return {
        "num_experts": int(number),
        "num_experts_per_token": int(config["num_experts_per_tok"]),
        "moe_ffn_hidden_size": int(config.get("moe_intermediate_size") or config["intermediate_size"]),
        "dense_layers": tuple(n for n in range(num_layers) if n not in sparse),
    }


def _linear_from_json(content: Mapping[str, Any]) -> LinearSpec:
    layers = content["layers"]
    parts = tuple(HFPart(**part) for part in content["parts"])
    return LinearSpec(**{**content, "parts": parts, "layers": None if layers is None else tuple(layers)})


def _parameter_from_json(content: Mapping[str, Any]) -> ParameterSpec:
    layers = content["layers"]
    return ParameterSpec(
        **{**content, "shape": tuple(content["shape"]), "layers": None if layers is None else tuple(layers)}
    )
