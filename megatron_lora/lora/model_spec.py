"""One description of a model: its sizes, and every tensor of it under Megatron's and Hugging Face's names.

`lora/describe.py` makes one from a config.json or from an adapter's file. Pure: no torch. In names of both kinds the
first `*` stands for the global layer number, the second for an expert's.
"""

from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

LAYER = "decoder.layers.*."
# What tensor parallelism splits of a linear: its rows, its columns, or nothing.
Parallel = Literal["column", "row", "replicated"]
# The kind of the linear by which a token's experts are chosen.
ROUTER = "router"
EMBEDDING, OUTPUT_LAYER = "embedding.word_embeddings.weight", "output_layer.weight"
# Before the HF names of all but the head, in a model of the language alone.
TEXT = "model."
# What a layer of a hybrid may be, in transformers' words.
HYBRID = ("mamba", "attention", "mlp", "moe")


@dataclass(frozen=True)
class HFPart:
    """One HF linear within a Megatron one. segment: its short name there. name: of its module in the HF model. rows:
    its out features.

    Of a linear whose rows lie in groups, HF's own order of this part's rows, where it is not group by group: blocks:
    one block of rows after the other, each in groups (their sizes). gated: each head's rows are followed by as many of
    its gate, where Megatron has a group's heads first and then their gates (a head's rows).
    """

    segment: str
    name: str
    rows: int
    blocks: tuple[int, ...] = ()
    gated: int = 0

    def on_rank(self, rows: int, tp_size: int) -> "HFPart":
        """The part of it, of so many rows, that one of `tp_size` ranks holds."""
        return replace(self, rows=rows, blocks=tuple(size // tp_size for size in self.blocks))


@dataclass(frozen=True)
class LinearSpec:
    """A kind of linear that can carry an adapter: one in each of `layers`, or the output layer.

    kind: its name below attention or MLP. name: Megatron's, with its place. parts: the HF linears that it covers, whose
    rows lie one part after the other, within each of `query_groups` equal groups where there are any. parallel: what
    tensor parallelism splits, rows (with their groups, or of each part), columns or nothing. layers: None for every
    layer.
    experts: how many there are of it in a layer, 0 where it is no expert's. bias: whether it has one.
    """

    kind: str
    name: str
    parts: tuple[HFPart, ...]
    in_features: int
    parallel: Parallel
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

    @property
    def packed(self) -> bool:
        """Whether one HF tensor holds the matrices of all experts of a layer."""
        return self.experts > 0 and "*" not in self.parts[0].name.partition("*")[2]

    def part(self, segment: str) -> HFPart:
        return next(part for part in self.parts if part.segment == segment)

    @property
    def expert_numbers(self) -> tuple[int | None, ...]:
        """The experts of a layer; None alone where it is no expert's."""
        return tuple(range(self.experts)) if self.experts else (None,)

    def hf_name(self, segment: str, layer: int | None, expert: int | None = None) -> str:
        """The HF module of a segment in one layer (None for the output layer), of one expert. Where all experts are one
        tensor a part of it has a name made up alike."""
        name = resolve(self.part(segment).name, layer, expert)
        return name_in_packed(name, expert, segment) if self.packed and expert is not None else name

    def is_in(self, layer: int | None) -> bool:
        """Whether this layer (None: what is in none) has one."""
        if not self.name.startswith(LAYER) or layer is None:
            return layer is None and not self.name.startswith(LAYER)
        return self.layers is None or layer in self.layers

    def on_rank(self, tp_size: int, *, vocab_rows: int | None = None) -> "LinearSpec":
        """The part of a column-parallel linear that one of `tp_size` ranks holds. vocab_rows: of the output layer."""
        rows = [part.rows // tp_size if vocab_rows is None else vocab_rows for part in self.parts]
        parts = tuple(part.on_rank(number, tp_size) for part, number in zip(self.parts, rows, strict=True))
        return replace(self, parts=parts, query_groups=self.query_groups // tp_size)


@dataclass(frozen=True)
class ParameterSpec:
    """A tensor that is no adaptable linear's: a norm, a router, the embedding. layers: as in `LinearSpec`. tp_axis:
    what tensor parallelism splits, of each of `blocks` (sizes along axis 0) where it has some."""

    name: str
    hf_name: str
    shape: tuple[int, ...]
    layers: tuple[int, ...] | None = None
    tp_axis: int | None = None
    blocks: tuple[int, ...] = ()

    def is_in(self, layer: int) -> bool:
        return self.name.startswith(LAYER) and (self.layers is None or layer in self.layers)


@dataclass(frozen=True)
class ModelSizes:
    """The sizes of a decoder that decide every factor's shape. vocab_size is the model's own, without padding.
    attention_bias: q, k, v and o have biases; mlp_bias: gate, up and down have. num_experts: of a layer, 0 for a dense
    model; moe_ffn_hidden_size: of one expert; shared_ffn_hidden_size: of the shared experts together, 0 for none;
    dense_layers: those without experts in a model that has them. qk_norm: the queries' and keys' norms that the family
    has are there. tower: of the language model in a vision-language one, what stands before the HF names of its layers
    there in the place of `model.`. gated_attention: queries come with a gate of the output each (Qwen3-Next).
    shared_gate: the shared expert has a gate. mixers: of a model whose layers are one thing each (Nemotron-H) what each
    is, one of `HYBRID`; () where every layer has attention and an MLP.

    Linear attention (gated delta net, arXiv 2412.06464) is in linear_layers, with its own heads: linear_key_heads of
    linear_key_dim features, each for as many value heads of linear_value_dim, and a convolution over linear_kernel
    tokens. A hybrid's linear_layers are those of `mamba` (Mamba-2, arXiv 2405.21060): linear_key_heads groups of
    linear_value_heads heads, states of linear_key_dim by linear_value_dim features.

    Latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1) has a kv_rank: of the compressed keys and values;
    q_rank: of the compressed queries, 0 where they are not compressed; head_dim: of a query, of which rope_head_dim are
    rotated; value_head_dim: of a value."""

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
    shared_ffn_hidden_size: int = 0
    qk_norm: bool = True
    q_rank: int = 0
    kv_rank: int = 0
    rope_head_dim: int = 0
    value_head_dim: int = 0
    tower: str = ""
    gated_attention: bool = False
    shared_gate: bool = False
    linear_layers: tuple[int, ...] = ()
    linear_key_heads: int = 0
    linear_value_heads: int = 0
    linear_key_dim: int = 0
    linear_value_dim: int = 0
    linear_kernel: int = 0
    mixers: tuple[str, ...] = ()

    def hf_place(self, name: str) -> str:
        """The HF name, in the whole model, of what is `name` in a model of the language alone."""
        return f"{self.tower}{name.removeprefix(TEXT)}" if self.tower and name.startswith(TEXT) else name

    @property
    def recurrence(self) -> str:
        """How messages name the layers that carry a state from token to token."""
        return "Mamba layers" if self.mixers else "linear attention"

    @property
    def is_latent(self) -> bool:
        """Whether its attention is latent (MLA)."""
        return self.kv_rank > 0

    @property
    def sizes(self) -> dict[str, Any]:
        """The numbers, by name."""
        return {item.name: getattr(self, item.name) for item in fields(ModelSizes)}


@dataclass(frozen=True)
class ModelSpec(ModelSizes):
    """The sizes of a model and its tensors: the linears that can carry an adapter, and all others."""

    linears: tuple[LinearSpec, ...] = field(kw_only=True)
    others: tuple[ParameterSpec, ...] = field(kw_only=True, compare=False)

    def linear(self, kind: str) -> LinearSpec:
        """Raises KeyError for a kind that the model does not have."""
        found = next((linear for linear in self.linears if linear.kind == kind), None)
        if found is None:
            raise KeyError(kind)
        return found

    def adaptable(self, layer: int | None) -> list[LinearSpec]:
        """The linears of a layer (None: of none) that can carry an adapter."""
        return [linear for linear in self.linears if linear.is_in(layer)]

    @property
    def layer_others(self) -> list[ParameterSpec]:
        """Those of `others` that stand in layers."""
        return [other for other in self.others if other.name.startswith(LAYER)]

    @property
    def hf_embedding(self) -> str:
        """The HF name of the embedding's weight."""
        return next(other.hf_name for other in self.others if other.name == EMBEDDING)

    def num_copies(self, layers: tuple[int, ...] | None) -> int:
        return self.num_layers if layers is None else len(layers)

    @property
    def kinds(self) -> tuple[str, ...]:
        return tuple(linear.kind for linear in self.linears)

    def differences(self, other: "ModelSpec", ours: str = "") -> list[str]:
        """`name=OTHER'S (OURS)` for everything in which another model differs. ours: a word before our value."""
        theirs = other.sizes
        found = [
            f"{name}={theirs[name]} ({ours}{value})" for name, value in self.sizes.items() if theirs[name] != value
        ]
        return found or (["linears of other names"] if self.linears != other.linears else [])


def name_in_packed(tensor: str, expert: int, segment: str) -> str:
    """What one expert's part of an HF tensor of all experts is called, as if it were a linear of its own."""
    return f"{tensor.rpartition('.')[0]}.{expert}.{segment}_proj"


def resolve(name: str, layer: int | None, expert: int | None = None) -> str:
    """A name with the layer's number in it, and the expert's."""
    for number in (layer, expert):
        if number is not None:
            name = name.replace("*", str(number), 1)
    return name
