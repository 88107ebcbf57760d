"""Optimizer state in the parameters' own shapes, so that it loads on any layout.

Megatron's own sharded optimizer state asserts that every rank has taken a step and holds parameters; a pipeline stage
without adapters, or a run that resumes, has not. Here each parameter's fp32 master and moments are made whole over the
data-parallel ranks that share them, and written and read like the parameter itself.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from megatron_lora.policy.adam_state import MOMENTS

NAMES = ("param", *MOMENTS)


def sharded_optimizer_state(optimizer: Any, weights: Mapping[str, Any], *, loading: bool) -> dict[str, Any]:
    """{"step": int, "tensors": {weights' key: {"param" | "exp_avg" | "exp_avg_sq": sharded tensor}}}.

    weights: sharded tensors whose data are this rank's trainable parameters. loading: tensors to be filled. Collective
    over data-parallel ranks.
    """
    tensors: dict[str, Any] = {}
    for key, sharded in weights.items():
        if not isinstance(sharded, ShardedTensor | ShardedTensorFactory):
            continue
        parameter: Any = sharded.data
        if not parameter.requires_grad:
            continue
        values = _empty(parameter) if loading else _whole(optimizer, parameter)
        tensors[key] = {
            name: make_sharded_optimizer_tensor(sharded, value, prefix=f"optimizer.{name}")
            for name, value in values.items()
        }
    return {"step": _step(optimizer), "tensors": tensors}


def load_optimizer_state(optimizer: Any, weights: Mapping[str, Any], loaded: Mapping[str, Any]) -> None:
    """Put what `sharded_optimizer_state` described, now filled, into the optimizer. weights: as there."""
    step = int(loaded["step"])
    for part in _parts(optimizer):
        _set_step(part, step)
    for key, values in loaded["tensors"].items():
        parameter = weights[key].data
        part = _owner(optimizer, parameter)
        if part is None:
            continue
        start, end = _range(part, parameter)
        main, state = _main(part, parameter)
        for name, value in values.items():
            piece = value.reshape(-1)[start:end].to(main.device)
            if name == "param":
                main.data.copy_(piece.view_as(main))
            else:
                state[name] = piece.view_as(main).clone()


def _whole(optimizer: Any, parameter: Tensor) -> dict[str, Tensor]:
    """The parameter's fp32 master and moments, whole, on every data-parallel rank."""
    part = _owner(optimizer, parameter)
    result = {}
    for name in NAMES:
        full = torch.zeros(parameter.numel(), dtype=torch.float32, device=parameter.device)
        if part is not None:
            start, end = _range(part, parameter)
            main, state = _main(part, parameter)
            value = main if name == "param" else state.get(name)
            if value is not None:
                full[start:end] = value.detach().reshape(-1)
        if any(isinstance(shared, DistributedOptimizer) for shared in _parts(optimizer)):
            dist.all_reduce(full, group=_sharing_group(parameter))
        result[name] = full.view_as(parameter)
    return result


def _sharing_group(parameter: Any) -> Any:
    """The ranks over which a distributed optimizer splits a parameter."""
    if getattr(parameter, "allreduce", True):
        return parallel_state.get_data_parallel_group(with_context_parallel=True)
    return parallel_state.get_expert_data_parallel_group()


def _empty(parameter: Tensor) -> dict[str, Tensor]:
    return {name: torch.empty_like(parameter, dtype=torch.float32, requires_grad=False) for name in NAMES}


def _parts(optimizer: Any) -> list[Any]:
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


def _owner(optimizer: Any, parameter: Tensor) -> Any | None:
    """The optimizer that holds (this rank's shard of) the parameter."""
    for part in _parts(optimizer):
        if isinstance(part, DistributedOptimizer):
            if parameter in part.model_param_group_index_map:
                return part
        elif any(parameter is model for model, _ in _pairs(part)):
            return part
    return None


def _range(part: Any, parameter: Any) -> tuple[int, int]:
    if not isinstance(part, DistributedOptimizer):
        return 0, parameter.numel()
    owned = part._get_model_param_range_map(parameter)["param"]
    return owned.start, owned.end


def _main(part: Any, parameter: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """(fp32 master of this rank's shard, its optimizer state)."""
    if isinstance(part, DistributedOptimizer):
        group, order = part.model_param_group_index_map[parameter]
        main = part.optimizer.param_groups[group]["params"][order]
    else:
        main = next(main for model, main in _pairs(part) if model is parameter)
    return main, part.optimizer.state[main]


def _pairs(part: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """(model parameter, fp32 master) of an optimizer that is not distributed."""
    if hasattr(part, "float16_groups"):
        for models, mains in zip(part.float16_groups, part.fp32_from_float16_groups, strict=True):
            yield from zip(models, mains, strict=True)
        for group in part.fp32_from_fp32_groups:
            yield from ((parameter, parameter) for parameter in group)
    elif part.optimizer is not None:
        for group in part.optimizer.param_groups:
            yield from ((parameter, parameter) for parameter in group["params"])


def _step(optimizer: Any) -> int:
    """Steps taken; a rank without parameters has none to say, so the largest of all ranks is used."""
    steps = [0]
    for part in _parts(optimizer):
        if part.optimizer is None:
            continue
        steps += [int(group["step"]) for group in part.optimizer.param_groups if "step" in group]
        steps += [int(state["step"]) for state in part.optimizer.state.values() if "step" in state]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    largest = torch.tensor(max(steps), dtype=torch.int64, device=device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return int(largest)


def _set_step(part: Any, step: int) -> None:
    """torch's AdamW keeps the step beside each parameter, Transformer Engine's fused one in the group."""
    if part.optimizer is None:
        return
    for group in part.optimizer.param_groups:
        if isinstance(part.optimizer, torch.optim.Adam):
            for parameter in group["params"]:
                part.optimizer.state[parameter]["step"] = torch.tensor(float(step))
        else:
            group["step"] = step
