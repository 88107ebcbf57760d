"""Linear attention: the gated delta net (Yang et al. 2024, arXiv 2412.06464) of Qwen3-Next and Qwen3.5.

Megatron-Core's own module wants kernels that are not there on a CPU and takes no packed rows without them. This one is
plain PyTorch over Megatron-Core's chunked rule.
"""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.ssm.gated_delta_net import torch_chunk_gated_delta_rule
from torch import Tensor

from megatron_lora.policy.megatron.recurrent_mixer import RecurrentMixer, Weight
from megatron_lora.policy.row_grid import RowGrid

L2_EPS = 1e-6  # transformers' `l2norm`
CHUNK = 64


class DeltaAttention(RecurrentMixer):
    """The mixer of one layer. in_proj's rows lie key head by key head: query, key, values, gates of the output, and of
    each of its value heads a strength and a decay."""

    extra, conv_bias = 2, False

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        self.out_norm = Weight(self.value_dim, **self.of, split=False)

    def channels_of(self, mixed: Tensor) -> Tensor:
        return torch.cat([part.flatten(1) for part in self._parts(mixed)[:3]], -1)

    def recur(
        self, mixed: Tensor, convolved: Tensor, grid: RowGrid, state: Tensor | None, keeps: bool, groups: slice
    ) -> tuple[Tensor, Any]:
        query, key, value = self._queries_keys_values(convolved, mixed.shape[1])
        a_log, dt_bias = self.of_groups(self.A_log, groups), self.of_groups(self.dt_bias, groups)
        *_, gate, strength, decay = self._parts(mixed)
        beta = strength.flatten(1).sigmoid()[grid.places]
        g = (-a_log.exp() * F.softplus(decay.flatten(1).float() + dt_bias))[grid.places]
        if keeps:
            # What is beyond a row's end changes its state in nothing.
            outside = ~grid.inside[..., None]
            beta, g = beta.masked_fill(outside, 0.0), g.masked_fill(outside, 0.0)
        rule: Any = torch_chunk_gated_delta_rule
        chunk = min(CHUNK, query.shape[1])
        out, state = rule(
            query, key, value, g=g, beta=beta, chunk_size=chunk, initial_state=state, output_final_state=keeps
        )
        return self._normed(out.flatten(0, 1)[grid.back], gate.reshape(len(mixed), -1, self.value_dim)), state

    def state_shape(self) -> tuple[int, ...]:
        return self.groups * self.heads, self.key_dim, self.value_dim

    def _parts(self, mixed: Tensor) -> tuple[Tensor, ...]:
        """[tokens, groups, rows of a group] -> query, key, values, gates, strengths and decays of each group."""
        values = self.heads * self.value_dim
        return mixed.split([self.key_dim, self.key_dim, values, values, self.heads, self.heads], -1)

    def _queries_keys_values(self, convolved: Tensor, groups: int) -> tuple[Tensor, Tensor, Tensor]:
        """[rows, longest, channels] -> queries, keys (both of length 1, for each value head) and values
        [rows, longest, value heads, features]."""
        keys = groups * self.key_dim
        query, key, value = convolved.split([keys, keys, convolved.shape[-1] - 2 * keys], -1)
        query, key = (_normalized(part.unflatten(-1, (groups, self.key_dim))) for part in (query, key))
        query, key = (part.repeat_interleave(self.heads, 2) for part in (query, key))
        return query, key, value.unflatten(-1, (-1, self.value_dim))

    def _normed(self, x: Tensor, gate: Tensor) -> Tensor:
        """RMSNorm of each head, times the gate's SiLU."""
        normed = F.rms_norm(x.float(), (self.value_dim,), eps=self.config.layernorm_epsilon).to(x.dtype)
        return (self.out_norm.weight * normed * F.silu(gate.float())).to(x.dtype)


def _normalized(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + L2_EPS)
