"""Mamba-2 (Dao and Gu 2024, arXiv 2405.21060): the mixer of Nemotron-H.

Megatron-Core's own module cannot be built without the packages mamba-ssm and causal-conv1d, which are for GPUs alone.
This one is plain PyTorch.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_lora.lora.model_spec import ModelSizes
from megatron_lora.policy.megatron.recurrent_mixer import RecurrentMixer, Weight
from megatron_lora.policy.state_space import scan


class MambaAttention(RecurrentMixer):
    """The mixer of one layer. in_proj's rows lie group by group: gates of the output (z), x, B, C, and a step size for
    each of the group's heads."""

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
            rows=mixed + value + sizes.linear_value_heads,
            inner=value,
            channels=mixed,
            conv_bias=True,
        )
        self.state, self.features = sizes.linear_key_dim, sizes.linear_value_dim
        self.D = self.of_heads()
        self.out_norm = Weight(self.groups * self.heads * self.features, **self.of)

    def mix(self, mixed: Tensor, places: Tensor, back: Tensor) -> Tensor:
        values = self.heads * self.features
        gate, x, b, c, step = mixed.split([values, values, self.state, self.state, self.heads], -1)
        xbc = self.convolved(torch.cat([part.flatten(1) for part in (x, b, c)], -1)[places]).float()
        states = self.groups * self.state
        x, b, c = xbc.split([xbc.shape[-1] - 2 * states, states, states], -1)
        x = x.unflatten(-1, (self.groups, self.heads, self.features))
        b, c = (part.unflatten(-1, (self.groups, self.state)) for part in (b, c))
        steps = F.softplus(step.flatten(1).float() + self.dt_bias)[places].unflatten(-1, (self.groups, self.heads))
        decay = -self.A_log.exp().view(self.groups, self.heads)
        out = scan(x * steps[..., None], steps * decay, b, c) + self.D.view(self.groups, self.heads, 1) * x
        return self._normed(out.flatten(0, 1)[back].flatten(2), gate).to(mixed.dtype)

    def _normed(self, x: Tensor, gate: Tensor) -> Tensor:
        """RMSNorm of each group's features after the gate's SiLU. x fp32, gate [tokens, groups, features]."""
        gated = x * F.silu(gate.float())
        normed = F.rms_norm(gated, gated.shape[-1:], eps=self.config.layernorm_epsilon).to(gate.dtype)
        return self.out_norm.weight.view(self.groups, -1) * normed
