"""The kinds of linear and of other tensors that a described model may have, and how their sizes follow from its own.

A tensor of a family has a place in the description where a row here bears its Megatron name. Pure: no torch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron_lora.lora.model_spec import EMBEDDING, LAYER, OUTPUT_LAYER, ROUTER, ModelSizes, Parallel


@dataclass(frozen=True)
class LinearRow:
    """A kind of linear: its path in a layer, and how its sizes follow from the model's. A model where one is 0 has none
    of it. expert: there is one for each expert. in_dense, in_sparse: whether layers without and with experts have it;
    in_softmax, in_linear: those of either attention. groups: of its rows, 0 for none. order: HF's own order of the rows
    of some segments, as fields of `HFPart`."""

    path: str
    parallel: Parallel
    in_features: Callable[[ModelSizes], int]
    rows: Callable[[ModelSizes], dict[str, int]]
    in_dense: bool = True
    in_sparse: bool = True
    in_softmax: bool = True
    in_linear: bool = True
    expert: bool = False
    groups: Callable[[ModelSizes], int] = lambda _: 0
    order: Callable[[ModelSizes], dict[str, dict[str, Any]]] = lambda _: {}


def _hidden(sizes: ModelSizes) -> int:
    return sizes.hidden_size


def _query(sizes: ModelSizes) -> int:
    return sizes.num_attention_heads * sizes.head_dim


def _key(sizes: ModelSizes) -> int:
    return sizes.num_query_groups * sizes.head_dim


def _value(sizes: ModelSizes) -> int:
    return sizes.num_attention_heads * (sizes.value_head_dim or sizes.head_dim)


def _qkv_rows(sizes: ModelSizes) -> dict[str, int]:
    return {"q": _query(sizes) * (2 if sizes.gated_attention else 1), "k": _key(sizes), "v": _key(sizes)}


def _qkv_order(sizes: ModelSizes) -> dict[str, dict[str, Any]]:
    return {"q": {"gated": sizes.head_dim}} if sizes.gated_attention else {}


def _linear_key(sizes: ModelSizes) -> int:
    return sizes.linear_key_heads * sizes.linear_key_dim


def _linear_value(sizes: ModelSizes) -> int:
    return sizes.linear_value_heads * sizes.linear_value_dim


def _linear_blocks(sizes: ModelSizes) -> tuple[int, ...]:
    """Queries, keys and values one after the other; of Mamba the values (x), B and C."""
    key, value = _linear_key(sizes), _linear_value(sizes)
    return (value, key, key) if sizes.mixers else (key, key, value)


def _in_blocks(sizes: ModelSizes) -> tuple[int, ...]:
    """Of Mamba's in_proj: gates of the output (z), x, B, C, and a step size a head."""
    return (_linear_value(sizes), *_linear_blocks(sizes), sizes.linear_value_heads)


def _in_rows(sizes: ModelSizes) -> dict[str, int]:
    return {"in": sum(_in_blocks(sizes))} if sizes.mixers else _delta_rows(sizes)


def _in_order(sizes: ModelSizes) -> dict[str, dict[str, Any]]:
    if sizes.mixers:
        return {"in": {"blocks": _in_blocks(sizes)}}
    return {"qkv": {"blocks": _linear_blocks(sizes)}}


def _delta_rows(sizes: ModelSizes) -> dict[str, int]:
    """Of Qwen3-Next's two HF linears or Qwen3.5's four. Both make up, for each key head: its query, key, values, gates
    of the output (z), and for each value head a strength (b) and a decay (a)."""
    heads, values = sizes.linear_value_heads, _linear_value(sizes)
    mixed = sum(_linear_blocks(sizes))
    return {"qkvz": mixed + values, "ba": 2 * heads, "qkv": mixed, "z": values, "b": heads, "a": heads}


def _kv_up_rows(sizes: ModelSizes) -> dict[str, int]:
    not_rotated = sizes.head_dim - sizes.rope_head_dim
    return {"kv_b": sizes.num_attention_heads * (not_rotated + sizes.value_head_dim)}


def _gate_up(size: int, gated: bool) -> dict[str, int]:
    return {"gate": size, "up": size} if gated else {"up": size}


def _mlp(path: str, width: Callable[[ModelSizes], int], **where: Any) -> dict[str, LinearRow]:
    """Both linears of an MLP."""
    return {
        "linear_fc1": LinearRow(
            f"{path}.linear_fc1", "column", _hidden, lambda s: _gate_up(width(s), s.gated), **where
        ),
        "linear_fc2": LinearRow(f"{path}.linear_fc2", "row", width, lambda s: {"down": s.hidden_size}, **where),
    }


def _below(name: str, rows: dict[str, LinearRow]) -> dict[str, LinearRow]:
    return {f"{name}.{kind}": row for kind, row in rows.items()}


