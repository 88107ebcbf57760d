"""peft adapters in a transformers model: put in, filled, switched off, and read out as the fused adapter they are.

peft gives each HF linear its own pair of factors. Here the linears that a fused Megatron linear covers share one A
Parameter, so that the model is the same on both backends and one key swaps them with equal numbers.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import peft
import torch
from peft.tuners.lora import Linear as PeftLoraLinear
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.nn import functional as F

from megatron_lora.config.schema_adapters import LoraConfig
from megatron_lora.conversion.weight_source import WeightSource
from megatron_lora.lora.arithmetic import AdapterCall, TensorParallel
from megatron_lora.lora.base_weight import BaseWeight, DenseWeight
from megatron_lora.lora.layout import FACTORS, A, AdapterSpec, B, ModelSpec
from megatron_lora.lora.methods import method_of
from megatron_lora.lora.peft_config import FLAG_OF_TYPE
from megatron_lora.lora.peft_format import PREFIX, hf_name, peft_name, to_hf
from megatron_lora.policy.adapter_start import DrawnStart, base_reader, draw_start, starting_adapter
from megatron_lora.policy.checksums import Pieces, checksum
from megatron_lora.policy.dtensor.factor_sets import ADAPTER_NAME, FactorSets, gives_values, is_critics, without_set
from megatron_lora.policy.dtensor.four_bit import FourBitLinear

_WHOLE = TensorParallel(group=None, size=1, rank=0, sequence_parallel=False)


@dataclass(frozen=True)
class Start:
    """What a run adapts, and with which values. tensors: PEFT names -> whole factors on the CPU."""

    drawn: DrawnStart
    peft_config: dict[str, Any]
    tensors: dict[str, Tensor]
    notices: list[str]

    @property
    def spec(self) -> AdapterSpec:
        return self.drawn.spec


def start(
    config: LoraConfig, shapes: ModelSpec, model_name: str, seed: int, weights: WeightSource, dtype: torch.dtype
) -> Start:
    """The recipe's adapter, read from `init_adapter` or drawn from the seed as the Megatron backend draws it. weights:
    the base, in the form that the run holds it in; dtype: of its products.

    Raises UserError for a pattern that fits nothing, or a folder that does not fit the base.
    """
    found = starting_adapter(config, shapes, model_name)
    drawn = draw_start(found, (config.lora_A_init, "zero"), seed, torch.float32, weights, dtype)
    fused = {
        f"{module.name}.{name}": value for module in found.spec.modules for name, value in drawn.factors(module).items()
    }
    if found.spec.saved:
        read = base_reader(found.spec, weights, dtype)
        assert read is not None
        fused |= {name: drawn.saved[name] if drawn.saved else read(name) for name in found.spec.saved}
    peft_config, tensors = to_hf(found.spec, fused)
    return Start(drawn, peft_config, tensors, found.notices)


class AdaptedLinear(FactorSets, PeftLoraLinear):
    """peft's LoRA linear, with dropout before or after the factors, the same on every layout, and, where the weights
    are whole, the fused product of `lora.arithmetic`.

    Under tensor parallelism weights, inputs and outputs are DTensors and the layout follows from theirs.
    """

    dropout = 0.0
    dropout_before = False
    fused = False
    tp_rank = 0
    keeps_derived = True
    _derived: Any = None

    @property
    def enabled(self) -> bool:
        return not self._disable_adapters

    @enabled.setter
    def enabled(self, value: bool) -> None:
        # Not peft's own switch, which also changes what trains.
        self._disable_adapters = not value

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters:
            return self.base_layer(x, *args, **kwargs)
        assert self.in_use is not None
        scale = self.scaling[ADAPTER_NAME]
        drops = self.training and self.dropout > 0.0
        if self.fused:
            return self._fused_forward(x, scale, drops)
        base: Any = self.base_layer
        result = self._base_product(x)
        inner = x * self._mask(x) if drops and self.dropout_before else x
        update = self.lora_B[self.in_use](self.lora_A[self.in_use](inner.to(self.factors["A"].dtype)) * scale)
        if drops and not self.dropout_before:
            update = update * self._mask(update)
        result = result + update.to(result.dtype)
        return result if self.method.adds_only else self._rescaled(result, base.bias)

    def _base_product(self, x: Tensor) -> Tensor:
        """With the bias where the adapter only adds."""
        base: Any = self.base_layer
        bias = base.bias if self.method.adds_only else None
        if isinstance(base, FourBitLinear):
            return base.product(x, bias)
        return F.linear(x, base.weight, bias)

    def _rescaled(self, result: Tensor, bias: Tensor | None) -> Tensor:
        if isinstance(result, DTensor):
            # A row-parallel product is a sum over ranks until here.
            whole = [Replicate() if placement.is_partial() else placement for placement in result.placements]
            result = result.redistribute(placements=whole)
        gain = self.method.gain(self.factors, self._derive())
        assert gain is not None
        result = result * gain.to(result.dtype)
        return result if bias is None else result + bias

    def _derive(self) -> Any:
        """What follows from base and factors, computed once an optimizer step, or in each forward pass; under TP as the
        magnitude lies. A compiled forward pass finds it computed (`derive_ahead`)."""
        if self.method.adds_only:
            return None
        if self._derived is None or not (self.keeps_derived or torch.compiler.is_compiling()):
            self._derived = self._derived_now()
        return self._derived

    def _derived_now(self) -> Any:
        scale, weight, column = self.scaling[ADAPTER_NAME], self._local_weight(), self._splits_rows()
        factor = self.factors["A"]
        if not isinstance(factor, DTensor):
            return self.method.derive(weight, self.factors, scale, None)
        values: Any = {key: factor.to_local() for key, factor in self.factors.items()}  # type: ignore[operator]
        mesh = factor.device_mesh
        ranks = TensorParallel(mesh.get_group(), mesh.size(), self.tp_rank, sequence_parallel=False)
        local = self.method.derive(weight, values, scale, None if column else ranks)
        return DTensor.from_local(local, mesh, [Shard(0) if column else Replicate()], run_check=False)

    def _local_weight(self) -> BaseWeight:
        """This tensor-parallel rank's part."""
        base: Any = self.base_layer
        if isinstance(base, FourBitLinear):
            return base.base_weight
        return DenseWeight(base.weight.to_local() if isinstance(base.weight, DTensor) else base.weight)

    def _splits_rows(self) -> bool:
        """Whether tensor-parallel ranks hold some rows of the base each."""
        base: Any = self.base_layer
        split = base.split if isinstance(base, FourBitLinear) else getattr(base.weight, "placements", (None,))[0]
        return split == Shard(0)

    def factors_changed(self) -> None:
        self._derived = None

    def _fused_forward(self, x: Tensor, scale: float, drops: bool) -> Tensor:
        base: Any = self.base_layer
        rows = x.flatten(0, -2)
        masks: dict[str, Tensor] = {}
        if drops:
            width = x.shape[-1] if self.dropout_before else base.out_features
            name = "input_mask" if self.dropout_before else "output_mask"
            masks[name] = self._local_mask((rows.shape[0], width), x, False)
        call = AdapterCall(_WHOLE, scale, input_mask=masks.get("input_mask"), output_mask=masks.get("output_mask"))
        y = self.method.column(rows, self._local_weight(), base.bias, self.factors, self._derive(), call)
        return y.view(*x.shape[:-1], -1)

    def _mask(self, like: Tensor) -> Tensor:
        """A dropout mask in the layout of `like`, divided by the keep probability: slices differ between ranks, what
        every rank holds (or adds up) is the same on all."""
        if not isinstance(like, DTensor):
            return self._local_mask(like.shape, like, False)
        split = any(placement.is_shard() for placement in like.placements)
        placements = [p if p.is_shard() else Replicate() for p in like.placements]
        local = self._local_mask(like.to_local().shape, like, split)
        return DTensor.from_local(local, like.device_mesh, placements, run_check=False)

    def _local_mask(self, shape: Any, like: Tensor, own: bool) -> Tensor:
        # Seeded from the default generator, which recomputation restores; `own` is this rank's alone.
        seed = int(torch.randint(1 << 62, (), dtype=torch.int64)) + (1 + self.tp_rank if own else 0)
        generator = torch.Generator(like.device).manual_seed(seed)
        keep = 1.0 - self.dropout
        return torch.empty(shape, dtype=like.dtype, device=like.device).bernoulli_(keep, generator=generator).div_(keep)


