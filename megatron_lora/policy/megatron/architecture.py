"""A Hugging Face config on Megatron-Core's: every field that `conversion.config_gate` lets through, carried over.

megatron-bridge chooses the provider of a family; what differs between models of a family is set here, from
transformers' own config and rotary frequencies.
"""

import copy
import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from megatron.core.extensions import transformer_engine
from megatron.core.fusions.fused_bias_geglu import quick_gelu
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.identity_op import IdentityFuncOp, IdentityOp
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.moe.experts import GroupedMLPSubmodules, TEGroupedMLP
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from megatron_lora.conversion.hf_model import HFModel, activation
from megatron_lora.lora.expert_linear import ExpertColumnLinear, ExpertRowLinear
from megatron_lora.lora.mlp import AdaptedMLP
from megatron_lora.lora.model_spec import ModelSpec
from megatron_lora.lora.model_tables import PACKED_EXPERTS, SOFTMAX_AND_BIAS, WHOLE_QK_NORM
from megatron_lora.policy.megatron.attention import (
    LatentAttention,
    LayeredRopeAttention,
    set_softmax_scale,
    whole_heads_norm,
)
from megatron_lora.policy.megatron.linear_attention import DeltaAttention
from megatron_lora.policy.megatron.mamba import MambaAttention
from megatron_lora.policy.megatron.recurrent_mixer import is_attention, mixer_spec
from megatron_lora.policy.megatron.router import Router, SoftmaxAndBiasRouter
from megatron_lora.runtime.native_layers import NativeAttention

GEMMA = "gemma3_text"
_ACTIVATIONS = {"silu": F.silu, "swish": F.silu}


