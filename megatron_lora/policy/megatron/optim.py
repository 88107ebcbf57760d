"""Megatron's data-parallel wrapper, optimizer and schedules over whatever trains."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import (
    OptimizerConfig,
    ParamGroupOverride,
    ParamKey,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from megatron_lora.config.schema import PolicyConfig
from megatron_lora.lora.held import GradientGroup
from megatron_lora.policy.backend import DTYPES


def wrap_for_data_parallel(chunks: Sequence[GPTModel], policy: PolicyConfig, config: Any) -> list[Any]:
    """Wrap each chunk in Megatron's DDP: one fp32 gradient buffer, reduced over DP x CP once a step."""
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=False,
        use_distributed_optimizer=policy.megatron_cfg.optimizer.use_distributed_optimizer,
        average_in_collective=False,
    )
    wrapped = [
        DistributedDataParallel(config=config, ddp_config=ddp, module=chunk, disable_bucketing=index > 0)
        for index, chunk in enumerate(chunks)
    ]
    config.finalize_model_grads_func = finalize_gradients
    config.no_sync_func = None
    return wrapped


def finalize_gradients(chunks: list[Any], num_tokens: Any = None, **kwargs: Any) -> None:
    """After the last micro-batch: Megatron's reductions, then the sums of factors over further ranks that hold the same
    (`LoRALinear`). The loss is already divided by the global count, so `num_tokens` is not used."""
    finalize_model_grads(chunks, None, **{k: v for k, v in kwargs.items() if k == "pg_collection"})
    parameters = [parameter for chunk in chunks for parameter in chunk.module.parameters() if parameter.requires_grad]
    for name, group in _gradient_groups().items():
        if dist.get_world_size(group) > 1:
            _sum_over(group, [p.main_grad for p in parameters if name in getattr(p, "sum_gradient_over", ())])


def _gradient_groups() -> dict[GradientGroup, Any]:
    return {
        "tp": parallel_state.get_tensor_model_parallel_group(),
        "expert_tp": parallel_state.get_expert_tensor_parallel_group(),
        "expert": parallel_state.get_expert_model_parallel_group(),
    }


def _sum_over(group: Any, grads: list[Any]) -> None:
    if not grads:
        return
    flat = _flatten_dense_tensors(grads)
    dist.all_reduce(flat, group=group)
    for grad, summed in zip(grads, _unflatten_dense_tensors(flat, grads), strict=True):
        grad.copy_(summed)


def build_optimizer(chunks: list[Any], policy: PolicyConfig) -> Any:
    """AdamW with fp32 master weights and moments (Loshchilov and Hutter 2019), split over DP if the recipe says so."""
    options = policy.megatron_cfg.optimizer
    dtype = DTYPES[policy.precision]
    config = OptimizerConfig(
        optimizer="adam",
        lr=options.lr,
        min_lr=options.min_lr,
        weight_decay=options.weight_decay,
        adam_beta1=options.adam_beta1,
        adam_beta2=options.adam_beta2,
        adam_eps=options.adam_eps,
        clip_grad=clip_norm(policy),
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        use_distributed_optimizer=options.use_distributed_optimizer,
    )
    overrides = get_standard_config_overrides(config)
    ratio = policy.lora_plus_ratio
    if ratio is not None:
        # Hayou et al. 2024 (LoRA+): the attribute comes from the adapter's table of factors.
        rates = ParamGroupOverride(max_lr=options.lr * ratio, min_lr=options.min_lr * ratio)
        overrides[ParamKey(attr="lora_plus")] = rates
    return get_megatron_optimizer(config, chunks, overrides, use_gloo_process_groups=False)


def clip_norm(policy: PolicyConfig) -> float:
    """The largest gradient norm; 0 means no clipping."""
    value = policy.megatron_cfg.optimizer.clip_grad
    return float(policy.max_grad_norm or 0.0) if value is None else float(value)


def update(optimizer: Any, max_norm: float) -> float:
    """Clip and step. Returns the gradient norm before clipping; where it is not finite nothing is updated."""
    optimizer.prepare_grads()
    norm = optimizer.get_grad_norm()
    norm = float(norm) if norm is not None else 0.0
    if not math.isfinite(norm):
        return norm
    if max_norm > 0.0:
        for part in getattr(optimizer, "chained_optimizers", [optimizer]):
            parameters = part.get_parameters()
            if parameters:
                clip_grad_by_total_norm_fp32(parameters, max_norm=max_norm, total_norm=norm)
    optimizer.step_with_ready_grads()
    return norm
