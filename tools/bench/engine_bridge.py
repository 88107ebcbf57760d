"""Megatron-Bridge's own fine-tuning step: its provider with Transformer Engine's layers and the fusions that its
recipes for these models set, its LoRA, Megatron's loss, data-parallel wrapper, schedule and optimizer."""

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from megatron_lora.runtime.world import World
from tools.bench.task import Experts, Task

# Bridge's own mixed precision: Transformer Engine's FP8 scaled by tensor, weights held in FP8, first and last layer in
# bf16. Or the same in every layer, over weights that stay in bf16 and are rounded in each step.
Fp8 = Literal["recipe", "all-layers"]
FP8_RECIPE = "bf16_with_fp8_current_scaling_mixed"
_EXPERT = re.compile(r"(?:local_experts\.(\d+)\.)?(linear_fc[12])\.(weight|bias)(\d*)")
# Names of Megatron-Core's plain norms, where Transformer Engine's stand in the linear after.
_PLAIN_NORMS = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}


def import_parts() -> None:
    """What `build` would import."""
    from megatron_lora.runtime.cpu import install_cpu_stand_ins
    from megatron_lora.runtime.transformer_engine import import_bridge

    install_cpu_stand_ins()
    import_bridge()


def build(
    task: Task, *, lora: bool, experts: Experts | None = None, fp8: Fp8 | None = None
) -> tuple[Callable[[], float], dict[str, Any]]:
    """(one training step that returns its loss, what to report of the model)."""
    from megatron_lora.runtime.world import init_distributed

    world = init_distributed()
    import_parts()
    chunks, config, vocab_size = _model(task, world, lora, experts, fp8)
    optimizer = _optimizer(chunks, config)
    ids = task.input_ids(vocab_size, world.device)
    batch = _batch(ids)
    trainable = sum(p.numel() for chunk in chunks for p in chunk.parameters() if p.requires_grad)
    total = sum(p.numel() for chunk in chunks for p in chunk.parameters())
    return _step(task, chunks, optimizer, batch), {"trainable": trainable, "total": total}


def _model(
    task: Task, world: World, lora: bool, experts: Experts | None, fp8: Fp8 | None
) -> tuple[list[Any], Any, int]:
    """(the wrapped model, its configuration, vocabulary size)."""
    from megatron.bridge import AutoBridge
    from megatron.core.distributed import DistributedDataParallelConfig, finalize_model_grads
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(task.model, trust_remote_code=False)
    provider: Any = AutoBridge.from_hf_config(config).to_megatron_provider(load_weights=False)
    provider.tensor_model_parallel_size = task.tp
    provider.sequence_parallel = task.sp
    provider.params_dtype = provider.pipeline_dtype = provider.autocast_dtype = task.dtype
    provider.bf16, provider.fp16 = task.dtype == torch.bfloat16, False
    provider.seq_length = task.length
    provider.perform_initialization = False
    # As in megatron.bridge.recipes.qwen: the 1.5B and 7B fine-tuning recipes.
    provider.cross_entropy_loss_fusion, provider.cross_entropy_fusion_impl = True, "native"
    _set_fp8(provider, fp8)
    if task.device == "cpu":
        _prepare_for_cpu(provider)
    # On by default where Transformer Engine is there, but the output layer's needs an Apex extension.
    provider.gradient_accumulation_fusion = False
    provider.finalize()
    provider.initialize_model_parallel(seed=0)
    provider.register_pre_wrap_hook(partial(_filled, task=task, world=world))
    if lora:
        attention_alone = bool(provider.num_moe_experts) and experts is None
        provider.register_pre_wrap_hook(_lora_hook(task.rank, attention_alone, shared=experts != "each"))
    # A single process has nothing to split the optimizer over; its recipes for one GPU leave that off too.
    ddp = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=False)
    # Where gradients are on, weights that are made in FP8 keep a copy in bf16 on the CPU.
    provider.provide = torch.no_grad()(provider.provide)
    chunks = provider.provide_distributed_model(
        ddp_config=ddp, wrap_with_ddp=True, use_cpu_initialization=task.device == "cpu"
    )
    provider.finalize_model_grads_func = finalize_model_grads
    return chunks, provider, config.vocab_size


def _set_fp8(provider: Any, fp8: Fp8 | None) -> None:
    if fp8 == "recipe":
        from megatron.bridge.training.mixed_precision import get_mixed_precision_config

        get_mixed_precision_config(FP8_RECIPE).setup(provider)
    elif fp8 == "all-layers":
        provider.fp8, provider.fp8_recipe = "hybrid", "tensorwise"


