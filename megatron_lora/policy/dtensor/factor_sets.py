"""Two sets of factors on the linears of one model: the policy's, and a critic's with its value head.

What is asked of the linears, and of the functions here and in `adapter.py`, is of the set in use.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from megatron_lora.lora.layout import FACTORS, Factor, FactorKey
from megatron_lora.lora.methods import AdapterMethod
from megatron_lora.policy.critic import VALUE_HEAD_WEIGHT

# The policy's, under peft's name, and the critic's.
ADAPTER_NAME = "default"
CRITIC = "critic"


class FactorSets:
    """Of a linear with factors under peft's names.

    sets: that it has. in_use: the one that it computes with; None where the set in use has none here.
    """

    sets: tuple[str, ...] = (ADAPTER_NAME,)
    in_use: str | None = ADAPTER_NAME
    method: AdapterMethod

    @property
    def factors(self) -> dict[FactorKey, nn.Parameter]:
        """This linear's factors, in the order of the method's table."""
        return {factor.key: self._parameter(factor) for factor in self.method.factors}

    def _parameter(self, factor: Factor) -> nn.Parameter:
        assert self.in_use is not None
        holder: Any = getattr(self, factor.peft_name.partition(".")[0])
        if isinstance(holder, nn.Parameter):
            return holder if self.in_use == ADAPTER_NAME else getattr(self, f"{factor.peft_name}_{self.in_use}")
        return holder[self.in_use].weight

    def factors_changed(self) -> None:
        """The factors have other values than before: what was derived from them is computed anew."""

    def add_critics_factors(self) -> None:
        """Another empty parameter of each factor's shape."""
        self.sets = (ADAPTER_NAME, CRITIC)
        for factor, parameter in zip(self.method.factors, self.factors.values(), strict=True):
            copy = nn.Parameter(torch.empty_like(parameter))
            holder: Any = getattr(self, factor.peft_name.partition(".")[0])
            if isinstance(holder, nn.Parameter):
                setattr(self, f"{factor.peft_name}_{CRITIC}", copy)
            else:
                holder[CRITIC] = nn.Linear(parameter.shape[1], parameter.shape[0], bias=False, device="meta")
                holder[CRITIC].weight = copy


@contextmanager
def using_critic(model: Any) -> Iterator[None]:
    """Within it the critic's factors and head are in use."""
    linears = [module for module in model.modules() if isinstance(module, FactorSets)]
    try:
        _use(model, linears, CRITIC)
        yield
    finally:
        _use(model, linears, ADAPTER_NAME)


def _use(model: Any, linears: list[FactorSets], name: str) -> None:
    model.adapter_in_use = name
    for linear in linears:
        linear.in_use = name if name in linear.sets else None
        linear.factors_changed()


def gives_values(model: Any) -> bool:
    """Whether the critic is in use."""
    return getattr(model, "adapter_in_use", ADAPTER_NAME) == CRITIC


def without_set(name: str) -> str:
    """A critic's parameter's name as the policy's has it."""
    return name.replace(f".{CRITIC}.", f".{ADAPTER_NAME}.").removesuffix(f"_{CRITIC}")


def is_critics(name: str) -> bool:
    """Whether a parameter is the critic's, by its name in the model."""
    return name == VALUE_HEAD_WEIGHT or without_set(name) != name


def factor_of(parameter: str) -> Factor | None:
    """The factor that a parameter of an adapted linear is, by its name there; None for the base's own."""
    start = parameter.partition(".")[0].removesuffix(f"_{CRITIC}")
    return next((factor for factor in FACTORS.values() if factor.peft_name.partition(".")[0] == start), None)
