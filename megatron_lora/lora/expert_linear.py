"""The linears of a layer's experts, frozen, all experts in one module, with or without adapters.

They stand in Megatron-Core's `TEGroupedMLP` where Transformer Engine's grouped linears do: it gives them rows that its
token dispatcher has sorted by expert, and adds no communication of its own.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker, get_expert_parallel_rng_tracker_name
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_lora.lora.arithmetic import TensorParallel
from megatron_lora.lora.base_weight import DenseExperts, ExpertWeight
from megatron_lora.lora.grouped import GroupedCall, adapted_grouped_linear, grouped_linear, row_ends
from megatron_lora.lora.held import GradientGroup, HeldFactor, mark
from megatron_lora.lora.layout import FactorKey, ModelSpec, ModuleLayout, module_name
from megatron_lora.lora.methods import AdapterMethod
from megatron_lora.lora.model_spec import Parallel
from megatron_lora.lora.sharding import split_axis


class ExpertLinear(nn.Module):
    """One linear of each of this rank's experts. weight [experts, out, in], bias [experts, out] or None: this rank's
    part. Built as Megatron-Core builds Transformer Engine's grouped linears; `adapter` is put in later.

    on_meta: what is built has no memory for its weight, which is given to it later. stored_weight: the
    weight where it is no parameter."""

    on_meta = False
    parallel_kind: Parallel
    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self,
        num_experts: int,
        input_size: int,
        output_size: int,
        *,
        config: TransformerConfig,
        bias: bool,
        skip_bias_add: bool,
        pg_collection: Any,
        **_: Any,
    ):
        super().__init__()
        self.config = config
        self.skip_bias_add = skip_bias_add
        self.adapter: ExpertAdapter | None = None
        self.stored_weight: ExpertWeight | None = None
        tp = pg_collection.expt_tp.size()
        rows, columns = (
            (output_size // tp, input_size) if self.parallel_kind == "column" else (output_size, input_size // tp)
        )
        place: dict[str, Any] = {
            "dtype": config.params_dtype,
            "device": "cpu" if config.use_cpu_initialization else torch.cuda.current_device(),
        }
        of_weight: dict[str, Any] = place | ({"device": "meta"} if self.on_meta else {})
        self.weight = nn.Parameter(torch.empty(num_experts, rows, columns, **of_weight), requires_grad=False)
        self.register_parameter(
            "bias", nn.Parameter(torch.empty(num_experts, rows, **place), requires_grad=False) if bias else None
        )

    def hold(self, stored: ExpertWeight) -> None:
        """Compute with a weight that is no parameter."""
        assert self.weight is not None and stored.shape == tuple(self.weight.shape), f"{stored.shape}"
        self.stored_weight, self.weight = stored, None

    def expert_weight(self) -> ExpertWeight:
        if self.stored_weight is not None:
            return self.stored_weight
        assert self.weight is not None
        return DenseExperts(self.weight)

    def forward(self, x: Tensor, rows_per_expert: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        """x [t, in], expert after expert -> ([t, out], what the caller has to add to each expert's rows)."""
        weight, ends = self.expert_weight(), row_ends(rows_per_expert, x.device)
        bias = None if self.skip_bias_add else self.bias
        if self.adapter is not None and self.adapter.enabled:
            out = self.adapter.product(x, weight, bias, ends, one_by_one=not self.config.moe_grouped_gemm)
        else:
            out = grouped_linear(x, weight, bias, ends, one_by_one=not self.config.moe_grouped_gemm)
        return out, self.bias if self.skip_bias_add else None


class ExpertColumnLinear(ExpertLinear):
    """`experts.linear_fc1`, whose rows are split over the ranks that share an expert: a rank has [gate; up] shards."""

    parallel_kind = "column"


class ExpertRowLinear(ExpertLinear):
    """`experts.linear_fc2`; its outputs are partial over those ranks, and Megatron's dispatcher sums them."""

    parallel_kind = "row"


class ExpertAdapter(nn.Module):
    """The adapters on one linear of all experts of a rank. lora_A [experts, R, in], lora_B [experts, out, R]: this
    rank's parts; [R, in] and [out, R] where the layer's experts share them.

    layouts: of each expert, all of one form; one layout where they share it. tp: the ranks that share an expert.
    factors: this rank's parts. b_mask: `ModuleLayout.b_mask`'s part. dropout, dropout_before: as `LoRALinear`'s.
    """

    def __init__(
        self,
        layouts: Sequence[ModuleLayout],
        parallel: Parallel,
        tp: TensorParallel,
        *,
        method: AdapterMethod,
        factors: Mapping[FactorKey, Tensor],
        b_mask: Tensor | None,
        dropout: float,
        dropout_before: bool,
    ):
        super().__init__()
        self.shared = layouts[0].expert is None
        assert len({layout.blocks for layout in layouts}) == 1, "experts of a layer with adapters of different form"
        self.parallel_kind: Parallel = parallel
        self.split = tp
        self.method = method
        self.dropout = dropout
        self.dropout_before = dropout_before
        self.enabled = True
        for factor in method.factors:
            self.register_parameter(factor.name, nn.Parameter(factors[factor.key]))
        self.scale = layouts[0].scale
        scales = layouts[0].scales().to(factors["A"].device) if self.scale is None else None
        self.register_buffer("b_mask", b_mask, persistent=False)
        self.register_buffer("scales", scales, persistent=False)
        for held in self.held(None if self.shared else 0):
            mark(held, self._groups(held), of_experts=True, copied=self._is_copy)

    def held(self, place: int | None) -> list[HeldFactor]:
        """The factors of the expert at `place` among this rank's, None where experts share them."""
        return [
            HeldFactor(factor, getattr(self, factor.name), split_axis(factor.key, self.parallel_kind), place)
            for factor in self.method.factors
        ]

    def _groups(self, held: HeldFactor) -> list[GradientGroup]:
        groups: list[GradientGroup] = []
        if held.axis is None and self.method.gradient_is_partial(held.factor, self.parallel_kind, self.split):
            groups.append("expert_tp")
        if self.shared:
            groups.append("expert")
        return groups

    @property
    def _is_copy(self) -> bool:
        """Ranks with other experts hold a shared factor too; the gradient norm counts it once."""
        return self.shared and parallel_state.get_expert_model_parallel_rank() > 0

    def product(
        self, x: Tensor, weight: ExpertWeight, bias: Tensor | None, ends: Tensor, *, one_by_one: bool = False
    ) -> Tensor:
        """`grouped.adapted_grouped_linear` with these adapters."""
        a, b = (getattr(self, factor.name) for factor in self.method.factors)
        input_mask = output_mask = None
        if self.training and self.dropout > 0.0:
            if self.dropout_before:
                input_mask = self._mask(x.shape[0], x.shape[1], x)
            else:
                output_mask = self._mask(x.shape[0], weight.shape[1], x)
        scale: Any = self.scale if self.scale is not None else self.scales
        call = GroupedCall(ends, scale, self.b_mask, input_mask, output_mask, one_by_one)  # type: ignore[arg-type]
        return adapted_grouped_linear(x, weight, bias, a, b, call)

    def _mask(self, rows: int, columns: int, like: Tensor) -> Tensor:
        keep = 1.0 - self.dropout
        # The rows are this rank's alone: no stream that peers have in common may move on with them.
        tracker: Any = get_cuda_rng_tracker()
        with tracker.fork(get_expert_parallel_rng_tracker_name()):
            return torch.empty(rows, columns, dtype=like.dtype, device=like.device).bernoulli_(keep).div_(keep)

    def extra_repr(self) -> str:
        return f"shared={self.shared}, tp={self.split.size}"


class AdaptedExpert:
    """One expert's adapted linear: its part of an `ExpertAdapter`, in the form in which adapted linears are walked
    through (`LoRALinear`). expert: its number in the layer; place: among this rank's, None where factors are shared."""

    all_to_all = False

    def __init__(self, adapter: ExpertAdapter, layout: ModuleLayout, shapes: ModelSpec, expert: int, place: int | None):
        self.adapter = adapter
        self.layout = layout
        self.shapes = shapes
        self.expert = expert
        self.place = place

    @property
    def name(self) -> str:
        return module_name(self.layout.kind, self.layout.layer, self.expert)

    @property
    def parallel_kind(self) -> Parallel:
        return self.adapter.parallel_kind

    @property
    def split(self) -> TensorParallel:
        return self.adapter.split

    @property
    def held_factors(self) -> list[HeldFactor]:
        return self.adapter.held(self.place)

    @property
    def scale(self) -> float | None:
        return self.adapter.scale

    @property
    def scales(self) -> Any:
        return self.adapter.scales

    @property
    def enabled(self) -> bool:
        return self.adapter.enabled

    @enabled.setter
    def enabled(self, value: bool) -> None:
        self.adapter.enabled = value

    def factors_changed(self) -> None:
        """Nothing is derived from them."""

    @torch.no_grad()
    def adds_nothing(self) -> bool:
        """As `LoRALinear.adds_nothing`."""
        vanishing = self.adapter.method.vanishing
        return any(not bool(held.value.any()) for held in self.held_factors if held.factor.key in vanishing)
