"""A transformers model of a Hugging Face base: adapted, split over tensor-parallel ranks, filled layer by layer from
safetensors and sharded over data-parallel ranks (FSDP2) as it is filled, so that a whole model never exists."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import Placement, distribute_tensor

from megatron_lora.config.schema import PolicyConfig
from megatron_lora.conversion.experts import fused_tensors, read_fused
from megatron_lora.conversion.hf_model import build_empty
from megatron_lora.conversion.weight_source import WeightSource
from megatron_lora.lora.layout import ModelSpec
from megatron_lora.lora.methods import ReadWeight
from megatron_lora.lora.model_spec import LinearSpec
from megatron_lora.lora.peft_format import PREFIX
from megatron_lora.policy.backend import DTYPES
from megatron_lora.policy.critic import VALUE_HEAD, VALUE_HEAD_WEIGHT, draw_value_head
from megatron_lora.policy.dtensor import adapter, attention
from megatron_lora.policy.dtensor.factor_sets import ADAPTER_NAME, without_set
from megatron_lora.policy.dtensor.four_bit import FourBitLinear, replace_linears, weight_name
from megatron_lora.policy.dtensor.logprobs import PolicyModule
from megatron_lora.policy.dtensor.parallel import ParallelPlan, parallelize
from megatron_lora.policy.dtensor.recurrent import keep_rows_apart
from megatron_lora.policy.quantization import FourBitSource, open_base
from megatron_lora.runtime.world import World, make_mesh


@dataclass
class BaseModel:
    """root: what is called, FSDP's root. hf: the transformers model in it. summed: parameters whose gradients are
    partial sums over TP. weights: the base's, as the run holds them. start: the adapter, None in full fine-tuning."""

    root: PolicyModule
    hf: Any
    shapes: ModelSpec
    mesh: DeviceMesh
    weights: WeightSource
    start: adapter.Start | None
    summed: list[nn.Parameter]
    notices: list[str] = field(default_factory=list)


def build_model(policy: PolicyConfig, world: World, seed: int, *, critic: bool = False) -> BaseModel:
    """Build the recipe's model in its layout. critic: with a second set of factors and a value head.

    Raises UserError for an unknown architecture, and for weights that are missing, truncated or of other shapes.
    """
    options = policy.dtensor_cfg
    model, weights = open_base(policy)
    dtype = DTYPES[policy.precision]
    shapes = model.shapes
    mesh = make_mesh(world, dp=world.dp, tp=world.tp)
    hf = build_empty(model, dtype=dtype, attn_implementation=attention.NAME)
    start = None
    notices: list[str] = []
    if options.lora_cfg.enabled:
        start = adapter.start(options.lora_cfg, shapes, policy.model_name, seed, weights, dtype)
        fused = options.lora_cfg.use_triton and world.tp == 1 and not options.compile
        notices = [*start.notices, *_fused_notices(policy, world)]
        adapter.inject(hf, start, options.lora_cfg, fused=fused, tp_rank=world.tp_rank, critic=critic)
    if isinstance(weights, FourBitSource):
        replace_linears(hf, weights)
    keep_rows_apart(hf, shapes)
    plan = ParallelPlan()
    if world.tp > 1:
        plan = parallelize(hf, mesh["tp"], sequence_parallel=options.sequence_parallel)
    if options.activation_checkpointing:
        hf.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    root = PolicyModule(hf, policy, mesh["tp"], shapes, model.final_softcap)
    values = dict(start.tensors) if start is not None else {}
    if critic:
        setattr(hf, VALUE_HEAD, nn.Linear(shapes.hidden_size, 1, bias=False, device="meta"))
        values[f"{PREFIX}{VALUE_HEAD_WEIGHT}"] = draw_value_head(shapes.hidden_size, seed)
    changed = start.drawn.changed_base if start is not None else None
    read = weights.read if changed is None else changed(weights.read)
    source = _Source(weights, read, values, policy, world, shapes, fused_tensors(shapes))
    summed = _fill_and_shard(root, source, plan, mesh, policy)
    return BaseModel(root, hf, shapes, mesh, weights, start, summed, notices)


def _fused_notices(policy: PolicyConfig, world: World) -> list[str]:
    options = policy.dtensor_cfg
    if not options.lora_cfg.use_triton:
        return []
    key = "policy.dtensor_cfg.lora_cfg.use_triton=true: the fused adapter is not used, "
    if world.tp > 1:
        return [f"{key}it works on whole matrices and tensor_parallel_size={world.tp}"]
    return [f"{key}compile=true fuses it"] if options.compile else []


