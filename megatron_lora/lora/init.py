"""Starting values of the factors: the same tensor at every layout, from the full fan-in and a seed."""

import math
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from megatron_lora.lora.layout import AdapterSpec, Factor, ModuleLayout
from megatron_lora.lora.methods import ReadWeight, method_of

NORMAL_STD = 0.2
# The whole factors of a module, by factor name.
Factors = Callable[[ModuleLayout], dict[str, Tensor]]


def initial_factors(
    spec: AdapterSpec,
    a_method: str,
    b_method: str,
    seed: int,
    read: ReadWeight | None = None,
    start: Factors | None = None,
) -> Factors:
    """Freshly drawn. read: the weights of the model by HF name, for kinds that start from them. start: factors that are
    given, not drawn."""
    methods = {"A": a_method, "B": b_method}

    def draw(module: ModuleLayout) -> dict[str, Tensor]:
        given = {} if start is None else start(module)

        def fresh(factor: Factor) -> Tensor:
            if factor.name in given:
                return given[factor.name].clone()
            shape: Any = module.factor_shape(factor, spec.shapes)
            name = f"{module.name}.{factor.name}"
            if factor.axes[0] != "rank" or len(module.blocks) == 1:
                return init_factor(methods[factor.key], shape, seed, name)
            # Each block as if it were alone: its fan-out is its own rank.
            return torch.cat(
                [
                    init_factor(methods[factor.key], (block.rank, shape[1]), seed, f"{name}.{'.'.join(block.segments)}")
                    for block in module.blocks
                ]
            )

        return method_of(spec.type).draw(module, spec.shapes, fresh, read)

    return draw


def given_factors(spec: AdapterSpec, tensors: Mapping[str, Tensor]) -> Factors:
    """From `<module>.<factor>` tensors."""
    return lambda module: spec.of_module(module, tensors)


def init_factor(method: str, shape: tuple[int, int], seed: int, name: str) -> Tensor:
    """[rows, columns] fp32 on the CPU, drawn from (seed, name) alone.

    xavier: normal, std sqrt(2 / (in + out)) (Glorot and Bengio 2010, eq. 12). uniform: Kaiming uniform with
    a = sqrt(5), bound 1 / sqrt(in) (He et al. 2015; peft's choice for A). normal: std 0.2. zero.
    """
    if method == "zero":
        return torch.zeros(shape)
    # A CPU generator looks at the low 32 bits of its seed only.
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
    fan_out, fan_in = shape
    values = torch.empty(shape)
    if method == "xavier":
        return values.normal_(0.0, math.sqrt(2.0 / (fan_in + fan_out)), generator=generator)
    if method == "uniform":
        bound = 1.0 / math.sqrt(fan_in)
        return values.uniform_(-bound, bound, generator=generator)
    if method == "normal":
        return values.normal_(0.0, NORMAL_STD, generator=generator)
    raise ValueError(f"init method {method!r}; wanted xavier, uniform, normal or zero")
