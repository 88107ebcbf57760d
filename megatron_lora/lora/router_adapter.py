"""An adapter on the router of a mixture-of-experts layer: a product beside Megatron-Core's own, which chooses experts.

The router stays the module that it is; its logits have s B A x added, in the dtype that it computes in.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.moe.moe_layer import BaseMoELayer
from torch import Tensor, nn
from torch.nn import functional as F

from megatron_lora.lora.arithmetic import TensorParallel
from megatron_lora.lora.held import HeldFactor, mark
from megatron_lora.lora.layout import FactorKey, ModelSpec, ModuleLayout, module_name
from megatron_lora.lora.methods import AdapterMethod
from megatron_lora.lora.model_spec import Parallel


class RouterAdapter(nn.Module):
    """lora_A [R, in], lora_B [experts, R], whole on every rank. In the form in which adapted linears are walked through
    (`LoRALinear`). tp: ranks that have tokens of their own under sequence parallelism."""

    parallel_kind: Parallel = "replicated"
    all_to_all = False
    expert: int | None = None
    scales: Any = None

    def __init__(
        self,
        layout: ModuleLayout,
        shapes: ModelSpec,
        tp: TensorParallel,
        *,
        method: AdapterMethod,
        factors: Mapping[FactorKey, Tensor],
    ):
        super().__init__()
        self.layout = layout
        self.shapes = shapes
        self.split = tp
        self.method = method
        self.enabled = True
        assert layout.scale is not None
        self.scale: float = layout.scale
        for factor in method.factors:
            self.register_parameter(factor.name, nn.Parameter(factors[factor.key]))
        for held in self.held_factors:
            partial = method.gradient_is_partial(held.factor, self.parallel_kind, tp)
            mark(held, ["tp"] if partial else [], of_experts=False)

    def forward(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """x [..., in] -> [..., experts], computed in `dtype`."""
        a, b = (getattr(self, factor.name).to(dtype) for factor in self.method.factors)
        return F.linear(F.linear(x.to(dtype), a) * self.scale, b)

    @property
    def name(self) -> str:
        return module_name(self.layout.kind, self.layout.layer)

    @property
    def held_factors(self) -> list[HeldFactor]:
        return [HeldFactor(factor, getattr(self, factor.name), None) for factor in self.method.factors]

    def factors_changed(self) -> None:
        """Nothing is derived from them."""

    @torch.no_grad()
    def adds_nothing(self) -> bool:
        """As `LoRALinear.adds_nothing`."""
        vanishing = self.method.vanishing
        return any(not bool(held.value.any()) for held in self.held_factors if held.factor.key in vanishing)

    def extra_repr(self) -> str:
        return f"rank={self.layout.rank}"


def routers(chunk: GPTModel) -> Iterator[tuple[str, Any]]:
    """(full name with the global layer number, the router) of each layer with experts."""
    for layer in chunk.decoder.layers:
        if isinstance(layer.mlp, BaseMoELayer):
            number: Any = layer.layer_number
            yield f"decoder.layers.{number - 1}.mlp.router", layer.mlp.router
