"""What a kind of adapter has to answer; everything else in the project iterates its table of factors."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from megatron_lora.lora.arithmetic import AdapterCall, TensorParallel
from megatron_lora.lora.base_weight import BaseWeight
from megatron_lora.lora.layout import FACTORS_OF_TYPE, Factor, FactorKey, ModelSpec, ModuleLayout
from megatron_lora.lora.model_spec import Parallel

# The tensors of one linear by what they are in the arithmetic: whole, a rank's part, or an HF linear's part.
Values = Mapping[FactorKey, Tensor]
# A weight of the base by its HF name, in fp32 on the CPU.
ReadWeight = Callable[[str], Tensor]


class AdapterMethod(ABC):
    """One kind of adapter: its factors, its product on a fused linear, its update of a weight, its PEFT form.

    type: its name in `adapter.json`. reads_base: whether its starting values need the base's weights. separate: whether
    each HF linear of a fused one gets a block, and so an A, of its own. adds_only: the output is the base's plus the
    adapter's; else their sum is multiplied by `gain`. vanishing: factors of which an all-zero one makes the output the
    base's, bit for bit.
    """

    type: str
    reads_base = False
    separate = False
    adds_only = True
    vanishing: tuple[FactorKey, ...] = ()

    @property
    def factors(self) -> tuple[Factor, ...]:
        return FACTORS_OF_TYPE[self.type]

    @abstractmethod
    def draw(
        self, module: ModuleLayout, shapes: ModelSpec, fresh: Callable[[Factor], Tensor], read: ReadWeight | None
    ) -> dict[str, Tensor]:
        """The starting factors of a module, whole, by factor name. fresh: drawn values of a factor. read: the base."""

    @abstractmethod
    def column(
        self, x: Tensor, weight: BaseWeight, bias: Tensor | None, values: Values, derived: Any, call: AdapterCall
    ) -> Tensor:
        """`arithmetic.column_parallel` of base and adapter: [t, in] -> [T, out / tp]."""

    @abstractmethod
    def row(self, x: Tensor, weight: BaseWeight, values: Values, derived: Any, call: AdapterCall) -> Tensor:
        """`arithmetic.row_parallel` of base and adapter: [T, in / tp] -> [t, out], reduced over TP."""

    def derive(
        self, weight: BaseWeight, values: Values, scale: float | Tensor, summed_over: TensorParallel | None
    ) -> Any:
        """What the products need that follows from base and factors alone, a constant: computed once a step of the
        optimizer. None where nothing is needed. summed_over: ranks with the other columns of the weight, if any."""
        return None

    def gain(self, values: Values, derived: Any) -> Tensor | None:
        """[out]: what the sum of base and adapter is multiplied by, before the bias; None where it `adds_only`."""
        return None

    def gradient_is_partial(self, factor: Factor, parallel: Parallel, tp: TensorParallel) -> bool:
        """Whether the gradient of a factor that every TP rank holds whole has to be summed over TP."""
        # A replicated linear sees every token on every rank, or a rank's own under sequence parallelism.
        return parallel != "replicated" or tp.sequence_parallel

    @abstractmethod
    def update(self, weight: Tensor, values: Values, scale: float) -> Tensor:
        """[rows, in] fp32: what merging adds to some rows of an HF linear's weight. values: of these rows, fp32."""
