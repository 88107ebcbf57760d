"""LoRA (Hu et al. 2021, eq. 3): y = W x + s B A x; with one A for the linears of a fused one, or one for each."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from megatron_lora.lora.arithmetic import AdapterCall, column_parallel, row_parallel
from megatron_lora.lora.base_weight import BaseWeight
from megatron_lora.lora.layout import A, B, Factor, ModelSpec, ModuleLayout
from megatron_lora.lora.methods.base import AdapterMethod, ReadWeight, Values


class Lora(AdapterMethod):
    type = "lora"
    vanishing = ("A", "B")

    def draw(
        self, module: ModuleLayout, shapes: ModelSpec, fresh: Callable[[Factor], Tensor], read: ReadWeight | None
    ) -> dict[str, Tensor]:
        a, b, mask = fresh(A), fresh(B), module.b_mask(shapes)
        return {A.name: a, B.name: b if mask is None else b * mask}

    def column(
        self, x: Tensor, weight: BaseWeight, bias: Tensor | None, values: Values, derived: Any, call: AdapterCall
    ) -> Tensor:
        return column_parallel(x, weight, bias, values["A"], values["B"], call)

    def row(self, x: Tensor, weight: BaseWeight, values: Values, derived: Any, call: AdapterCall) -> Tensor:
        return row_parallel(x, weight, values["A"], values["B"], call)

    def update(self, weight: Tensor, values: Values, scale: float) -> Tensor:
        return (values["B"] * scale) @ values["A"]


class CanonicalLora(Lora):
    """The form that peft itself trains. Its factors are LoRA's: blocks say which rows serve which linear."""

    separate = True
