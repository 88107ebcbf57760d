"""Megatron's fused linears with an adapter: the modules that take the place of the base's."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker, get_data_parallel_rng_tracker_name
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor

from megatron_lora.lora.arithmetic import HIGHEST_RANK, AdapterCall, Again, TensorParallel
from megatron_lora.lora.base_weight import BaseWeight, DenseWeight
from megatron_lora.lora.frozen_linear import (
    FrozenColumnParallelLinear,
    FrozenLinear,
    FrozenReplicatedLinear,
    FrozenRowParallelLinear,
)
from megatron_lora.lora.held import HeldFactor, mark
from megatron_lora.lora.layout import FactorKey, ModelSpec, ModuleLayout, module_name
from megatron_lora.lora.methods import AdapterMethod
from megatron_lora.lora.model_spec import Parallel
from megatron_lora.lora.sharding import split_axis


class LoRALinear(FrozenLinear):
    """A frozen fused linear with an adapter: this rank's part of each factor of its kind (`method`), under the factor's
    name.

    dropout: probability; `dropout_before`: on A's input, else on B's output. keeps_derived: what the method derives
    from base and factors stays until `factors_changed`; else each forward pass computes it. recomputes_input: what a
    norm or an activation made is computed again in the backward pass, not kept. Those of experts are
    `expert_linear.ExpertLinear`.
    """

    parallel_kind: Parallel
    expert: int | None = None

    def __init__(
        self,
        base: torch.nn.Module,
        layout: ModuleLayout,
        shapes: ModelSpec,
        config: TransformerConfig,
        tp: TensorParallel,
        *,
        method: AdapterMethod,
        factors: Mapping[FactorKey, Tensor],
        b_mask: Tensor | None,
        dropout: float = 0.0,
        dropout_before: bool = False,
        all_to_all: bool = False,
    ):
        super().__init__(base, config, tp)
        self.layout = layout
        self.shapes = shapes
        self.dropout = dropout
        self.dropout_before = dropout_before
        self.all_to_all = all_to_all
        self.enabled = True
        self.recomputes_input = False
        self.method = method
        for factor in method.factors:
            self.register_parameter(factor.name, torch.nn.Parameter(factors[factor.key]))
        self.keeps_derived = True
        self._derived: Any = None
        self.register_buffer("b_mask", b_mask, persistent=False)
        self.scale = layout.scale
        scales = layout.scales().to(factors["A"].device) if self.scale is None else None
        self.register_buffer("scales", scales, persistent=False)
        for held in self.held_factors:
            # With all-to-all every rank of B and A already holds its whole gradient.
            partial = held.axis is None and method.gradient_is_partial(held.factor, self.parallel_kind, tp)
            mark(held, ["tp"] if partial else [], of_experts=False)

    @property
    def name(self) -> str:
        """The linear's full Megatron name."""
        return module_name(self.layout.kind, self.layout.layer)

    @property
    def split(self) -> TensorParallel:
        """The ranks that share the linear, over which factors are split."""
        return self.tp

    @property
    def held_factors(self) -> list[HeldFactor]:
        """This rank's part of each factor, in the order of the method's table."""
        return [
            HeldFactor(
                factor, getattr(self, factor.name), split_axis(factor.key, self.parallel_kind, a2a=self.all_to_all)
            )
            for factor in self.method.factors
        ]

    def factors_changed(self) -> None:
        """The factors have other values than before: what was derived from them is computed anew."""
        self._derived = None

    @torch.no_grad()
    def adds_nothing(self) -> bool:
        """Whether the output is the base's, bit for bit. By this rank's part: of two factors one is whole."""
        values = self._values()
        return any(not bool(values[key].any()) for key in self.method.vanishing)

    def _values(self) -> dict[FactorKey, Tensor]:
        return {factor.key: getattr(self, factor.name) for factor in self.method.factors}

    def _derive(self, weight: BaseWeight) -> Any:
        if self.method.adds_only:
            return None
        if self._derived is None or not self.keeps_derived:
            summed_over = self.tp if self.parallel_kind == "row" and self.tp.size > 1 else None
            self._derived = self.method.derive(weight, self._values(), self._scale, summed_over)
        return self._derived

    @property
    def _scale(self) -> float | Tensor:
        return self.scale if self.scale is not None else self.scales  # type: ignore[return-value]

    def _call(
        self, tokens: int, same_input_mask: bool, same_output_mask: bool, x: Tensor, again: Again | None = None
    ) -> AdapterCall:
        input_mask = output_mask = None
        if self.training and self.dropout > 0.0:
            if self.dropout_before:
                input_mask = self._mask((tokens, x.shape[-1]), x, same_input_mask)
            else:
                output_mask = self._mask((tokens, self._values()["B"].shape[0]), x, same_output_mask)
        return AdapterCall(
            parallel=self.tp,
            scale=self._scale,
            b_mask=self.b_mask,  # type: ignore[arg-type]
            input_mask=input_mask,
            output_mask=output_mask,
            all_to_all=self.all_to_all,
            again=again if self.recomputes_input else None,
        )

    def draw_call(self, x: Tensor) -> AdapterCall:
        """What the output layer's adapter needs for x [t, in], dropout masks drawn: for a head applied in chunks."""
        return self._call(x.shape[0], same_input_mask=True, same_output_mask=False, x=x)

    def _mask(self, shape: tuple[int, int], like: Tensor, same_on_every_rank: bool) -> Tensor:
        keep = 1.0 - self.dropout
        # Both streams by name: under sequence parallelism the layers run inside the rank's own stream already, and
        # what is drawn from the current one then differs between ranks, and again when a layer is recomputed.
        tracker: Any = get_cuda_rng_tracker()
        with tracker.fork(*([get_data_parallel_rng_tracker_name()] if same_on_every_rank else [])):
            return torch.empty(shape, dtype=like.dtype, device=like.device).bernoulli_(keep).div_(keep)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """Base parameters and the factors; see `policy.megatron.checkpoint` for which of them are written."""
        of_base: dict[Parallel, dict[str, int]] = {"column": {"weight": 0, "bias": 0}, "row": {"weight": 1}}
        axes = of_base.get(self.parallel_kind, {})
        axes |= {held.factor.name: held.axis for held in self.held_factors if held.axis is not None}
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            axes,
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=(metadata or {})["dp_cp_group"],
        )

    def extra_repr(self) -> str:
        return f"rank={self.layout.rank}, blocks={len(self.layout.blocks)}, tp={self.tp.size}"