def plain_config(model: HFModel) -> Any:
    """The config as megatron-bridge is shown it: with the family's class, and without what it carries over wrongly or
    twice (`apply_config` sets it)."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    config = copy.deepcopy(model.config)
    causal_lm: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    config.architectures = [causal_lm.__name__]
    if model.family == "hy_v3":
        # Its bridge asks for a field of files that transformers' class turns into another (mlp_layer_types).
        config.first_k_dense_replace = 0
    default = {"rope_type": "default", "rope_theta": 10000.0}
    layered = model.family == GEMMA
    kinds = ("full_attention", "sliding_attention")
    config.rope_parameters = {kind: dict(default) for kind in kinds} if layered else default
    if layered:
        config.hidden_activation = "gelu_pytorch_tanh"
        config.sliding_window = 1
    else:
        config.hidden_act = "silu"
        # The bridges of these count with it.
        config.sliding_window = 1 if model.family in ("gemma2", "gpt_oss", "exaone_moe") else None
    return config


def apply_config(provider: Any, model: HFModel) -> None:
    """Set a provider's fields (Megatron-Core's `TransformerConfig`)."""
    shapes = model.shapes
    provider.num_layers = shapes.num_layers
    provider.hidden_size = shapes.hidden_size
    provider.ffn_hidden_size = shapes.ffn_hidden_size
    provider.num_attention_heads = shapes.num_attention_heads
    provider.num_query_groups = shapes.num_query_groups
    provider.kv_channels = shapes.head_dim
    provider.vocab_size = shapes.vocab_size
    provider.share_embeddings_and_output_weights = shapes.tied_embeddings
    provider.layernorm_epsilon = model.norm_eps
    provider.gated_linear_unit = shapes.gated
    provider.activation_func = _activation(model)
    normed = any(other.name.endswith("q_layernorm.weight") for other in shapes.others)
    provider.qk_layernorm = normed or shapes.is_latent
    provider.add_qkv_bias = not shapes.is_latent and shapes.linear("linear_qkv").bias
    # Of all linears with the router's and the experts'; those of single linears: `_change_layer`.
    packed = model.family in PACKED_EXPERTS
    provider.add_bias_linear = packed
    provider.softmax_type = "learnable" if packed else "vanilla"
    provider.position_embedding_type = "rope" if model.rotary else "none"
    provider.rotary_percent = model.rotary_percent if model.rotary else 1.0
    provider.seq_len_interpolation_factor = None
    provider.rope_scaling = False
    # yarn's factor on cosine and sine is in the scale of the scores (`_apply_attention`).
    provider.yarn_rotary_scaling_factor = 1.0
    # The layers that predict further tokens stay in the files.
    provider.mtp_num_layers = None
    if shapes.num_experts:
        _apply_experts(provider, model)
    _apply_attention(provider, model)
    if shapes.linear_layers or shapes.mixers:
        provider.attention_output_gate = shapes.gated_attention
        provider.experimental_attention_variant = provider.linear_attention_freq = None
    if shapes.linear_layers or shapes.mixers or model.family == "exaone_moe":
        # bridge's own are other layers, or none of a virtual stage.
        provider.transformer_layer_spec = _layers_of_stage
    _change_layers(provider, model)
    if shapes.linear_layers or shapes.mixers:
        _put_mixers(provider, shapes)


def _apply_experts(provider: Any, model: HFModel) -> None:
    shapes = model.shapes
    provider.num_moe_experts = shapes.num_experts
    provider.moe_router_topk = shapes.num_experts_per_token
    provider.moe_ffn_hidden_size = shapes.moe_ffn_hidden_size
    dense = shapes.dense_layers
    provider.moe_layer_freq = [int(layer not in dense) for layer in range(shapes.num_layers)] if dense else 1
    if shapes.mixers:
        provider.moe_layer_freq = [int(mixer == "moe") for mixer in shapes.mixers]
    provider.moe_shared_expert_intermediate_size = shapes.shared_ffn_hidden_size or None
    provider.moe_shared_expert_gate = shapes.shared_gate
    _apply_routing(provider, model)
    provider.moe_aux_loss_coeff, provider.moe_z_loss_coeff = model.balancing_coefficient, None


def _apply_routing(provider: Any, model: HFModel) -> None:
    routing = model.routing
    # Its check wants a sigmoid where there is a bias; `SoftmaxAndBiasRouter` goes by its own.
    provider.moe_router_score_function = "sigmoid" if routing.biased else routing.score
    # The softmax over all experts and then the best of them, or over the best alone, which makes their sum 1.
    provider.moe_router_pre_softmax = not routing.normalized
    provider.moe_router_enable_expert_bias = routing.biased
    provider.moe_router_bias_update_rate = 0.0
    provider.moe_router_topk_scaling_factor = routing.scale if routing.scale != 1.0 else None
    # All groups chosen is no choice.
    grouped = routing.groups > routing.chosen_groups
    provider.moe_router_num_groups = routing.groups if grouped else None
    provider.moe_router_group_topk = routing.chosen_groups if grouped else None


def _activation(model: HFModel) -> Callable[[torch.Tensor], torch.Tensor]:
    if model.family in PACKED_EXPERTS:
        # Whatever hidden_act says; bridge sets the limit and the offset of the product.
        return quick_gelu
    name = model.activation_name
    if name == "gelu_pytorch_tanh":
        return gelu_tanh
    return _ACTIVATIONS.get(name) or activation(name)


def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    """GELU with the tanh approximation (Hendrycks and Gimpel 2016), Gemma's activation."""
    return F.gelu(x, approximate="tanh")


def _apply_attention(provider: Any, model: HFModel) -> None:
    windows = model.windows
    size = next((window for window in windows if window is not None), None)
    provider.window_size = None if size is None else (size - 1, 0)
    provider.window_attn_skip_freq = None if size is None else [int(window is not None) for window in windows]
    provider.no_rope_freq = [int(without) for without in model.unrotated] if any(model.unrotated) else None
    if model.shapes.is_latent:
        _apply_latent(provider, model)
    else:
        # Cosine and sine of queries and of keys are multiplied by the factor (yarn), so scores by its square.
        factor = next((factor for _, factor in model.rotary.values()), 1.0)
        provider.softmax_scale = model.softmax_scale * factor**2
    # Of the head's logits: `frozen_head.cap_logits`.
    provider.final_logit_softcapping = None
    provider.attn_logit_softcapping = model.attention_softcap