def inject(
    model: nn.Module, start: Start, config: LoraConfig, *, fused: bool, tp_rank: int, critic: bool = False
) -> None:
    """Freeze the model and adapt the linears of `start`; the factors' values are put in later. critic: give the linears
    of the layers a critic's factors too."""
    wanted = peft.LoraConfig.__dataclass_fields__
    kinds = FLAG_OF_TYPE.values()  # peft would add a kind's own factors and product: both are ours
    settings = {key: value for key, value in start.peft_config.items() if key in wanted and key not in kinds}
    # What trains whole is no second copy here, as it is in peft.
    ours = {"lora_dropout": 0.0, "inference_mode": False, "modules_to_save": None}
    peft_config = peft.LoraConfig(**{**settings, **ours})
    peft_config._register_custom_module({nn.Linear: AdaptedLinear})
    model.requires_grad_(False)
    peft.inject_adapter_in_model(peft_config, model, ADAPTER_NAME, low_cpu_mem_usage=True)  # type: ignore[arg-type]
    for name, module in adapted_linears(model).items():
        module.dropout, module.dropout_before = config.dropout, config.dropout_position == "pre"
        module.fused, module.tp_rank, module.method = fused, tp_rank, method_of(start.spec.type)
        module.keeps_derived = config.dora_cached_norms
        _add_own_factors(module, start.tensors[peft_name(name, FACTORS["B"])].shape[0])
        if critic and name != "lm_head":
            module.add_critics_factors()
    tie_shared_factors(model, start.spec)
    for parameter in saved_parameters(model, start.spec).values():
        parameter.requires_grad_(True)


