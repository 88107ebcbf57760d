"""Megatron's fused linears with a frozen weight of any form (`base_weight.BaseWeight`), without an adapter."""

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_lora.lora.arithmetic import Again, TensorParallel, frozen_column_parallel, frozen_row_parallel
from megatron_lora.lora.base_weight import BaseWeight, DenseWeight
from megatron_lora.runtime.native_layers import apply_norm


class FrozenLinear(torch.nn.Module):
    """Takes the place of a base's linear, with its parameters under the same names (`weight`, `bias`,
    `layer_norm_weight`, ...), so that base weights are loaded and exported as before.

    stored_weight: the weight where it is no parameter; by default the one of a base that is a `FrozenLinear` itself.
    """

    weight: Tensor | None
    bias: Tensor | None
    layer_norm_weight: Tensor | None
    layer_norm_bias: Tensor | None

    def __init__(
        self,
        base: torch.nn.Module,
        config: TransformerConfig,
        tp: TensorParallel,
        stored_weight: BaseWeight | None = None,
    ):
        super().__init__()
        self.config = config
        self.tp = tp
        self.tp_group = tp.group
        self.stored_weight: BaseWeight | None = stored_weight or getattr(base, "stored_weight", None)
        for name, parameter in base.named_parameters(recurse=False):
            # Transformer Engine holds an empty tensor where there is no bias.
            self.register_parameter(name, parameter if parameter.numel() else None)
            parameter.requires_grad_(False)
        if self.stored_weight is not None:
            self.register_parameter("weight", None)
        for name in ("bias", "layer_norm_weight", "layer_norm_bias"):
            if not hasattr(self, name):
                self.register_parameter(name, None)
        self.post_layernorm = getattr(base, "post_layernorm", None)
        self.eps = getattr(base, "eps", config.layernorm_epsilon)
        self.skip_bias_add = bool(getattr(base, "skip_bias_add", getattr(base, "te_return_bias", False)))

    def base_weight(self, given: Tensor | None = None) -> BaseWeight:
        """The weight of the products. given: another tensor in its place (a head tied to the embedding)."""
        if self.stored_weight is not None:
            return self.stored_weight
        weight = self.weight if given is None else given
        assert weight is not None
        return DenseWeight(weight)

    def _normed(self, x: Tensor) -> Tensor:
        weight, bias = self.layer_norm_weight, self.layer_norm_bias
        if weight is None:
            return x
        config = self.config
        return apply_norm(x, weight, bias, config.normalization, self.eps, config.layernorm_zero_centered_gamma)


class FrozenColumnParallelLinear(FrozenLinear):
    """`linear_qkv`, `linear_fc1` (with the norm before them, where Megatron fuses it) and `output_layer`."""

    def forward(self, x: Tensor, weight: Tensor | None = None, runtime_gather_output: bool | None = None) -> Any:
        """x [s, b, in], or [t, in] of an expert or a latent -> ([S, b, out / tp], bias or None)."""
        bias = None if self.skip_bias_add else self.bias
        again = Again(self._normed, (x,)) if self.layer_norm_weight is not None else None
        out = self._product(self._normed(x).flatten(0, -2), self.base_weight(weight), bias, again)
        return out.view(-1, *x.shape[1:-1], out.shape[-1]), self.bias if self.skip_bias_add else None

    def _product(self, x: Tensor, weight: BaseWeight, bias: Tensor | None, again: Again | None) -> Tensor:
        """[t, in] -> [T, out / tp]. again: how x came about, where a norm made it."""
        return frozen_column_parallel(x, weight, bias, self.tp)


class FrozenReplicatedLinear(FrozenLinear):
    """Latent attention's down projections, whole on every tensor-parallel rank: each works on the tokens it has."""

    def forward(self, x: Tensor) -> Any:
        """x [s, b, in] -> ([s, b, out], None)."""
        out = self._product(x.flatten(0, 1), self.base_weight())
        return out.view(*x.shape[:-1], out.shape[-1]), None

    def _product(self, x: Tensor, weight: BaseWeight) -> Tensor:
        """[t, in] -> [t, out], without communication."""
        return frozen_column_parallel(x, weight, None, self.tp.without_communication())


class FrozenRowParallelLinear(FrozenLinear):
    """`linear_proj` and `linear_fc2` (with the norm after them, in the families that have one)."""

    def forward(self, x: Tensor, again: Again | None = None) -> Any:
        """x [S, b, in / tp], or [t, in / tp] of an expert -> ([s, b, out], bias or None). again: how x came about."""
        return self._finished(self._product(x.flatten(0, -2), self.base_weight(), again), x)

    def _finished(self, out: Tensor, x: Tensor) -> Any:
        """What becomes of a product [t, out] of x [S, b, anything]."""
        out = out.view(-1, *x.shape[1:-1], out.shape[-1])
        if self.bias is not None and not self.skip_bias_add:
            out = out + self.bias
        if self.post_layernorm is not None:
            out = self.post_layernorm(out)
        return out, self.bias if self.skip_bias_add else None

    def _product(self, x: Tensor, weight: BaseWeight, again: Again | None) -> Tensor:
        """[T, in / tp] -> [t, out], reduced over TP."""
        return frozen_row_parallel(x, weight, self.tp)