# In the forward's order.
LINEARS: dict[str, LinearRow] = {
    "linear_qkv": LinearRow(
        "self_attention.linear_qkv",
        "column",
        _hidden,
        _qkv_rows,
        in_linear=False,
        groups=lambda s: s.num_query_groups,
        order=_qkv_order,
    ),
    "linear_q_proj": LinearRow(
        "self_attention.linear_q_proj", "column", _hidden, lambda s: {"q": 0 if s.q_rank else _query(s)}
    ),
    "linear_q_down_proj": LinearRow(
        "self_attention.linear_q_down_proj", "replicated", _hidden, lambda s: {"q_a": s.q_rank}
    ),
    "linear_q_up_proj": LinearRow(
        "self_attention.linear_q_up_proj", "column", lambda s: s.q_rank, lambda s: {"q_b": _query(s)}
    ),
    "linear_kv_down_proj": LinearRow(
        "self_attention.linear_kv_down_proj", "replicated", _hidden, lambda s: {"kv_a": s.kv_rank + s.rope_head_dim}
    ),
    "linear_kv_up_proj": LinearRow("self_attention.linear_kv_up_proj", "column", lambda s: s.kv_rank, _kv_up_rows),
    "linear_proj": LinearRow(
        "self_attention.linear_proj", "row", _value, lambda s: {"o": s.hidden_size}, in_linear=False
    ),
    "in_proj": LinearRow(
        "self_attention.in_proj",
        "column",
        _hidden,
        _in_rows,
        in_softmax=False,
        groups=lambda s: s.linear_key_heads,
        order=_in_order,
    ),
    "out_proj": LinearRow(
        "self_attention.out_proj", "row", _linear_value, lambda s: {"out": s.hidden_size}, in_softmax=False
    ),
    **_mlp("mlp", lambda s: s.ffn_hidden_size, in_sparse=False),
    **_below("experts", _mlp("mlp.experts", lambda s: s.moe_ffn_hidden_size, in_dense=False, expert=True)),
    **_below("shared_experts", _mlp("mlp.shared_experts", lambda s: s.shared_ffn_hidden_size, in_dense=False)),
    # Its bias, where it has one, is not the linear's that carries an adapter: it stays as it is.
    ROUTER: LinearRow("mlp.router", "replicated", _hidden, lambda s: {"router": s.num_experts}, in_dense=False),
}


PATHS = {kind: row.path for kind, row in LINEARS.items()}
# The linears of attention whose biases one switch of the config turns on.
ATTENTION = ("linear_qkv", "linear_proj")
BIASES = tuple(f"{LAYER}{PATHS[kind]}.bias" for kind in ATTENTION)
# A family has one of these.
QUERIES = ("linear_qkv", "linear_kv_down_proj")
# Families whose norms of queries and keys are over all heads together, not over each.
WHOLE_QK_NORM = ("olmoe", "minimax_m2")
# Families whose queries have a gate of the output each, and most of whose layers have linear attention.
GATED_ATTENTION = ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text")
# Families whose files hold one tensor of all experts of a layer, as transformers' model does, with a bias beside it.
PACKED_EXPERTS = ("gpt_oss",)
# Families whose router adds a bias to what it chooses experts by. Bridge maps one for DeepSeek-V2 too, which has none.
BIASED_ROUTER = (
    "deepseek_v3",
    "glm4_moe",
    "glm4_moe_lite",
    "nemotron_h",
    "ernie4_5_moe",
    "exaone_moe",
    "hy_v3",
    "minimax_m2",
)
# Of these the one whose scores are a softmax over all experts, and whose bias has a dimension of one before theirs.
SOFTMAX_AND_BIAS = "ernie4_5_moe"
# Families whose layers are one thing each: Mamba, attention, an MLP, or experts.
HYBRIDS = ("nemotron_h",)
# Families of which some layers carry a state from token to token.
RECURRENT = (*GATED_ATTENTION, *HYBRIDS)


@dataclass(frozen=True)
class OtherRow:
    """A tensor of a layer that is no linear's: its shape (one with a 0 is not there), the layers that have it, and what
    tensor parallelism splits, of each of its blocks."""

    shape: Callable[[ModelSizes], tuple[int, ...]]
    in_dense: bool = True
    in_sparse: bool = True
    in_softmax: bool = True
    in_linear: bool = True
    tp_axis: int | None = None
    blocks: Callable[[ModelSizes], tuple[int, ...]] = lambda _: ()


def _width(sizes: ModelSizes) -> tuple[int, ...]:
    return (sizes.hidden_size,)


