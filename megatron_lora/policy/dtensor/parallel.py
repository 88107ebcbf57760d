"""Tensor parallelism by the model's own plan (transformers' `_tp_plan`), with DTensors, adapters and sequence
parallelism.

Between linears tensors are plain and local; a planned linear turns its input into a DTensor and its output back. An
adapter's factors lie as on the Megatron backend: A whole and B's rows split on a column-parallel linear, A's columns
split and B whole on a row-parallel one. DTensor knows which of their gradients are partial sums; FSDP reduces them.
"""

import fnmatch
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from megatron_lora.conversion.tower import TOWER
from megatron_lora.errors import UserError
from megatron_lora.lora.model_spec import TEXT
from megatron_lora.lora.sharding import split_axis
from megatron_lora.policy.dtensor.factor_sets import factor_of
from megatron_lora.policy.dtensor.four_bit import four_bit_linears

COLUMN = ("colwise", "colwise_gather_output")
ROW = ("rowwise",)
REPLICATED = ("replicated_with_grad_allreduce",)


@dataclass
class ParallelPlan:
    """placements: parameter name -> how it lies over the TP mesh; others are whole on every rank.
    summed: names of whole parameters whose gradients are partial sums, to be added over TP ranks once a step."""

    placements: dict[str, Placement] = field(default_factory=dict)
    summed: set[str] = field(default_factory=set)


def parallelize(model: Any, mesh: DeviceMesh, *, sequence_parallel: bool) -> ParallelPlan:
    """Install the plan's hooks in a transformers causal language model (its parameters may be on the meta device).

    sequence_parallel: norms and residuals hold [1, T / tp, h]. Raises UserError for a model without a plan, or a plan
    that this backend does not know.
    """
    plan = ParallelPlan()
    blocks: dict[str, nn.Module] = {}
    tied = model.config.tie_word_embeddings
    for name, module, style in _planned(model):
        if style in REPLICATED:
            plan.summed |= {f"{name}.{key}" for key, _ in module.named_parameters()}
        elif name == "lm_head":
            if not tied:
                _column(plan, name, module, mesh)
        elif style in COLUMN:
            _column(plan, name, module, mesh)
            parent = name.rpartition(".")[0]
            blocks[parent] = model.get_submodule(parent)
        else:
            _row(plan, name, module, mesh, Shard(1) if sequence_parallel else Replicate())
    for block in blocks.values():
        _enter_block(block, mesh, Shard(1) if sequence_parallel else Replicate())
    if sequence_parallel:
        _split_sequence(model, plan, mesh)
    return plan


def _planned(model: Any) -> Iterator[tuple[str, nn.Module, str]]:
    plan: dict[str, str] = model.tp_plan or {}
    if not any(style in COLUMN for style in plan.values()):
        raise UserError(
            f"transformers has no tensor-parallel plan for {model.config.model_type}; set "
            "policy.dtensor_cfg.tensor_parallel_size=1, or policy.megatron_cfg.enabled=true"
        )
    unknown = sorted(set(plan.values()) - {*COLUMN, *ROW, *REPLICATED})
    if unknown:
        raise UserError(
            f"transformers' tensor-parallel plan for {model.config.model_type} asks for {', '.join(unknown)}, which "
            "this backend does not know; set policy.dtensor_cfg.tensor_parallel_size=1"
        )
    for name, module in list(model.named_modules()):
        # The plan is of a model of the language alone, whatever it stands in.
        plain = name.replace(TOWER, TEXT, 1)
        style = next((style for pattern, style in plan.items() if fnmatch.fnmatchcase(plain, pattern)), None)
        if style is not None:
            yield name, module, style


def _column(plan: ParallelPlan, name: str, module: nn.Module, mesh: DeviceMesh) -> None:
    _place(plan, name, module, True, weight=Shard(0), bias=Shard(0))
    module.register_forward_pre_hook(lambda _, inputs: (_as_dtensor(inputs[0], mesh, Replicate()), *inputs[1:]))
    module.register_forward_hook(lambda _, inputs, output: _to_local(output, mesh, Shard(-1)))


def _row(plan: ParallelPlan, name: str, module: nn.Module, mesh: DeviceMesh, output_layout: Placement) -> None:
    _place(plan, name, module, False, weight=Shard(1), bias=Replicate())
    module.register_forward_pre_hook(lambda _, inputs: (_as_dtensor(inputs[0], mesh, Shard(-1)), *inputs[1:]))
    module.register_forward_hook(lambda _, inputs, output: _to_local(output, mesh, output_layout))


def _place(plan: ParallelPlan, name: str, module: nn.Module, column: bool, **layouts: Placement) -> None:
    """layouts: of the base's own parameters; the adapter's follow from its table of factors."""
    for key, _ in module.named_parameters():
        factor = factor_of(key)
        if factor is None:
            plan.placements[f"{name}.{key}"] = layouts[key.rsplit(".", 1)[-1]]
        else:
            axis = split_axis(factor.key, "column" if column else "row")
            plan.placements[f"{name}.{key}"] = Replicate() if axis is None else Shard(axis)
    for path in four_bit_linears(module):
        # A weight that is no parameter.
        plan.placements[f"{name}.{path}.weight" if path else f"{name}.weight"] = layouts["weight"]


def _enter_block(block: nn.Module, mesh: DeviceMesh, layout: Placement) -> None:
    """Make the hidden states that attention or the MLP gets one whole DTensor, so that the gradients of its several
    column-parallel linears are added before the one reduction."""

    def enter(_: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        def whole(value: Tensor) -> DTensor:
            return _as_dtensor(value, mesh, layout).redistribute(mesh, [Replicate()])

        if args:
            return (whole(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": whole(kwargs["hidden_states"])}

    block.register_forward_pre_hook(enter, with_kwargs=True)


def _split_sequence(model: Any, plan: ParallelPlan, mesh: DeviceMesh) -> None:
    """Split the embeddings' output over the sequence; norms then see a part of the tokens each."""
    model.model.embed_tokens.register_forward_hook(
        lambda _, inputs, output: _to_local(_as_dtensor(output, mesh, Replicate()), mesh, Shard(1))
    )
    for name, module in model.named_modules():
        if name.endswith("norm") or "layernorm" in name.rpartition(".")[2]:
            plan.summed |= {f"{name}.{key}" for key, _ in module.named_parameters()}


def _as_dtensor(value: Tensor, mesh: DeviceMesh, layout: Placement) -> DTensor:
    if isinstance(value, DTensor):
        return value
    if layout.is_shard():
        layout = Shard(layout.dim % value.dim())  # type: ignore[attr-defined]
    return DTensor.from_local(value, mesh, [layout], run_check=False)


def _to_local(value: Any, mesh: DeviceMesh, layout: Placement) -> Tensor:
    if not isinstance(value, DTensor):
        return value
    if layout.is_shard():
        layout = Shard(layout.dim % value.dim())  # type: ignore[attr-defined]
    return value.redistribute(mesh, [layout]).to_local()