def usual_provider(model: HFModel) -> Any:
    """The provider of a model that bridge builds as another than Megatron-Core's GPTModel."""
    from megatron.bridge.models.gpt_provider import GPTModelProvider  # after `import_bridge`

    shapes = model.shapes
    return GPTModelProvider(
        num_layers=shapes.num_layers,
        hidden_size=shapes.hidden_size,
        num_attention_heads=shapes.num_attention_heads,
        normalization="RMSNorm",
    )


def _layers_of_stage(config: Any, vp_stage: int | None = None) -> Any:
    return get_gpt_decoder_block_spec(config, use_transformer_engine=True, vp_stage=vp_stage)


def _put_mixers(provider: Any, shapes: ModelSpec) -> None:
    """Put our mixers into the layers that have them in the place of attention, and leave of a hybrid's layers what each
    is."""
    make_spec = provider.transformer_layer_spec

    def changed(config: Any, vp_stage: int | None = None) -> Any:
        spec = make_spec(config, vp_stage=vp_stage)
        first = get_transformer_layer_offset(config, vp_stage=vp_stage)
        for index, layer in enumerate(spec.layer_specs):
            within: Any = copy.copy(layer.submodules)
            if first + index in shapes.linear_layers:
                mixer = MambaAttention if shapes.mixers else DeltaAttention
                within.self_attention = mixer_spec(mixer, within.self_attention, shapes)
            if shapes.mixers:
                _leave_one(within, shapes.mixers[first + index])
            spec.layer_specs[index] = ModuleSpec(layer.module, layer.params, within)
        return spec

    provider.transformer_layer_spec = changed


def _leave_one(within: Any, mixer: str) -> None:
    """Of a layer's attention (or what stands there) and MLP, the one that a hybrid's layer is."""
    if mixer in ("mlp", "moe"):
        within.input_layernorm, within.self_attention, within.self_attn_bda = IdentityOp, IdentityOp, IdentityFuncOp
    else:
        within.pre_mlp_layernorm, within.mlp, within.mlp_bda = IdentityOp, IdentityOp, IdentityFuncOp


def _apply_latent(provider: Any, model: HFModel) -> None:
    shapes = model.shapes
    provider.multi_latent_attention = True
    provider.q_lora_rank, provider.kv_lora_rank = shapes.q_rank or None, shapes.kv_rank
    provider.qk_head_dim, provider.qk_pos_emb_head_dim = shapes.head_dim - shapes.rope_head_dim, shapes.rope_head_dim
    provider.v_head_dim = provider.kv_channels = shapes.value_head_dim
    # Of the two kinds the one whose module may give a factor beside the embeddings.
    provider.rope_type = "yarn"
    provider.mla_down_proj_fusion = provider.cache_mla_latents = False
    set_softmax_scale(provider, model.softmax_scale)


def _change_layers(provider: Any, model: HFModel) -> None:
    """Let the provider's layer spec have the biases that the config asks for, Gemma's attention follow `layer_types`,
    and experts be linears of all of them together."""
    for_each_layer(provider, lambda layer: _change_layer(layer, model))


