"""A Hugging Face config on Megatron-Core's: every field that `conversion.config_gate` lets through, carried over.

megatron-bridge chooses the provider of a family; what differs between models of a family is set here, from
transformers' own config and rotary frequencies.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.extensions import transformer_engine
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.utils import is_layer_window_attention

from megatron_lora.conversion.hf_model import HFModel, activation
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
    default = {"rope_type": "default", "rope_theta": 10000.0}
    layered = model.family == GEMMA
    kinds = ("full_attention", "sliding_attention")
    config.rope_parameters = {kind: dict(default) for kind in kinds} if layered else default
    if layered:
        config.hidden_activation = "gelu_pytorch_tanh"
        config.sliding_window = 1
    else:
        config.hidden_act = "silu"
        # Gemma 2's bridge counts with it.
        config.sliding_window = 1 if model.family == "gemma2" else None
    return config


def apply_config(provider: Any, model: HFModel) -> None:
    """Set a provider's fields (Megatron-Core's `TransformerConfig`)."""
    config, shapes = model.config, model.shapes
    provider.num_layers = shapes.num_layers
    provider.hidden_size = shapes.hidden_size
    provider.ffn_hidden_size = shapes.ffn_hidden_size
    provider.num_attention_heads = shapes.num_attention_heads
    provider.num_query_groups = shapes.num_query_groups
    provider.kv_channels = shapes.head_dim
    provider.vocab_size = shapes.vocab_size
    provider.share_embeddings_and_output_weights = shapes.tied_embeddings
    provider.layernorm_epsilon = config.rms_norm_eps
    provider.gated_linear_unit = True
    provider.activation_func = _activation(model.activation_name)
    provider.qk_layernorm = any(other.name.endswith("q_layernorm.weight") for other in shapes.others)
    provider.add_qkv_bias = shapes.linear("linear_qkv").bias
    # Those of the other linears: `_change_layers`.
    provider.add_bias_linear = False
    provider.position_embedding_type = "rope"
    provider.rotary_percent = 1.0
    provider.seq_len_interpolation_factor = None
    provider.rope_scaling = False
    if shapes.num_experts:
        _apply_experts(provider, model)
    _apply_attention(provider, model)
    _change_layers(provider, model)


def _apply_experts(provider: Any, model: HFModel) -> None:
    shapes = model.shapes
    provider.num_moe_experts = shapes.num_experts
    provider.moe_router_topk = shapes.num_experts_per_token
    provider.moe_ffn_hidden_size = shapes.moe_ffn_hidden_size
    provider.moe_layer_freq = 1
    # The softmax over all experts and then the best of them, or over the best alone, which makes their sum 1.
    provider.moe_router_pre_softmax = not model.config.norm_topk_prob
    provider.moe_router_dtype = "fp32"
    # The loss is the objective's alone.
    provider.moe_router_load_balancing_type = "none"
    provider.moe_aux_loss_coeff, provider.moe_z_loss_coeff = 0.0, None


def _activation(name: str) -> Callable[[torch.Tensor], torch.Tensor]:
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
    # Cosine and sine of queries and of keys are multiplied by the factor (yarn), so scores by its square.
    factor = next(factor for _, factor in model.rotary.values())
    provider.softmax_scale = model.softmax_scale * factor**2
    # Of the head's logits: `frozen_head.cap_logits`.
    provider.final_logit_softcapping = None
    provider.attn_logit_softcapping = model.attention_softcap


def _change_layers(provider: Any, model: HFModel) -> None:
    """Let the provider's layer spec have the biases that the config asks for, and Gemma's attention follow
    `layer_types`."""
    make_spec = provider.transformer_layer_spec

    def changed(config: Any) -> Any:
        spec = make_spec(config)
        attention = spec.submodules.self_attention
        if model.family == GEMMA:
            attention.module = LayeredRopeAttention
            attention.submodules.core_attention = transformer_engine.TEDotProductAttention
        if model.attention_softcap is not None:
            # Transformer Engine's attention caps no scores.
            attention.submodules.core_attention = NativeAttention
        if model.shapes.linear("linear_proj").bias:
            # Added within the linear: Gemma's norm behind it sees the sum.
            attention.submodules.linear_proj = _with_bias(attention.submodules.linear_proj, skip_bias_add=False)
        if model.shapes.mlp_bias:
            mlp = spec.submodules.mlp.keywords["submodules"]
            mlp.linear_fc1, mlp.linear_fc2 = _with_bias(mlp.linear_fc1), _with_bias(mlp.linear_fc2)
        return spec

    provider.transformer_layer_spec = changed


def replace_core_attention(provider: Any, replacement: Callable[[type], type]) -> None:
    """Another core attention in place of the layer specification's."""
    make_spec = provider.transformer_layer_spec

    def changed(config: Any) -> Any:
        spec = make_spec(config)
        attention = spec.submodules.self_attention.submodules
        attention.core_attention = replacement(attention.core_attention)
        return spec

    provider.transformer_layer_spec = changed


def _with_bias(build: Callable[..., Any], **also: Any) -> Callable[..., Any]:
    """A linear that has a bias whatever `add_bias_linear` says: that switch is one for attention and MLP."""

    def built(*args: Any, **kwargs: Any) -> Any:
        return build(*args, **{**kwargs, "bias": True, **also})

    return built


class LayeredRopeAttention(SelfAttention):
    """Gemma 3's: layers with a window have rotary embeddings of their own."""

    def forward(self, *args: Any, rotary_pos_emb: torch.Tensor, **kwargs: Any) -> Any:  # type: ignore[override]
        """rotary_pos_emb [2, ...]: of layers with a window, and of the others."""
        config = self.config
        local = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, self.layer_number)  # type: ignore[arg-type]
        return super().forward(*args, rotary_pos_emb=rotary_pos_emb[0 if local else 1], **kwargs)


def set_rotary_frequencies(chunks: Sequence[GPTModel], model: HFModel) -> None:
    """Put transformers' own rotary frequencies into a built model, whatever their kind."""
    for chunk in chunks:
        rotary: Any = chunk.rotary_pos_emb
        places = {"": rotary, "full_attention": rotary, "sliding_attention": getattr(rotary, "rope_local", None)}
        for kind, (frequencies, _) in model.rotary.items():
            buffer = places[kind].inv_freq
            assert buffer.shape == frequencies.shape
            places[kind].inv_freq = frequencies.to(buffer)
