"""What merged weights have to be, column by column, up to one rounding: base + scale * B @ A from the factors that the
trainer computes with. A few columns of every linear tell every fault that reaches a linear at all."""

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_lora.lora.layout import AdapterSpec
from megatron_lora.lora.methods import method_of
from megatron_lora.policy.interface import Policy
from megatron_lora.rollout.adapter_factors import factors_fingerprint, scaled_factors, trainer_fingerprint

# HF name -> number of a column -> its values [out].
Columns = Mapping[str, Mapping[int, Tensor]]
UNIT_ROUNDOFF = 2.0**-24  # fp32


def adds_to_the_base(spec: AdapterSpec | None) -> bool:
    """Whether a merged weight is the base's plus the scaled product of two factors, and so is each of its columns: not
    where rows are scaled (DoRA), the factors' start is taken out of the base (PiSSA), or all weights train."""
    return spec is not None and method_of(spec.type).adds_only and not spec.residual


class MergedColumns:
    """Holds the base's columns, which training leaves alone."""

    def __init__(self, policy: Policy, handed_over: Columns):
        """handed_over: names the columns. Collective: one pass over the base's weights."""
        self.policy = policy
        self.base: dict[str, dict[int, Tensor]] = {
            name: {column: weight[:, column].clone() for column in handed_over[name]}
            for name, weight in policy.hf_weights(merged=False)
            if name in handed_over
        }

    def faults(self, handed_over: Columns) -> list[str]:
        """What is wrong with what was handed over; the names of linears, or that the trainer's ranks disagree with
        what they export. Collective.

        A sum in fp32 that is rounded to the model's dtype and then to the engine's lies between the roundings of the
        exact sum less and plus what fp32 can be wrong by.
        """
        adapter = self.policy.adapter()
        device = next(iter(next(iter(self.base.values())).values())).device
        factors = scaled_factors(adapter, torch.float32, device)
        if factors_fingerprint(factors) != trainer_fingerprint(self.policy, torch.float32):
            return ["the adapter that the trainer exports is not the one that it computes with"]
        mine = [
            name
            for name, columns in handed_over.items()
            if not all(
                is_sum(values, self.base[name][column], factors.get(name.removesuffix(".weight")), column)
                for column, values in columns.items()
            )
        ]
        everyone: list[list[str]] = [[]] * dist.get_world_size()
        dist.all_gather_object(everyone, mine)
        return list(dict.fromkeys(name for names in everyone for name in names))


def is_sum(found: Tensor, base: Tensor, factors: tuple[Tensor, Tensor] | None, column: int) -> bool:
    """Whether `found` [out] is one column of base + B @ A, rounded. factors: A [r, in], scale * B [out, r]."""
    if factors is None:
        return torch.equal(found, base.to(found.device, found.dtype))
    a, b = factors
    exact = base.double() + b.double() @ a[:, column].double()
    terms = b.abs() @ a[:, column].abs()
    slack = UNIT_ROUNDOFF * (2 * exact.abs() + (a.shape[0] + 4) * terms.double())
    low, high = ((exact + sign * slack).to(base.dtype).to(found.device, found.dtype) for sign in (-1, 1))
    return bool(((low <= found) & (found <= high)).all())
