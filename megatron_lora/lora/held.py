"""An adapter's factors as a rank holds them, and what Megatron is told of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from torch import Tensor

from megatron_lora.lora.layout import Factor

# Ranks over which Megatron does not sum a factor's gradient, and has to be summed: tensor-parallel peers, those that
# share an expert's matrices, and those that hold other experts of the layer.
GradientGroup = Literal["tp", "expert_tp", "expert"]


@dataclass(frozen=True)
class HeldFactor:
    """A factor of one linear. parameter: what trains and has this rank's part in it, at `place` where it has those of
    several experts. axis: the one of the part that is split over TP, or None."""

    factor: Factor
    parameter: torch.nn.Parameter
    axis: int | None
    place: int | None = None

    @property
    def value(self) -> Tensor:
        """This rank's part, the memory that trains."""
        return self.parameter if self.place is None else self.parameter[self.place]

    @property
    def gradient(self) -> Tensor:
        """Megatron's, of this rank's part."""
        gradient: Tensor = self.parameter.main_grad  # type: ignore[attr-defined]
        return gradient if self.place is None else gradient[self.place]


def mark(held: HeldFactor, groups: Sequence[GradientGroup], *, of_experts: bool, copied: bool = False) -> None:
    """Tell Megatron how a factor is split over TP, and our gradient step over which ranks to sum it. of_experts: it is
    reduced over the ranks that hold the same experts. copied: another rank counts it in the gradient norm."""
    parameter: Any = held.parameter
    packed = 0 if held.place is None else 1
    set_tensor_model_parallel_attributes(parameter, held.axis is not None, (held.axis or 0) + packed, 1)
    parameter.allreduce = not of_experts
    parameter.shared = copied
    parameter.sum_gradient_over = tuple(groups)
    parameter.lora_plus = held.factor.lora_plus


# What `mark` tells, of which a parameter in another one's place is told the same.
_MARKS = (
    "tensor_model_parallel",
    "partition_dim",
    "partition_stride",
    "allreduce",
    "shared",
    "sum_gradient_over",
    "lora_plus",
)


def marked_alike(parameter: torch.nn.Parameter) -> torch.nn.Parameter:
    """A parameter of its own with the same values, of which Megatron is told the same."""
    copy = torch.nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)
    for name in _MARKS:
        setattr(copy, name, getattr(parameter, name))
    return copy