class LoRAColumnParallelLinear(LoRALinear, FrozenColumnParallelLinear):
    """An adapter on a column-parallel linear."""

    parallel_kind = "column"

    def _product(self, x: Tensor, weight: BaseWeight, bias: Tensor | None, again: Again | None) -> Tensor:
        if not self.enabled:
            return super()._product(x, weight, bias, again)
        tokens = x.shape[0] * (self.tp.size if self.tp.sequence_parallel else 1)
        call = self._call(tokens, same_input_mask=True, same_output_mask=False, x=x, again=again)
        return self._adapted_product(x, weight, bias, call)

    def local_product(self, x: Tensor, weight: Tensor, call: AdapterCall) -> Tensor:
        """[t, in], the same on every rank -> [t, out / tp], bias added, without communication."""
        alone = replace(call, parallel=self.tp.without_communication())
        return self._adapted_product(x, DenseWeight(weight), self.bias, alone)

    def _adapted_product(self, x: Tensor, weight: BaseWeight, bias: Tensor | None, call: AdapterCall) -> Tensor:
        return self.method.column(x, weight, bias, self._values(), self._derive(weight), call)


class LoRAReplicatedLinear(LoRALinear, FrozenReplicatedLinear):
    """An adapter on a linear that every tensor-parallel rank holds whole."""

    parallel_kind = "replicated"

    def _product(self, x: Tensor, weight: BaseWeight) -> Tensor:
        if not self.enabled:
            return super()._product(x, weight)
        # Under sequence parallelism each rank has tokens of its own.
        shared = not self.tp.sequence_parallel
        call = self._call(x.shape[0], same_input_mask=shared, same_output_mask=shared, x=x)
        call = replace(call, parallel=self.tp.without_communication())
        return self.method.column(x, weight, None, self._values(), self._derive(weight), call)


class LoRARowParallelLinear(LoRALinear, FrozenRowParallelLinear):
    """An adapter on a row-parallel linear."""

    parallel_kind = "row"

    def _product(self, x: Tensor, weight: BaseWeight, again: Again | None) -> Tensor:
        if not self.enabled:
            return super()._product(x, weight, again)
        # Each rank sees other columns of the input, so its mask is its own; the partial outputs are summed, so their
        # mask is the same, unless all-to-all gives each rank its own columns.
        call = self._call(x.shape[0], same_input_mask=False, same_output_mask=not self.all_to_all, x=x, again=again)
        return self.method.row(x, weight, self._values(), self._derive(weight), call)

    @property
    def takes_gate(self) -> bool:
        """Whether `gated` can be called: there is a kernel for the rank, and nothing is dropped of A's input."""
        drops = self.training and self.dropout > 0.0 and self.dropout_before
        return self.enabled and self.recomputes_input and self.layout.rank <= HIGHEST_RANK and not drops

    def gated(self, given: Tensor, gate: Callable[[Tensor], Tensor]) -> Any:
        """`forward` of a SwiGLU's output: given [S, b, 2 in / tp] is [gate | up], of which nothing else is kept."""
        x, weight = given.flatten(0, -2), self.base_weight()
        call = self._call(x.shape[0], same_input_mask=False, same_output_mask=not self.all_to_all, x=x)
        call = replace(call, gate=gate)
        return self._finished(self.method.row(x, weight, self._values(), self._derive(weight), call), given)