@torch.no_grad()
def _filled(chunks: list[Any], *, task: Task, world: World) -> list[Any]:
    """The chunks with the random weights that every engine has."""
    from megatron.core import parallel_state

    from megatron_lora.conversion.inventory import open_model
    from megatron_lora.conversion.model_names import model_parameters
    from megatron_lora.policy.megatron.base_weights import global_names, local_tensor

    folder = Path(task.model)
    model, weights = open_model(folder, folder)
    tp_rank = parallel_state.get_tensor_model_parallel_rank()
    world = replace(world, tp=task.tp, tp_rank=tp_rank, etp=task.tp, etp_rank=tp_rank)
    table = {parameter.name: parameter for parameter in model_parameters(model.shapes)}
    for chunk in chunks:
        chunk.to(world.device)
        for name, value in global_names(chunk, 0).items():
            if value.numel():
                entry = table.get(name) or table[_table_name(name)]
                value.copy_(local_tensor(entry, value, weights.read, model.shapes, world))
    return chunks


def _table_name(name: str) -> str:
    """The table's name of a parameter: experts have their number after the linear's name there."""
    start, _, end = name.partition(".mlp.experts.")
    if end:
        found = _EXPERT.fullmatch(end)
        assert found is not None, name
        return f"{start}.mlp.experts.{found[2]}.{found[1] or found[4]}.{found[3]}"
    for plain, fused in _PLAIN_NORMS.items():
        if name.endswith(plain):
            return name.removesuffix(plain) + fused
    return name


def _prepare_for_cpu(provider: Any) -> None:
    """For trying the tool out: no fused kernels, and no search for Transformer Engine's layers."""
    from megatron.bridge.peft import utils

    utils.HAVE_TE = False
    for name in (
        "gradient_accumulation_fusion",
        "masked_softmax_fusion",
        "bias_dropout_fusion",
        "bias_activation_fusion",
        "cross_entropy_loss_fusion",
        "apply_rope_fusion",
        "persist_layer_norm",
        "moe_permute_fusion",
        "moe_grouped_gemm",
    ):
        setattr(provider, name, False)


def _lora_hook(rank: int, attention_alone: bool, *, shared: bool) -> Callable[[list[Any]], list[Any]]:
    """shared: experts of a layer have one adapter."""
    from megatron.bridge.peft.lora import LoRA

    peft = LoRA(dim=rank, alpha=rank, dropout=0.0, share_expert_adapters=shared)
    if attention_alone:
        peft.target_modules = ["linear_qkv", "linear_proj"]

    def hook(chunks: list[Any]) -> list[Any]:
        transformed = peft(chunks, training=True)
        peft.set_params_to_save(transformed)
        return transformed

    return hook


def _optimizer(chunks: list[Any], config: Any) -> Any:
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    options = OptimizerConfig(
        optimizer="adam",
        lr=1e-4,
        min_lr=1e-4,
        weight_decay=0.01,
        clip_grad=1.0,
        bf16=config.bf16,
        params_dtype=config.params_dtype,
        use_distributed_optimizer=False,
    )
    optimizer = get_megatron_optimizer(options, chunks, use_gloo_process_groups=False)
    config.grad_scale_func = optimizer.scale_loss
    return optimizer


def _batch(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Tokens, the token after each, which of them count, positions: [rows, length] each."""
    mask = torch.ones_like(ids, dtype=torch.float32)
    mask[:, -1] = 0.0
    positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    return {"tokens": ids, "labels": ids.roll(-1, 1), "mask": mask, "positions": positions}


def _step(task: Task, chunks: list[Any], optimizer: Any, batch: dict[str, torch.Tensor]) -> Callable[[], float]:
    from megatron.core.pipeline_parallel import get_forward_backward_func

    def mean_loss(losses: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        loss = (losses.float() * batch["mask"]).sum() / batch["mask"].sum()
        return loss, {"loss": loss.detach()}

    def forward(batches: Iterator[dict[str, torch.Tensor]], model: Any) -> tuple[torch.Tensor, Any]:
        now = next(batches)
        losses = model(
            input_ids=now["tokens"], position_ids=now["positions"], attention_mask=None, labels=now["labels"]
        )
        return losses, mean_loss

    run = get_forward_backward_func()

    def step() -> float:
        for chunk in chunks:
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        results = run(
            forward_step_func=forward,
            data_iterator=iter([batch]),
            model=chunks,
            num_microbatches=1,
            seq_length=task.length,
            micro_batch_size=task.rows,
            forward_only=False,
        )
        optimizer.step()
        return float(results[0]["loss"])

    return step
