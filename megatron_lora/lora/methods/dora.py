"""DoRA (Liu et al. 2024, eq. 5): y = m / |W + s B A| * (W x + s B A x), one m and one norm an output row.

The norm is a constant in the backward pass (section 4.3). It follows from base and factors alone, so a module computes
it once an optimizer step and keeps it: training, evaluation, log-probabilities and generation between two updates read
the same one.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron_lora.lora.arithmetic import AdapterCall, TensorParallel
from megatron_lora.lora.base_weight import BaseWeight, DenseWeight
from megatron_lora.lora.layout import MAGNITUDE, A, B, Factor, ModelSpec, ModuleLayout
from megatron_lora.lora.methods.additive import Lora
from megatron_lora.lora.methods.base import ReadWeight, Values
from megatron_lora.lora.model_spec import Parallel
from megatron_lora.lora.peft_format import hf_name, put_segment_part, segment_part


class Dora(Lora):
    type = "dora"
    reads_base = True
    adds_only = False
    vanishing = ()

    def draw(
        self, module: ModuleLayout, shapes: ModelSpec, fresh: Callable[[Factor], Tensor], read: ReadWeight | None
    ) -> dict[str, Tensor]:
        """The magnitude starts as the norm: the run starts at the base where B is zero."""
        assert read is not None, "DoRA starts from the base's own norms"
        factors = super().draw(module, shapes, fresh, read)
        magnitude = torch.zeros(module.factor_shape(MAGNITUDE, shapes))
        for block in module.blocks:
            for segment in block.segments:
                a, b = (segment_part(factor, module, segment, factors[factor.name], shapes) for factor in (A, B))
                weight = read(f"{hf_name(module, segment, shapes)}.weight")
                norm = row_norms(DenseWeight(weight), a, b * block.scale)
                put_segment_part(MAGNITUDE, module, segment, norm, magnitude, shapes)
        return {**factors, MAGNITUDE.name: magnitude}

    @torch.no_grad()
    def derive(
        self, weight: BaseWeight, values: Values, scale: float | Tensor, summed_over: TensorParallel | None
    ) -> Any:
        """[out] fp32: the norms, constants of the backward pass."""
        return row_norms(weight, values["A"], values["B"].float() * scale, summed_over)

    def gain(self, values: Values, derived: Any) -> Tensor | None:
        # Rows that no block serves have no magnitude: they stay the base's, and get no gradient.
        magnitude = values["magnitude"]
        return magnitude * (magnitude != 0) / derived + (magnitude == 0)

    def column(
        self, x: Tensor, weight: BaseWeight, bias: Tensor | None, values: Values, derived: Any, call: AdapterCall
    ) -> Tensor:
        return self._rescaled(super().column(x, weight, None, values, None, call), bias, values, derived)

    def row(self, x: Tensor, weight: BaseWeight, values: Values, derived: Any, call: AdapterCall) -> Tensor:
        return self._rescaled(super().row(x, weight, values, None, call), None, values, derived)

    def _rescaled(self, y: Tensor, bias: Tensor | None, values: Values, derived: Any) -> Tensor:
        gain = self.gain(values, derived)
        assert gain is not None
        y = y * gain.to(y.dtype)
        return y if bias is None else y + bias

    def gradient_is_partial(self, factor: Factor, parallel: Parallel, tp: TensorParallel) -> bool:
        """A row-parallel linear's magnitude multiplies the reduced output: only a rank's tokens under sequence
        parallelism, every token on every rank without."""
        return tp.sequence_parallel if factor is MAGNITUDE else super().gradient_is_partial(factor, parallel, tp)

    def update(self, weight: Tensor, values: Values, scale: float) -> Tensor:
        base = weight.float()
        whole = base + super().update(weight, values, scale)
        gain = values["magnitude"] / torch.linalg.vector_norm(whole, dim=1)
        return whole.mul_(gain[:, None]).sub_(base)


def row_norms(weight: BaseWeight, a: Tensor, scaled_b: Tensor, summed_over: TensorParallel | None = None) -> Tensor:
    """|W + sB A| of each output row: [out] fp32, from the norms of W and products of rank r.

    weight [out, in], a [R, in], scaled_b [out, R]: s B. summed_over: ranks that hold the other columns of W and A.
    """
    a, scaled_b = a.float(), scaled_b.float()
    gram = a @ a.t()
    pieces = []
    for rows, chunk in weight.row_chunks():
        w, b = chunk.float(), scaled_b[rows]
        cross = w @ a.t()
        pieces.append(w.square().sum(1) + (b * (2 * cross + b @ gram)).sum(1))
    squares = torch.cat(pieces)
    if summed_over is not None:
        summed_over.all_reduce(squares)
    # Rows of padding are zero; a norm of zero would make NaN of the gradient that they do not have.
    return squares.clamp_min_(torch.finfo(torch.float32).tiny).sqrt_()
