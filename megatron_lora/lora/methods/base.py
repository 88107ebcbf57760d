"""What a kind of adapter has to answer; everything else in the project iterates its table of factors."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from megatron_lora.lora.arithmetic import AdapterCall, TensorParallel
from megatron_lora.lora.layout import FACTORS_OF_TYPE, Factor, FactorKey, ModelShapes, ModuleLayout

# The tensors of one linear by what they are in the arithmetic: whole, a rank's part, or an HF linear's part.
Values = Mapping[FactorKey, Tensor]
# A weight of the base by its HF name, in fp32 on the CPU.
ReadWeight = Callable[[str], Tensor]


class AdapterMethod(ABC):
    """One kind of adapter: its factors, its product on a fused linear, its update of a weight, its PEFT form.

    type: its name in `adapter.json`. vanishing: factors of which an all-zero one makes the output the
    base's, bit for bit.
    """

    type: str
    vanishing: tuple[FactorKey, ...] = ()

    @property
    def factors(self) -> tuple[Factor, ...]:
        return FACTORS_OF_TYPE[self.type]

    @abstractmethod
    def draw(
        self, module: ModuleLayout, shapes: ModelShapes, fresh: Callable[[Factor], Tensor], read: ReadWeight | None
    ) -> dict[str, Tensor]:
        """The starting factors of a module, whole, by factor name. fresh: drawn values of a factor. read: the base."""

    @abstractmethod
    def column(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, values: Values, derived: Tensor | None, call: AdapterCall
    ) -> Tensor:
        """`arithmetic.column_parallel` of base and adapter: [t, in] -> [T, out / tp]."""

    @abstractmethod
    def row(self, x: Tensor, weight: Tensor, values: Values, derived: Tensor | None, call: AdapterCall) -> Tensor:
        """`arithmetic.row_parallel` of base and adapter: [T, in / tp] -> [t, out], reduced over TP."""

    def derive(self, weight: Tensor, values: Values, scale: float | Tensor, summed_over: TensorParallel | None) -> Any:
        """What the products need that follows from base and factors alone: computed once an optimizer step. None for a
        kind that needs nothing. summed_over: the ranks that hold the other columns of the weight, if any."""
        return None

    def gradient_is_partial(self, factor: Factor, column: bool, tp: TensorParallel) -> bool:
        """Whether the gradient of a factor that every TP rank holds whole has to be summed over TP."""
        return True

    @abstractmethod
    def update(self, weight: Tensor, values: Values, scale: float) -> Tensor:
        """[rows, in] fp32: what merging adds to some rows of an HF linear's weight. values: of these rows, fp32."""
