"""Megatron's MLP, which tells an adapted `linear_fc2` how its input comes out of `linear_fc1`'s output, so that the
backward pass needs only the latter to be kept."""

from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.mlp import MLP
from torch import Tensor, nn

from megatron_lora.lora.arithmetic import Again
from megatron_lora.lora.linear import LoRARowParallelLinear


class AdaptedMLP(MLP):
    """A dense MLP. Without an adapter on `linear_fc2`, or where its input is kept, it is Megatron-Core's own."""

    def forward(self, hidden_states: Tensor, per_token_scale: Tensor | None = None, **kwargs: Any) -> Any:
        """hidden_states [s, b, hidden] -> ([s, b, hidden], bias or None)."""
        down: Any = self.linear_fc2
        if per_token_scale is not None or not (isinstance(down, LoRARowParallelLinear) and down.recomputes_input):
            return super().forward(hidden_states, per_token_scale, **kwargs)
        up: Any = self.linear_fc1
        given, bias = up(hidden_states)
        if bias is not None and not self.config.bias_activation_fusion:
            # What is not fused keeps the sum.
            given, bias = given + bias, None
        activate = partial(self._activate, bias=bias)
        if bias is None and given.requires_grad and down.takes_gate and self._has_kernel(given):
            return down.gated(given, activate)
        return down(activate(given), again=Again(activate, (given,)))

    def _has_kernel(self, given: Tensor) -> bool:
        """Whether the activation is the SwiGLU of `adapter_kernels`, and the recipe leaves fused ones on."""
        config = self.config
        swiglu = config.gated_linear_unit and self.activation_func is F.silu
        return swiglu and config.bias_activation_fusion and given.is_cuda and given.dtype == torch.bfloat16

    def _activate(self, given: Tensor, bias: Tensor | None) -> Tensor:
        """What Megatron-Core does between the two linears, fused or not: its forward pass over linears that do
        nothing."""
        between: Any = SimpleNamespace(
            config=self.config, activation_func=self.activation_func, linear_fc1=_BOTH, linear_fc2=_ALONE
        )
        return MLP.forward(between, (given, bias))[0]  # type: ignore[arg-type]


class _Alone(nn.Module):
    def forward(self, given: Tensor) -> tuple[Tensor, None]:
        return given, None


_BOTH, _ALONE = nn.Identity(), _Alone()
