"""Mamba-2 (Dao and Gu 2024, arXiv 2405.21060): the mixer of Nemotron-H.

Megatron-Core's own module cannot be built without the packages mamba-ssm and causal-conv1d, which are for GPUs alone.
This one is plain PyTorch.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_lora.policy.megatron.recurrent_mixer import RecurrentMixer, Weight
from megatron_lora.policy.row_grid import RowGrid
from megatron_lora.policy.state_space import mamba2


class MambaAttention(RecurrentMixer):
    """The mixer of one layer. in_proj's rows lie group by group: gates of the output (z), x, B, C, and a step size for
    each of the group's heads."""

    extra, conv_bias = 1, True

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        self.D = self.of_heads()
        self.out_norm = Weight(self.inner, **self.of)

    def channels_of(self, mixed: Tensor) -> Tensor:
        return torch.cat([part.flatten(1) for part in self._parts(mixed)[1:4]], -1)

    def recur(
        self, mixed: Tensor, convolved: Tensor, grid: RowGrid, state: Tensor | None, keeps: bool, groups: slice
    ) -> tuple[Tensor, Any]:
        gate, *_, step = self._parts(mixed)
        a_log, d, dt_bias = (self.of_groups(numbers, groups) for numbers in (self.A_log, self.D, self.dt_bias))
        steps = F.softplus(step.flatten(1).float() + dt_bias)[grid.places]
        if keeps:
            # What is beyond a row's end changes its state in nothing.
            steps = steps.masked_fill(~grid.inside[..., None], 0.0)
        out, state = mamba2(convolved.float(), steps, a_log, d, groups=mixed.shape[1], state=self.key_dim, start=state)
        weight = self.of_groups(self.out_norm.weight, groups)
        return self._normed(out.flatten(0, 1)[grid.back].flatten(2), gate, weight).to(mixed.dtype), state

    def state_shape(self) -> tuple[int, ...]:
        return self.groups, self.heads, self.value_dim, self.key_dim

    def _parts(self, mixed: Tensor) -> tuple[Tensor, ...]:
        """[tokens, groups, rows of a group] -> gates, x, B, C and step sizes of each group."""
        values = self.heads * self.value_dim
        return mixed.split([values, values, self.key_dim, self.key_dim, self.heads], -1)

    def _normed(self, x: Tensor, gate: Tensor, weight: Tensor) -> Tensor:
        """RMSNorm of each group's features after the gate's SiLU. x fp32, gate [tokens, groups, features]."""
        gated = x * F.silu(gate.float())
        normed = F.rms_norm(gated, gated.shape[-1:], eps=self.config.layernorm_epsilon).to(gate.dtype)
        return weight.view(gate.shape[1], -1) * normed