def saved_parameters(model: nn.Module, spec: AdapterSpec) -> dict[str, nn.Parameter]:
    """HF tensor name -> parameter of what trains whole beside the adapters."""
    return {name: model.get_parameter(name) for name in spec.saved}


def _add_own_factors(linear: AdaptedLinear, outputs: int) -> None:
    """Empty parameters for the factors that plain LoRA has not: one number an output row."""
    for factor in linear.method.factors:
        if factor.axes == ("out",):
            # peft holds an empty container under this name.
            delattr(linear, factor.peft_name)
            linear.register_parameter(factor.peft_name, nn.Parameter(torch.empty(outputs, device="meta")))


def adapted_linears(model: nn.Module) -> dict[str, AdaptedLinear]:
    """HF module name -> adapted linear, of those that the set in use adapts."""
    return {
        name: module for name, module in model.named_modules() if isinstance(module, AdaptedLinear) and module.in_use
    }


def parameter_names(model: nn.Module) -> dict[nn.Parameter, str]:
    """Parameter -> HF name, of the base and the set in use: factors under the same names whichever that is."""
    critic = gives_values(model)
    return {
        parameter: without_set(name)
        for name, parameter in model.named_parameters()
        if not (is_critics(name) or _is_factor(name)) or is_critics(name) == critic
    }


def tie_shared_factors(model: nn.Module, spec: AdapterSpec) -> None:
    """One Parameter, of the linears that a block serves, as each factor without rows of its own for every linear: A."""
    shared = [factor.peft_name.partition(".")[0] for factor in spec.factors if "out" not in factor.axes]
    for module in spec.modules:
        for block in module.blocks:
            first, *others = (model.get_submodule(hf_name(module, segment, spec.shapes)) for segment in block.segments)
            sets: tuple[str, ...] = first.sets  # type: ignore[assignment]
            for linear in others:
                for name in shared:
                    for kind in sets:
                        getattr(linear, name)[kind].weight = getattr(first, name)[kind].weight


def peft_tensors(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """(PEFT tensor name, parameter) of every factor, an A that linears share once for each; then of what trains
    whole."""
    for name, linear in adapted_linears(model).items():
        for key, parameter in linear.factors.items():
            yield peft_name(name, FACTORS[key]), parameter
    for parameter, name in parameter_names(model).items():
        if parameter.requires_grad and not _is_factor(name):
            yield f"{PREFIX}{name}", parameter


def _is_factor(name: str) -> bool:
    return any(f".{factor.peft_name.partition('.')[0]}" in name for factor in FACTORS.values())


def gather(model: nn.Module) -> dict[str, Tensor]:
    """PEFT names -> the whole factors on the CPU, on every rank."""
    return {name: full_tensor(parameter).cpu() for name, parameter in peft_tensors(model)}


def checksum_pieces(model: nn.Module, dtype: torch.dtype) -> Pieces:
    """See `Policy.adapter_checksums`: every rank gives all of it."""
    pieces: Pieces = {}
    for name, linear in adapted_linears(model).items():
        a, b = (full_tensor(linear.factors[factor.key]) for factor in (A, B))
        scaled_b = b.float() * linear.scaling[ADAPTER_NAME]
        pieces[peft_name(name, A), 0, 0] = checksum(a.to(dtype))
        pieces[peft_name(name, B), 0, 0] = checksum(scaled_b.to(dtype))
    return pieces


def full_tensor(parameter: Tensor) -> Tensor:
    """The whole of a parameter, detached, on this rank's device."""
    value = parameter.detach()
    if not isinstance(value, DTensor):
        return value.clone()
    # cpu_offload keeps the shards in CPU memory, where the mesh's backend (NCCL) cannot gather them.
    value = value.to(value.device_mesh.device_type)
    assert isinstance(value, DTensor)
    if value.device_mesh.ndim == 2:
        # FSDP has cut TP's slices: they are put together first.
        value = value.redistribute(placements=[Replicate(), value.placements[1]])
    return value.full_tensor()


def factors_changed(model: nn.Module) -> None:
    for linear in adapted_linears(model).values():
        linear.factors_changed()


def derive_ahead(layer: nn.Module, args: Any) -> None:
    """A forward pre-hook, run when FSDP has gathered the layer: what its adapters derive is computed outside of the
    compiled graph, which is then the same whether it was kept or not, in the forward pass as in a recomputation."""
    for linear in adapted_linears(layer).values():
        linear._derive()


def lora_plus_parameters(model: nn.Module) -> set[nn.Parameter]:
    """The factors whose learning rate LoRA+ raises."""
    return {
        parameter
        for linear in adapted_linears(model).values()
        for key, parameter in linear.factors.items()
        if FACTORS[key].lora_plus
    }
