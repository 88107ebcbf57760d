"""Attention that differs from Megatron-Core's own: norms over all heads together, rotary embeddings by kind of layer,
and latent attention with transformers' numbers."""

import math
from collections.abc import Callable
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.common.embeddings import RotaryEmbedding
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention, make_sharded_tensors_for_checkpoint
from torch import Tensor
from torch.distributed.nn.functional import all_reduce


class LayeredRopeAttention(SelfAttention):
    """Gemma 3's: layers with a window have rotary embeddings of their own."""

    def forward(self, *args: Any, rotary_pos_emb: Tensor, **kwargs: Any) -> Any:  # type: ignore[override]
        """rotary_pos_emb [2, ...]: of layers with a window, and of the others."""
        config = self.config
        local = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, self.layer_number)  # type: ignore[arg-type]
        return super().forward(*args, rotary_pos_emb=rotary_pos_emb[0 if local else 1], **kwargs)


class WholeHeadsNorm(torch.nn.Module):
    """RMSNorm over the features of all heads together (OLMoE), in place of one over each head's.

    num_heads: of the whole model. Each tensor-parallel rank has its heads and their weights; the mean is over all.
    """

    def __init__(self, num_heads: int, hidden_size: int, config: TransformerConfig, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.group: Any = parallel_state.get_tensor_model_parallel_group()
        self.num_features = num_heads * hidden_size
        local = self.num_features // self.group.size()
        self.weight = torch.nn.Parameter(torch.ones(local, dtype=config.params_dtype))

    def forward(self, x: Tensor) -> Tensor:
        """[s, b, heads / tp, head_dim] -> the same."""
        wide = x.flatten(-2).float()
        square = wide.square().sum(-1, keepdim=True)
        if self.group.size() > 1:
            # Each rank's heads depend on the sum, so its gradient is summed as well.
            square = all_reduce(square, group=self.group)
        normed = wide * torch.rsqrt(square / self.num_features + self.eps)
        return (self.weight * normed.to(x.dtype)).view_as(x)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {"weight": 0},
            sharded_offsets,
            tp_group=self.group,
            dp_cp_group=(metadata or {})["dp_cp_group"],
        )


def whole_heads_norm(num_heads: int) -> Callable[..., WholeHeadsNorm]:
    """How a layer specification builds it."""

    def build(hidden_size: int, config: TransformerConfig, eps: float = 1e-5, **_: Any) -> WholeHeadsNorm:
        return WholeHeadsNorm(num_heads, hidden_size, config, eps)

    return build


class LatentAttention(MLASelfAttention):
    """Megatron-Core's latent attention without a norm before queries that are not compressed, and with rotary
    frequencies and a factor on cosine and sine that are given from outside (`set_latent_numbers`)."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any):
        super().__init__(config, *args, **kwargs)
        self.rotary_pos_emb = FactoredRotary(config.qk_pos_emb_head_dim, 1.0, cp_group=self.pg_collection.cp)

    def _resolve_qk_norm_config(self, submodules: Any) -> dict[str, Any]:
        names = ("linear_q_proj", "linear_q_up_proj", "linear_kv_up_proj")
        return {name: getattr(submodules, name) for name in names} | {
            "q_layernorm": IdentityOp,
            "kv_layernorm": IdentityOp,
        }


class FactoredRotary(RotaryEmbedding):
    """Rotary embeddings and the factor that cosine and sine are multiplied by."""

    factor = 1.0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs), self.factor


def set_softmax_scale(config: Any, scale: float) -> None:
    """Let latent attention multiply its scores by `scale`: Megatron-Core's module computes that number itself, as
    (0.1 mscale_all_dim log(rotary_scaling_factor) + 1)^2 / sqrt(head_dim)."""
    root = math.sqrt(scale * math.sqrt(config.qk_head_dim + config.qk_pos_emb_head_dim))
    config.rotary_scaling_factor, config.mscale_all_dim = math.e, 10.0 * (root - 1.0)
