"""Starting values of the two factors: the same tensor at every layout, from the full fan-in and a seed."""

import math
import zlib

import torch
from torch import Tensor

NORMAL_STD = 0.2


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
