"""Linear attention: the gated delta net (Yang et al. 2024, arXiv 2412.06464) of Qwen3-Next and Qwen3.5.

Megatron-Core's own module wants kernels that are not there on a CPU and takes no packed rows without them. This one is
plain PyTorch over Megatron-Core's chunked rule.
"""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.ssm.gated_delta_net import torch_chunk_gated_delta_rule
from torch import Tensor

from megatron_lora.lora.model_spec import ModelSizes
from megatron_lora.policy.megatron.recurrent_mixer import RecurrentMixer, Weight

L2_EPS = 1e-6  # transformers' `l2norm`


class DeltaAttention(RecurrentMixer):
    """The mixer of one layer. in_proj's rows lie key head by key head: query, key, values, gates of the output, and of
    each of its value heads a strength and a decay."""

    def __init__(
        self, config: Any, submodules: Any, layer_number: int, sizes: ModelSizes, pg_collection: Any, **_: Any
    ):
        value = sizes.linear_value_heads * sizes.linear_value_dim
        mixed = 2 * sizes.linear_key_heads * sizes.linear_key_dim + value
        super().__init__(
            config,
            submodules,
            layer_number,
            sizes,
            pg_collection.tp,
            rows=mixed + value + 2 * sizes.linear_value_heads,
            inner=value,
            channels=mixed,
            conv_bias=False,
        )
        self.key_dim, self.value_dim = sizes.linear_key_dim, sizes.linear_value_dim
        self.out_norm = Weight(self.value_dim, **self.of)

    def mix(self, mixed: Tensor, places: Tensor, back: Tensor) -> Tensor:
        values = self.heads * self.value_dim
        query, key, value, gate, strength, decay = mixed.split(
            [self.key_dim, self.key_dim, values, values, self.heads, self.heads], -1
        )
        qkv = torch.cat([part.flatten(1) for part in (query, key, value)], -1)[places]
        query, key, value = self._queries_keys_values(qkv)
        beta = strength.flatten(1).sigmoid()[places]
        g = -self.A_log.exp() * F.softplus(decay.flatten(1).float() + self.dt_bias)
        rule: Any = torch_chunk_gated_delta_rule
        out, _state = rule(query, key, value, g=g[places], beta=beta)
        return self._normed(out.flatten(0, 1)[back], gate.reshape(len(mixed), -1, self.value_dim))

    def _queries_keys_values(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[rows, longest, channels] -> queries, keys (both of length 1, for each value head) and values
        [rows, longest, value heads, features]."""
        mixed = self.convolved(qkv)
        keys = self.groups * self.key_dim
        query, key, value = mixed.split([keys, keys, mixed.shape[-1] - 2 * keys], -1)
        query, key = (_normalized(part.unflatten(-1, (self.groups, self.key_dim))) for part in (query, key))
        query, key = (part.repeat_interleave(self.heads, 2) for part in (query, key))
        return query, key, value.unflatten(-1, (-1, self.value_dim))

    def _normed(self, x: Tensor, gate: Tensor) -> Tensor:
        """RMSNorm of each head, times the gate's SiLU."""
        normed = F.rms_norm(x.float(), (self.value_dim,), eps=self.config.layernorm_epsilon).to(x.dtype)
        return (self.out_norm.weight * normed * F.silu(gate.float())).to(x.dtype)


def _normalized(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + L2_EPS)