def _change_layer(layer: Any, model: HFModel) -> None:
    attention = layer.submodules.self_attention
    mlp = layer.submodules.mlp
    # bridge's own specifications (Gemma 3's) are older than Megatron-Core's.
    within: Any = mlp.submodules if isinstance(mlp, ModuleSpec) else mlp.keywords["submodules"]
    if hasattr(within, "experts"):
        # Frozen, so without the `backward_dw` of Megatron-Core's own.
        column, row = cast(Any, ExpertColumnLinear), cast(Any, ExpertRowLinear)
        within.experts = partial(TEGroupedMLP, submodules=GroupedMLPSubmodules(linear_fc1=column, linear_fc2=row))
        within.router = SoftmaxAndBiasRouter if model.family == SOFTMAX_AND_BIAS else Router
    elif MLP in (getattr(mlp, "module", None), getattr(getattr(mlp, "func", None), "__self__", None)):
        layer.submodules.mlp = partial(AdaptedMLP.as_mlp_submodule, submodules=within)
    if model.family == GEMMA:
        attention.module = LayeredRopeAttention
    if model.family in (GEMMA, "exaone4"):
        attention.submodules.core_attention = transformer_engine.TEDotProductAttention
    if model.family == "exaone4":
        # bridge's specification leaves them out.
        attention.submodules.q_layernorm = attention.submodules.k_layernorm = transformer_engine.TENorm
    if model.shapes.is_latent:
        attention.module = LatentAttention
        return
    if model.family in WHOLE_QK_NORM:
        attention.module = SelfAttention
        attention.submodules.q_layernorm = whole_heads_norm(model.shapes.num_attention_heads)
        attention.submodules.k_layernorm = whole_heads_norm(model.shapes.num_query_groups)
    if model.attention_softcap is not None:
        # Transformer Engine's attention caps no scores.
        attention.submodules.core_attention = NativeAttention
    if model.shapes.linear("linear_proj").bias:
        # Added within the linear: Gemma's norm behind it sees the sum.
        attention.submodules.linear_proj = _with_bias(attention.submodules.linear_proj, skip_bias_add=False)
    if model.shapes.mlp_bias:
        within.linear_fc1, within.linear_fc2 = _with_bias(within.linear_fc1), _with_bias(within.linear_fc2)


def for_each_layer(provider: Any, change: Callable[[Any], None]) -> None:
    """Change the specification of each layer that the provider's builds, one for all or a list of them."""
    make_spec = provider.transformer_layer_spec
    staged = "vp_stage" in inspect.signature(make_spec).parameters

    def changed(config: Any, vp_stage: int | None = None) -> Any:
        spec = make_spec(config, vp_stage=vp_stage) if staged else make_spec(config)
        layers = getattr(spec, "layer_specs", [spec])
        # A specification stands for many layers.
        for layer in {id(layer): layer for layer in layers}.values():
            change(layer)
        return spec

    provider.transformer_layer_spec = changed


def replace_core_attention(provider: Any, replacement: Callable[[type], type]) -> None:
    """Another core attention in place of the layer specification's."""

    def change(layer: Any) -> None:
        attention = layer.submodules.self_attention
        if is_attention(attention):
            attention.submodules.core_attention = replacement(attention.submodules.core_attention)

    for_each_layer(provider, change)


def _with_bias(build: Callable[..., Any], **also: Any) -> Callable[..., Any]:
    """A linear that has a bias whatever `add_bias_linear` says: that switch is one for attention and MLP."""

    def built(*args: Any, **kwargs: Any) -> Any:
        return build(*args, **{**kwargs, "bias": True, **also})

    return built


def set_numbers(chunks: Sequence[GPTModel], model: HFModel) -> None:
    """Put what transformers computes and no field of Megatron-Core's takes into a built model: rotary frequencies of
    whatever kind, and the small numbers of latent attention."""
    for chunk in chunks:
        if model.shapes.is_latent:
            for layer in chunk.decoder.layers:
                _set_latent_numbers(layer.self_attention, model)
            continue
        rotary: Any = getattr(chunk, "rotary_pos_emb", None)
        places = {"": rotary, "full_attention": rotary, "sliding_attention": getattr(rotary, "rope_local", None)}
        for kind, (frequencies, _) in model.rotary.items():
            _set_frequencies(places[kind], frequencies)


def _set_latent_numbers(attention: Any, model: HFModel) -> None:
    [(frequencies, factor)] = model.rotary.values()
    _set_frequencies(attention.rotary_pos_emb, frequencies)
    attention.rotary_pos_emb.factor = factor
    theirs = model.empty.model.layers[0].self_attn
    attention.linear_kv_up_proj.eps = theirs.kv_a_layernorm.variance_epsilon
    if model.shapes.q_rank:
        attention.linear_q_up_proj.eps = theirs.q_a_layernorm.variance_epsilon


def _set_frequencies(rotary: Any, frequencies: torch.Tensor) -> None:
    assert rotary.inv_freq.shape == frequencies.shape
    rotary.inv_freq = frequencies.to(rotary.inv_freq)