@dataclass(frozen=True)
class _Source:
    """Where a parameter's whole value comes from: the base's files (what the model is to hold of them), or the starting
    adapter. fused: tensors of all experts, which the files hold one by one."""

    weights: WeightSource
    read_base: ReadWeight
    factors: Mapping[str, Tensor]
    policy: PolicyConfig
    world: World
    shapes: ModelSpec
    fused: Mapping[str, tuple[LinearSpec, int]]

    def read(self, name: str, shape: torch.Size) -> Tensor:
        """The value of the transformers model's parameter `name`, on this rank's device."""
        full = without_set(name).replace(f".{ADAPTER_NAME}.", ".")
        if f"{PREFIX}{full}" in self.factors:
            # Factors train: fp32, whatever the base is in.
            return self.factors[f"{PREFIX}{full}"].to(self.world.device, torch.float32)
        stored = name.replace(".base_layer.", ".")
        if stored in self.fused:
            value = read_fused(*self.fused[stored], self.read_base)
        else:
            value = self.read_base(stored)
        assert value.shape == shape, f"{stored}: {tuple(value.shape)} for {tuple(shape)}"
        # In full fine-tuning FSDP keeps the weights in fp32 and casts what it gathers.
        dtype = DTYPES[self.policy.precision] if self.factors else torch.float32
        return value.to(self.world.device, dtype)

    def fill_four_bit(self, linear: FourBitLinear, path: str, plan: ParallelPlan) -> None:
        """The 4-bit weight of the transformers model's linear at `path`."""
        world = self.world
        assert isinstance(self.weights, FourBitSource)
        linear.hold(
            self.weights,
            weight_name(path),
            plan.placements.get(f"{path}.weight"),
            (world.tp_rank, world.tp),
            DTYPES[self.policy.precision],
            world.device,
        )


def _fill_and_shard(
    root: PolicyModule, source: _Source, plan: ParallelPlan, mesh: DeviceMesh, policy: PolicyConfig
) -> list[nn.Parameter]:
    """Values for every parameter, layer by layer. Returns the final parameters of `plan.summed`."""
    dtype = DTYPES[policy.precision]
    fsdp: dict[str, Any] = {
        "mesh": mesh["dp"],
        "mp_policy": MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        if dtype != torch.float32
        else MixedPrecisionPolicy(),
        "offload_policy": CPUOffloadPolicy(pin_memory=source.world.device.type == "cuda")
        if policy.dtensor_cfg.cpu_offload
        else OffloadPolicy(),
    }
    hf = root.model
    filled: dict[nn.Parameter, nn.Parameter] = {}
    for index, layer in enumerate(hf.model.layers):
        _fill(layer, source.shapes.hf_place(f"model.layers.{index}."), source, plan, mesh["tp"], filled)
        _buffers_to(layer, source.world.device)
        if policy.dtensor_cfg.compile:
            # A CPU gains nothing by it: there layers are traced only, which needs no C++ compiler.
            backend = "inductor" if source.world.device.type == "cuda" else "aot_eager"
            layer.forward = torch.compile(layer.forward, backend=backend)
        fully_shard(layer, **fsdp)
        if policy.dtensor_cfg.compile:
            layer.register_forward_pre_hook(adapter.derive_ahead)
    _fill(hf, "", source, plan, mesh["tp"], filled)
    _buffers_to(hf, source.world.device)
    fully_shard(root, **fsdp)
    return [parameter for name, parameter in hf.named_parameters() if name in plan.summed]


def _fill(
    module: nn.Module,
    prefix: str,
    source: _Source,
    plan: ParallelPlan,
    mesh: DeviceMesh,
    filled: dict[nn.Parameter, nn.Parameter],
) -> None:
    """Replace the meta parameters below `module` by real ones, this TP rank's part of each; shared ones stay shared."""
    for path, owner in module.named_modules():
        if isinstance(owner, FourBitLinear):
            source.fill_four_bit(owner, f"{prefix}{path}", plan)
        for key, empty in list(owner.named_parameters(recurse=False)):
            if not empty.is_meta:
                continue
            if empty not in filled:
                name = f"{prefix}{path}.{key}" if path else f"{prefix}{key}"
                value = source.read(name, empty.shape)
                placement = plan.placements.get(name)
                if placement is not None:
                    value = _distribute(value, mesh, placement)
                filled[empty] = nn.Parameter(value, requires_grad=empty.requires_grad)
            setattr(owner, key, filled[empty])
        for key in owner._buffers.keys() - owner._non_persistent_buffers_set:
            # The bias by which a router chooses experts, which transformers keeps in fp32.
            owner._buffers[key] = source.read_base(f"{prefix}{path}.{key}" if path else f"{prefix}{key}").float()


def _distribute(value: Tensor, mesh: DeviceMesh, placement: Placement) -> Tensor:
    # Every rank has the whole value: no communication.
    return distribute_tensor(value, mesh, [placement], src_data_rank=None)


def _buffers_to(module: nn.Module, device: torch.device) -> None:
    for owner in module.modules():
        for key, buffer in list(owner.named_buffers(recurse=False)):
            owner._buffers[key] = buffer.to(device)