def _qk_norm(heads: Callable[[ModelSizes], int]) -> Callable[[ModelSizes], tuple[int, ...]]:
    def shape(sizes: ModelSizes) -> tuple[int, ...]:
        # Latent attention has these in the linears that follow them.
        if sizes.is_latent or not sizes.qk_norm:
            return (0,)
        return (heads(sizes) if sizes.model_type in WHOLE_QK_NORM else sizes.head_dim,)

    return shape


def _router_bias(sizes: ModelSizes) -> tuple[int, ...]:
    if sizes.model_type not in BIASED_ROUTER:
        return (0,)
    return (1, sizes.num_experts) if sizes.model_type == SOFTMAX_AND_BIAS else (sizes.num_experts,)


# In the forward's order.
OTHERS: dict[str, OtherRow] = {
    # Where a column-parallel linear follows, the norm is that linear's.
    "input_layernorm.weight": OtherRow(lambda s: (s.hidden_size if s.is_latent else 0,)),
    "self_attention.linear_qkv.layer_norm_weight": OtherRow(_width, in_linear=False),
    "self_attention.linear_qkv.layer_norm_bias": OtherRow(_width, in_linear=False),
    "self_attention.q_layernorm.weight": OtherRow(_qk_norm(_query), in_linear=False),
    "self_attention.k_layernorm.weight": OtherRow(_qk_norm(_key), in_linear=False),
    "self_attention.in_proj.layer_norm_weight": OtherRow(_width, in_softmax=False),
    "self_attention.conv1d.weight": OtherRow(
        lambda s: (sum(_linear_blocks(s)), 1, s.linear_kernel), in_softmax=False, tp_axis=0, blocks=_linear_blocks
    ),
    "self_attention.conv1d.bias": OtherRow(
        lambda s: (sum(_linear_blocks(s)),), in_softmax=False, tp_axis=0, blocks=_linear_blocks
    ),
    "self_attention.D": OtherRow(lambda s: (s.linear_value_heads,), in_softmax=False, tp_axis=0),
    "self_attention.A_log": OtherRow(lambda s: (s.linear_value_heads,), in_softmax=False, tp_axis=0),
    "self_attention.dt_bias": OtherRow(lambda s: (s.linear_value_heads,), in_softmax=False, tp_axis=0),
    "self_attention.out_norm.weight": OtherRow(
        lambda s: (_linear_value(s) if s.mixers else s.linear_value_dim,), in_softmax=False
    ),
    "self_attention.linear_q_up_proj.layer_norm_weight": OtherRow(lambda s: (s.q_rank,)),
    "self_attention.linear_kv_up_proj.layer_norm_weight": OtherRow(lambda s: (s.kv_rank,)),
    "self_attention.linear_proj.post_layernorm.weight": OtherRow(_width),
    "mlp.linear_fc1.layer_norm_weight": OtherRow(_width, in_sparse=False),
    "mlp.linear_fc1.layer_norm_bias": OtherRow(_width, in_sparse=False),
    "mlp.linear_fc2.post_layernorm.weight": OtherRow(_width, in_sparse=False),
    "pre_mlp_layernorm.weight": OtherRow(_width, in_dense=False),
    "self_attention.core_attention.softmax_offset": OtherRow(lambda s: (s.num_attention_heads,), tp_axis=0),
    "mlp.shared_experts.gate_weight": OtherRow(lambda s: (int(s.shared_gate), s.hidden_size), in_dense=False),
    "mlp.router.bias": OtherRow(lambda s: (s.num_experts,), in_dense=False),
    "mlp.router.expert_bias": OtherRow(_router_bias, in_dense=False),
}
FINAL_NORM = ("decoder.final_layernorm.weight", "decoder.final_layernorm.bias")
WHOLE = (EMBEDDING, OUTPUT_LAYER, *FINAL_NORM)
# The same tensors under the names that other layer specifications give them.
ALIASES = (
    "input_layernorm.bias",
    "pre_mlp_layernorm.bias",
    "self_attention.kv_layernorm.weight",
    "mlp.experts.local_experts.*.linear_fc1.weight",
    "mlp.experts.local_experts.*.linear_fc2.weight",
    "mlp.experts.local_experts.*.linear_fc1.bias",
    "mlp.experts.local_experts.*.linear_fc2.bias",
)
# Mapped by bridge, in no model of its family (GLM-4.5).
UNUSED = ("mlp.shared_experts.router.weight",)


def has_place(name: str) -> bool:
    """Whether a parameter of a registry is described here. Multi-token prediction (mtp.) is not built."""
    path = name.removeprefix(LAYER)
    linear = path.removesuffix("*").removesuffix(".weight").removesuffix(".bias")
    known = linear in {row.path for row in LINEARS.values()}
    return name in WHOLE or path in (*OTHERS, *ALIASES, *UNUSED) or known or name.startswith("mtp.")
