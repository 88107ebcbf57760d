"""A model's description, made from its config.json or from what an adapter's file says of it.

Names are megatron-bridge's (`lora/families.py`), sizes config.json's, and `lora/model_tables.py` says how each tensor's
follow from them. Pure: no torch.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from megatron_lora.errors import UserError
from megatron_lora.lora.families import families, known_families, linear_names, mapping, unknown_reason
from megatron_lora.lora.model_spec import (
    EMBEDDING,
    LAYER,
    OUTPUT_LAYER,
    ROUTER,
    HFPart,
    LinearSpec,
    ModelSizes,
    ModelSpec,
    ParameterSpec,
)
from megatron_lora.lora.model_tables import (
    ATTENTION,
    BIASES,
    FINAL_NORM,
    GATED_ATTENTION,
    HYBRIDS,
    LINEARS,
    OTHERS,
    PACKED_EXPERTS,
    PATHS,
    WHOLE_QK_NORM,
    LinearRow,
    OtherRow,
)

# How many experts every token goes to, as configs name it.
_SHARED_EXPERTS = ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts")
_ROUTERS_WEIGHT = f"{PATHS[ROUTER]}.weight"


def describe(sizes: ModelSizes) -> ModelSpec:
    """The description of a model of these sizes, with its family's names."""
    return ModelSpec(**sizes.sizes, linears=_build_linears(sizes), others=_build_others(sizes))


def describe_json(content: Mapping[str, Any]) -> ModelSpec:
    """What `dataclasses.asdict` made, also of releases that wrote sizes alone. Raises KeyError or TypeError."""
    values = dict(content)
    linears, others = values.pop("linears", None), values.pop("others", None)
    if linears is None and BIASES[0] in mapping(values["model_type"]):
        # They left out the biases that every model of the family has (Qwen2).
        values["attention_bias"] = True
    for name in ("dense_layers", "linear_layers", "mixers"):
        values[name] = tuple(values.get(name, ()))
    built = describe(ModelSizes(**values))
    return replace(
        built,
        linears=_with_router(tuple(map(_linear_from_json, linears)), built) if linears else built.linears,
        others=tuple(other for other in map(_parameter_from_json, others) if not other.name.endswith(_ROUTERS_WEIGHT))
        if others
        else built.others,
    )


def _with_router(linears: tuple[LinearSpec, ...], built: ModelSpec) -> tuple[LinearSpec, ...]:
    """A file of a release in which a router carried no adapter has it among the other tensors."""
    if ROUTER not in built.kinds or any(linear.kind == ROUTER for linear in linears):
        return linears
    return (*linears[:-1], built.linear(ROUTER), linears[-1])


