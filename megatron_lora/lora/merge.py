"""An adapter put into the weights that it adapts: one place for the live model, for files and for the checks."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_lora.lora.layout import AdapterSpec, Factor, FactorKey, ModuleLayout
from megatron_lora.lora.methods import method_of
from megatron_lora.lora.peft_format import block_of, hf_linears, segment_part

EVERY_ROW = slice(None)


@dataclass(frozen=True)
class Target:
    """The part of an adapted fused linear that is one HF linear."""

    spec: AdapterSpec
    module: ModuleLayout
    segment: str

    def weight_update(self, factors: Mapping[str, Tensor], device: torch.device | str = "cpu") -> "WeightUpdate":
        """factors: the whole adapter's, `<module>.<factor>` -> full tensor."""
        block = block_of(self.module, self.segment)
        assert block is not None
        own = self.spec.of_module(self.module, factors)
        parts: dict[FactorKey, Tensor] = {
            factor.key: segment_part(factor, self.module, self.segment, own[factor.name].to(device), self.spec.shapes)
            for factor in self.spec.factors
        }
        return WeightUpdate(self.spec, parts, block.scale)


class WeightUpdate:
    """What the adapter does to the weight of one HF linear, in fp32."""

    def __init__(self, spec: AdapterSpec, parts: Mapping[FactorKey, Tensor], scale: float):
        """parts: the linear's own factors, as a PEFT file holds them."""
        self.method = method_of(spec.type)
        self.parts = {key: part.float() for key, part in parts.items()}
        self.scale = scale

    def of_rows(self, weight: Tensor, rows: slice = EVERY_ROW) -> Tensor:
        """[rows, in] fp32: what merging adds to these rows of the base's weight [out, in]."""
        values: dict[FactorKey, Tensor] = {
            factor.key: _rows_of(factor, self.parts[factor.key], rows) for factor in self.method.factors
        }
        return self.method.update(weight[rows], values, self.scale)

    def merged(self, weight: Tensor) -> Tensor:
        """The merged weight, summed in fp32 and rounded once to the weight's dtype."""
        return self.of_rows(weight).add_(weight).to(weight.dtype)


def _rows_of(factor: Factor, part: Tensor, rows: slice) -> Tensor:
    return part[rows] if factor.axes[0] == "out" else part


def merge_targets(spec: AdapterSpec | None) -> dict[str, Target]:
    """HF linear -> what adapts it, in the model's order; empty without an adapter."""
    if spec is None:
        return {}
    modules = {
        (module.kind, module.layer, expert): module for module in spec.modules for expert in module.experts(spec.shapes)
    }
    targets = {}
    for linear in hf_linears(spec.shapes).values():
        module = modules.get((linear.kind, linear.layer, linear.expert))
        if module is not None and block_of(module, linear.segment) is not None:
            targets[linear.name] = Target(spec, module, linear.segment)
    return targets
