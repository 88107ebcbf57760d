"""The kinds of linear and of other tensors that a described model may have, and how their sizes follow from its own.

A tensor of a family has a place in the description where a row here bears its Megatron name. Pure: no torch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from megatron_lora.lora.model_spec import EMBEDDING, LAYER, OUTPUT_LAYER, ModelSizes


@dataclass(frozen=True)
class LinearRow:
    """A kind of linear: its path in a layer, and how its sizes follow from the model's."""

    path: str
    parallel: Literal["column", "row"]
    in_features: Callable[[ModelSizes], int]
    rows: Callable[[ModelSizes], dict[str, int]]
    in_dense: bool = True
    in_sparse: bool = True


def _query(sizes: ModelSizes) -> int:
    return sizes.num_attention_heads * sizes.head_dim


def _qkv_rows(sizes: ModelSizes) -> dict[str, int]:
    key = sizes.num_query_groups * sizes.head_dim
    return {"q": _query(sizes), "k": key, "v": key}


def _gate_up(size: int, gated: bool) -> dict[str, int]:
    return {"gate": size, "up": size} if gated else {"up": size}


LINEARS: dict[str, LinearRow] = {
    "linear_qkv": LinearRow("self_attention.linear_qkv", "column", lambda s: s.hidden_size, _qkv_rows),
    "linear_proj": LinearRow("self_attention.linear_proj", "row", _query, lambda s: {"o": s.hidden_size}),
    "linear_fc1": LinearRow(
        "mlp.linear_fc1",
        "column",
        lambda s: s.hidden_size,
        lambda s: _gate_up(s.ffn_hidden_size, s.gated),
        in_sparse=False,
    ),
    "linear_fc2": LinearRow(
        "mlp.linear_fc2", "row", lambda s: s.ffn_hidden_size, lambda s: {"down": s.hidden_size}, in_sparse=False
    ),
    "experts.linear_fc1": LinearRow(
        "mlp.experts.linear_fc1",
        "column",
        lambda s: s.hidden_size,
        lambda s: _gate_up(s.moe_ffn_hidden_size, s.gated),
        in_dense=False,
    ),
    "experts.linear_fc2": LinearRow(
        "mlp.experts.linear_fc2",
        "row",
        lambda s: s.moe_ffn_hidden_size,
        lambda s: {"down": s.hidden_size},
        in_dense=False,
    ),
}


PATHS = {kind: row.path for kind, row in LINEARS.items()}
ATTENTION = ("linear_qkv", "linear_proj")
BIASES = tuple(f"{LAYER}{PATHS[kind]}.bias" for kind in ATTENTION)


def _hidden(sizes: ModelSizes) -> tuple[int, ...]:
    return (sizes.hidden_size,)


def _head(sizes: ModelSizes) -> tuple[int, ...]:
    return (sizes.head_dim,)


# What else stands in a layer, in the forward's order: path -> (shape, in dense layers, in layers with experts).
OTHERS: dict[str, tuple[Callable[[ModelSizes], tuple[int, ...]], bool, bool]] = {
    "self_attention.linear_qkv.layer_norm_weight": (_hidden, True, True),
    "self_attention.q_layernorm.weight": (_head, True, True),
    "self_attention.k_layernorm.weight": (_head, True, True),
    "self_attention.linear_proj.post_layernorm.weight": (_hidden, True, True),
    "mlp.linear_fc1.layer_norm_weight": (_hidden, True, False),
    "mlp.linear_fc2.post_layernorm.weight": (_hidden, True, False),
    "pre_mlp_layernorm.weight": (_hidden, False, True),
    "mlp.router.weight": (lambda s: (s.num_experts, s.hidden_size), False, True),
}
WHOLE = (EMBEDDING, OUTPUT_LAYER, "decoder.final_layernorm.weight")
# The same tensors under the names that other layer specifications give them.
ALIASES = (
    "input_layernorm.weight",
    "mlp.experts.local_experts.*.linear_fc1.weight",
    "mlp.experts.local_experts.*.linear_fc2.weight",
)


def has_place(name: str) -> bool:
    """Whether a parameter of a registry is described here. Multi-token prediction (mtp.) is not built."""
    path = name.removeprefix(LAYER)
    linear = path.removesuffix("*").removesuffix(".weight").removesuffix(".bias")
    known = linear in {row.path for row in LINEARS.values()}
    return name in WHOLE or path in OTHERS or path in ALIASES or known or name.startswith("mtp.")