def describe_config(config: Mapping[str, Any], tower: str = "") -> ModelSpec:
    """The description of the model of an HF `config.json` (its content as a mapping, defaults filled in). tower: see
    `ModelSizes`.

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
        spec = describe(ModelSizes(**_sizes_of(str(family), config), tower=tower))
    except KeyError as error:
        raise UserError(f"the base model's config.json has no {error.args[0]!r}; is the file complete?") from error
    if spec.dense_layers and "linear_fc1" not in spec.kinds:
        raise UserError(
            f"layers {', '.join(map(str, spec.dense_layers))} of the model have no experts (mlp_only_layers, "
            f"decoder_sparse_step), and megatron-bridge maps none such for {family}; use a model with experts in "
            "every layer"
        )
    return spec


def _family_of(sizes: ModelSizes) -> str:
    # A description that an older release wrote has the form of Llama's.
    return sizes.model_type if sizes.model_type in families() else "llama"


def _layers(sizes: ModelSizes, path: str, row: LinearRow | OtherRow) -> tuple[int, ...] | None:
    """The layers that a row of the tables is in, of which `path` is in a layer; None for all."""
    if sizes.mixers:
        if path.startswith("self_attention."):
            kind = "attention" if row.in_softmax else "mamba"
        else:
            kind = "mlp" if row.in_dense else "moe"
        return tuple(n for n, mixer in enumerate(sizes.mixers) if mixer == kind)
    everyone = range(sizes.num_layers)
    dense, linear = sizes.dense_layers if sizes.num_experts else everyone, sizes.linear_layers
    layers = tuple(
        n
        for n in everyone
        if (row.in_dense if n in dense else row.in_sparse) and (row.in_linear if n in linear else row.in_softmax)
    )
    return None if len(layers) == sizes.num_layers else layers


def _build_linears(sizes: ModelSizes) -> tuple[LinearSpec, ...]:
    names = linear_names(_family_of(sizes))
    result = []
    for kind, row in LINEARS.items():
        layers = _layers(sizes, row.path, row)
        name = LAYER + row.path
        if name not in names or layers == ():
            continue
        hf, order = names[name], row.order(sizes)
        # Families have different HF linears in one.
        rows = {key: size for key, size in row.rows(sizes).items() if isinstance(hf, str) or key in hf}
        if 0 in (row.in_features(sizes), *rows.values()):
            continue
        parts = tuple(
            HFPart(key, sizes.hf_place(hf if isinstance(hf, str) else hf[key]), size, **order.get(key, {}))
            for key, size in rows.items()
        )
        result.append(
            LinearSpec(
                kind,
                name,
                parts,
                row.in_features(sizes),
                row.parallel,
                query_groups=row.groups(sizes),
                layers=layers,
                experts=sizes.num_experts if row.expert else 0,
                bias=_has_bias(sizes, kind),
            )
        )
    head = (HFPart("lm_head", "lm_head", sizes.vocab_size),)
    return (*result, LinearSpec("output_layer", "output_layer", head, sizes.hidden_size, "column"))


def _has_bias(sizes: ModelSizes, kind: str) -> bool:
    if kind in ("linear_fc1", "linear_fc2"):
        return sizes.mlp_bias
    if kind.startswith("experts."):
        return sizes.model_type in PACKED_EXPERTS
    mapped = [name for name in BIASES if name in mapping(_family_of(sizes))]
    # Where bridge maps no bias, the switch of transformers' class is for all four linears of attention.
    return sizes.attention_bias and kind in ATTENTION and (not mapped or f"{LAYER}{LINEARS[kind].path}.bias" in mapped)


def _build_others(sizes: ModelSizes) -> tuple[ParameterSpec, ...]:
    mapped = mapping(_family_of(sizes))
    result = [ParameterSpec(EMBEDDING, sizes.hf_place(mapped[EMBEDDING]), (sizes.vocab_size, sizes.hidden_size))]
    for path, row in OTHERS.items():
        layers, shape = _layers(sizes, path, row), row.shape(sizes)
        if LAYER + path in mapped and layers != () and 0 not in shape:
            hf = sizes.hf_place(mapped[LAYER + path])
            axis = _tp_axis(sizes, path)
            result.append(ParameterSpec(LAYER + path, hf, shape, layers, axis, row.blocks(sizes)))
    norms = [name for name in FINAL_NORM if name in mapped]
    return (*result, *(ParameterSpec(name, sizes.hf_place(mapped[name]), (sizes.hidden_size,)) for name in norms))


def _tp_axis(sizes: ModelSizes, path: str) -> int | None:
    # Each rank norms its own heads, with the sum over all of them.
    whole = sizes.model_type in WHOLE_QK_NORM and path.endswith(("q_layernorm.weight", "k_layernorm.weight"))
    # Mamba's is of all heads, with a sum over those of a group.
    return 0 if whole or (sizes.mixers and path.endswith("out_norm.weight")) else OTHERS[path].tp_axis


def _sizes_of(family: str, config: Mapping[str, Any]) -> dict[str, Any]:
    heads = int(config["num_attention_heads"])
    hidden = int(config["hidden_size"])
    names = linear_names(family)
    # Where bridge maps no head of its own (Gemma), the family's is tied by default, and config.json may not say so.
    tied = config.get("tie_word_embeddings")
    layers = len(config["layers_block_type"]) if family in HYBRIDS else int(config["num_hidden_layers"])
    sizes = {
        "model_type": family,
        "hidden_size": hidden,
        "ffn_hidden_size": _mlp_width(config),
        "num_layers": layers,
        "num_attention_heads": heads,
        "num_query_groups": int(config.get("num_key_value_heads") or heads),
        "head_dim": int(config.get("head_dim") or hidden // heads),
        "vocab_size": int(config["vocab_size"]),
        "tied_embeddings": OUTPUT_LAYER not in mapping(family) if tied is None else bool(tied),
        "gated": family in PACKED_EXPERTS
        or any(isinstance(names.get(LAYER + PATHS[kind]), dict) for kind in ("linear_fc1", "experts.linear_fc1")),
        "attention_bias": bool(config.get("attention_bias", BIASES[0] in mapping(family))),
        "mlp_bias": bool(config.get("mlp_bias")),
        "qk_norm": bool(config.get("use_qk_norm", True)),
    }
    if family in HYBRIDS:
        return sizes | _hybrid_sizes(config, layers)
    if LAYER + PATHS["experts.linear_fc1"] in names:
        sizes |= _expert_sizes(config, layers)
    if LAYER + PATHS["linear_kv_down_proj"] in names:
        sizes |= _latent_sizes(config, heads)
    if family in GATED_ATTENTION:
        sizes |= _linear_sizes(config)
    return sizes


def _mlp_width(config: Mapping[str, Any]) -> int:
    """Of a layer's MLP. Where every layer has experts, a config may not have it (Qwen3.5's mixtures)."""
    only_experts = "intermediate_size" not in config and "moe_intermediate_size" in config
    return int(config["moe_intermediate_size" if only_experts else "intermediate_size"])


def _expert_sizes(config: Mapping[str, Any], num_layers: int) -> dict[str, Any]:
    number = _first(config, "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    width = int(config.get("moe_intermediate_size") or config["intermediate_size"])
    return {
        "num_experts": int(number),
        "num_experts_per_token": int(_first(config, "num_experts_per_tok", "moe_k")),
        "moe_ffn_hidden_size": width,
        "shared_ffn_hidden_size": int(
            config.get("shared_expert_intermediate_size")
            or width * next((int(config[name]) for name in _SHARED_EXPERTS if config.get(name)), 0)
        ),
        "shared_gate": "shared_expert_intermediate_size" in config,
        "dense_layers": _dense_layers(config, num_layers),
    }


def _first(config: Mapping[str, Any], *names: str) -> Any:
    """The value of the first of these names that has one."""
    for name in names:
        if config.get(name):
            return config[name]
    raise KeyError(names[0])


def _dense_layers(config: Mapping[str, Any], num_layers: int) -> tuple[int, ...]:
    """The layers without experts, by the rules of transformers' Qwen3MoeDecoderLayer, DeepseekV3DecoderLayer and
    Ernie4_5_MoeDecoderLayer."""
    step, dense = int(config.get("decoder_sparse_step") or 1), config.get("mlp_only_layers") or []
    if not isinstance(dense, list | tuple):
        raise UserError(f"mlp_only_layers={dense!r} in the base model's config.json: wanted a list of layer numbers")
    kinds = config.get("mlp_layer_types")
    if kinds is not None:
        if not isinstance(kinds, list | tuple) or len(kinds) != num_layers:
            raise UserError(f"mlp_layer_types={kinds!r} in the base model's config.json: wanted one for each layer")
        return tuple(n for n, kind in enumerate(kinds) if kind == "dense")
    if "moe_layer_interval" in config:
        step, last = int(config["moe_layer_interval"] or 1), config.get("moe_layer_end_index", -1)
        dense = range(num_layers if last in (-1, None) else int(last) + 1, num_layers)
    first = int(config.get("first_k_dense_replace") or config.get("moe_layer_start_index") or 0)
    return tuple(n for n in range(num_layers) if n < first or n in dense or (n + 1) % step)


def _latent_sizes(config: Mapping[str, Any], heads: int) -> dict[str, Any]:
    rotated = int(config["qk_rope_head_dim"])
    return {
        "num_query_groups": heads,
        "head_dim": int(config["qk_nope_head_dim"]) + rotated,
        "q_rank": int(config.get("q_lora_rank") or 0),
        "kv_rank": int(config["kv_lora_rank"]),
        "rope_head_dim": rotated,
        "value_head_dim": int(config["v_head_dim"]),
    }


def _linear_sizes(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "gated_attention": True,
        "linear_layers": tuple(n for n, kind in enumerate(config["layer_types"]) if kind == "linear_attention"),
        "linear_key_heads": int(config["linear_num_key_heads"]),
        "linear_value_heads": int(config["linear_num_value_heads"]),
        "linear_key_dim": int(config["linear_key_head_dim"]),
        "linear_value_dim": int(config["linear_value_head_dim"]),
        "linear_kernel": int(config["linear_conv_kernel_dim"]),
    }


def _hybrid_sizes(config: Mapping[str, Any], num_layers: int) -> dict[str, Any]:
    mixers = tuple(str(kind) for kind in config["layers_block_type"])
    sizes = {
        "mixers": mixers,
        "linear_layers": tuple(n for n, kind in enumerate(mixers) if kind == "mamba"),
        "linear_key_heads": int(config["n_groups"]),
        "linear_value_heads": int(config["mamba_num_heads"]),
        "linear_key_dim": int(config["ssm_state_size"]),
        "linear_value_dim": int(config["mamba_head_dim"]),
        "linear_kernel": int(config["conv_kernel"]),
    }
    if "moe" in mixers:
        sizes |= _expert_sizes(config, num_layers) | {
            "shared_ffn_hidden_size": int(config["moe_shared_expert_intermediate_size"]),
            "dense_layers": (),
        }
    return sizes


def _linear_from_json(content: Mapping[str, Any]) -> LinearSpec:
    layers = content["layers"]
    parts = tuple(HFPart(**{**part, "blocks": tuple(part.get("blocks", ()))}) for part in content["parts"])
    return LinearSpec(**{**content, "parts": parts, "layers": None if layers is None else tuple(layers)})


def _parameter_from_json(content: Mapping[str, Any]) -> ParameterSpec:
    layers = content["layers"]
    return ParameterSpec(
        **{
            **content,
            "shape": tuple(content["shape"]),
            "layers": None if layers is None else tuple(layers),
            "blocks": tuple(content.get("blocks", ())),
        }
    )
