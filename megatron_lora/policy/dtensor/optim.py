"""Optimizer, schedule and gradient norm over FSDP's sharded parameters."""

import importlib
import math
from collections.abc import Collection, Iterable, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from megatron_lora.config.schema import PolicyConfig
from megatron_lora.config.schema_dtensor import TorchSchedulerConfig
from megatron_lora.errors import UserError
from megatron_lora.policy.backend import local_part


class Schedule(Protocol):
    def step(self, increment: int) -> None: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...


class TorchSchedule:
    """torch schedulers one after the other, with Megatron's way of stepping."""

    def __init__(self, optimizer: torch.optim.Optimizer, entries: Sequence[TorchSchedulerConfig]):
        named = [entry for entry in entries if entry.name is not None]
        schedulers = [_build(entry.name, "scheduler", optimizer, **entry.kwargs) for entry in named]
        milestones = next((entry.milestones for entry in entries if entry.milestones is not None), [])
        if len(schedulers) == 1:
            self.scheduler = schedulers[0]
        else:
            self.scheduler = torch.optim.lr_scheduler.SequentialLR(optimizer, schedulers, milestones)

    def step(self, increment: int = 1) -> None:
        for _ in range(increment):
            self.scheduler.step()

    def state_dict(self) -> dict[str, Any]:
        return self.scheduler.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.scheduler.load_state_dict(state_dict)


class ConstantSchedule:
    def step(self, increment: int = 1) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        pass


def build_optimizer(
    parameters: Iterable[nn.Parameter], policy: PolicyConfig, lora_plus: Collection[nn.Parameter] = ()
) -> torch.optim.Optimizer:
    """`policy.optimizer`, or the AdamW of `policy.megatron_cfg.optimizer`. Only matrices decay, as on Megatron.

    lora_plus: parameters that learn `lora_plus_ratio` times as fast (Hayou et al. 2024), where the recipe sets one.

    Raises UserError for a class that cannot be imported or does not take its keyword arguments.
    """
    named = policy.optimizer
    if named is not None:
        decay = float(named.kwargs.get("weight_decay", 0.0))
        groups = _groups(parameters, decay, lora_plus, policy, named.kwargs.get("lr"), None)
        return _build(named.name, "optimizer", groups, **named.kwargs)
    options = policy.megatron_cfg.optimizer
    return torch.optim.AdamW(
        _groups(parameters, options.weight_decay, lora_plus, policy, options.lr, options.min_lr),
        lr=options.lr,
        betas=(options.adam_beta1, options.adam_beta2),
        eps=options.adam_eps,
        weight_decay=options.weight_decay,
        fused=True,
    )


def _groups(
    parameters: Iterable[nn.Parameter],
    weight_decay: float,
    lora_plus: Collection[nn.Parameter],
    policy: PolicyConfig,
    rate: float | None,
    min_rate: float | None,
) -> list[dict[str, Any]]:
    """Parameter groups by decay, rate and device mesh: one kernel does not take DTensors of different meshes."""
    ratio = policy.lora_plus_ratio
    groups: dict[tuple[bool, bool, int], list[nn.Parameter]] = {}
    for parameter in parameters:
        decays, faster = parameter.dim() > 1, ratio is not None and parameter in lora_plus
        meshes = parameter.device_mesh.ndim if isinstance(parameter, DTensor) else 0
        groups.setdefault((decays, faster, meshes), []).append(parameter)
    result = []
    for (decays, faster, _), members in groups.items():
        # wd_mult, lr_mult, max_lr and min_lr are what Megatron's schedule reads.
        group = {"params": members, "weight_decay": weight_decay * decays, "wd_mult": float(decays), "lr_mult": 1.0}
        if faster:
            assert ratio is not None
            if rate is None:
                raise UserError(
                    "policy.dtensor_cfg.lora_cfg.lora_plus_ratio needs a learning rate to raise; set "
                    "policy.optimizer.kwargs.lr"
                )
            group |= {"lr": rate * ratio, "max_lr": rate * ratio}
            if min_rate is not None:
                group["min_lr"] = min_rate * ratio
        result.append(group)
    return result


def build_schedule(optimizer: torch.optim.Optimizer, policy: PolicyConfig, num_steps: int) -> Schedule:
    """`policy.scheduler`, a constant rate where only `policy.optimizer` is set, else Megatron's own schedule."""
    if policy.scheduler is not None:
        return TorchSchedule(optimizer, policy.scheduler)
    if policy.optimizer is not None:
        return ConstantSchedule()
    from megatron_lora.policy.learning_rate import build_scheduler

    return build_scheduler(optimizer, policy, num_steps)


def check_optimizer(policy: PolicyConfig) -> None:
    """Raise UserError where `policy.optimizer` or `policy.scheduler` cannot be built."""
    if policy.optimizer is None:
        return  # the keys of Megatron's are checked one by one
    weight = nn.Parameter(torch.zeros(1, 1))
    build_schedule(build_optimizer([weight], policy, [weight]), policy, num_steps=1)


def clip_norm(policy: PolicyConfig) -> float:
    """The largest gradient norm; 0 means no clipping."""
    follows_megatron = policy.optimizer is None and policy.megatron_cfg.optimizer.clip_grad is not None
    return float((policy.megatron_cfg.optimizer.clip_grad if follows_megatron else policy.max_grad_norm) or 0.0)


def sum_gradients_over_tp(parameters: Iterable[nn.Parameter], mesh: DeviceMesh) -> None:
    """Add the gradients of `parameters` over TP ranks: each rank saw some heads, or some tokens, only."""
    if mesh.size() == 1:
        return
    for parameter in parameters:
        if parameter.grad is not None:
            local = local_part(parameter.grad)
            # cpu_offload keeps gradients in CPU memory, where the mesh's backend (NCCL) cannot add them up.
            total = local.to(mesh.device_type)
            dist.all_reduce(total, group=mesh.get_group())
            local.copy_(total)


def gradient_norm(parameters: Sequence[nn.Parameter], mesh: DeviceMesh, device: torch.device) -> float:
    """The 2-norm over all of them, each element counted once. mesh: (dp, tp)."""
    first = mesh.get_local_rank("tp") == 0
    squares = torch.zeros((), dtype=torch.float64, device=device)
    for parameter in parameters:
        if parameter.grad is not None and (first or _split_over_tp(parameter)):
            squares += torch.linalg.vector_norm(local_part(parameter.grad).float()).double().square().to(device)
    dist.all_reduce(squares)
    return math.sqrt(squares.item()) if math.isfinite(squares.item()) else float("nan")


def clip_gradients(parameters: Sequence[nn.Parameter], norm: float, max_norm: float) -> None:
    factor = max_norm / (norm + 1.0e-6)
    if max_norm > 0.0 and factor < 1.0:
        for parameter in parameters:
            if parameter.grad is not None:
                local_part(parameter.grad).mul_(factor)


def _split_over_tp(parameter: nn.Parameter) -> bool:
    return isinstance(parameter, DTensor) and parameter.device_mesh.ndim == 2 and parameter.placements[1].is_shard()


def _build(path: str | None, section: str, *args: Any, **kwargs: Any) -> Any:
    """An object of the class at an import path."""
    assert path is not None
    module, _, name = path.rpartition(".")
    try:
        made = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            f"policy.{section}.name={path!r} cannot be imported: {error}; give a path such as torch.optim.AdamW"
        ) from error
    try:
        return made(*args, **kwargs)
    except (TypeError, ValueError) as error:
        raise UserError(f"policy.{section}: {path} does not take kwargs {kwargs}: {error}") from error
