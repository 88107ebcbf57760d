"""This project's step, as the SFT trainer calls it: MegatronPolicy.train_step, or DTensorPolicy.train_step."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from tools.bench.measure import measure
from tools.bench.task import Experts, Task


def import_parts() -> None:
    """What `build` would import, which takes longer than all else that it does."""
    from megatron_lora.runtime.cpu import install_cpu_stand_ins
    from megatron_lora.runtime.megatron_core import import_megatron_core
    from megatron_lora.runtime.transformer_engine import import_bridge, prepare_transformer_engine

    import_megatron_core()
    install_cpu_stand_ins()
    prepare_transformer_engine()
    import megatron_lora.policy.megatron.policy  # noqa: F401

    import_bridge()


def build(
    task: Task,
    *,
    lora: bool,
    graphs: str | None = None,
    experts: Experts | None = None,
    fp8: bool = False,
    adapters_on: bool = True,
    recomputed: list[str] | None = None,
) -> tuple[Callable[[], float], dict[str, Any]]:
    """(one training step that returns its loss, what to report of the model). graphs: `cuda_graph_impl`. fp8: the base
    in FP8. adapters_on: False: the base's own products and their input gradients alone, down to the first layer's.
    recomputed: `recompute_adapter_inputs`, None for its default."""
    from megatron_lora.config.schema import PolicyConfig
    from megatron_lora.runtime.world import init_megatron_world

    settings = _policy(task, lora)
    settings["megatron_cfg"] |= {"cuda_graph_impl": graphs, "fp8_cfg": {"enabled": fp8}}
    if recomputed is not None:
        settings["megatron_cfg"]["recompute_adapter_inputs"] = recomputed
    if experts is not None:
        targets = ["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"]
        settings["megatron_cfg"]["peft"] |= {"target_modules": targets, "share_expert_adapters": experts == "shared"}
    config = PolicyConfig(**settings)
    world = init_megatron_world(config, 0)
    from megatron_lora.policy.megatron.policy import MegatronPolicy

    policy = MegatronPolicy(config, world, pad_token_id=0, seed=0, num_steps=1000)
    if not adapters_on:
        _leave_base_alone(policy)
    step = _step(policy, task, policy.base.shapes.vocab_size)
    trainable, total = policy.trainable_parameters()
    return step, {"trainable": trainable, "total": total, "chunk": task.chunk, "policy": policy}


def _leave_base_alone(policy: Any) -> None:
    """Adapters off, and gradients asked for down to the embedding all the same."""
    for linear in policy.adapted:
        linear.enabled = False
    policy.base.chunks[0].embedding.register_forward_hook(lambda module, given, out: out.requires_grad_())
    # No adapter has a gradient.
    policy._gradients_checked = True


def build_dtensor(task: Task, *, fused: bool = True, **options: Any) -> tuple[Callable[[], float], dict[str, Any]]:
    """The same on the DTensor backend. fused: `lora_cfg.use_triton`. options: further keys of `policy.dtensor_cfg`."""
    from megatron_lora.config.schema import PolicyConfig
    from megatron_lora.runtime.world import init_dtensor_world

    lora = {"enabled": True, "dim": task.rank, "alpha": task.rank, "use_triton": fused}
    settings = _policy(task, lora=True)
    settings["megatron_cfg"]["enabled"] = False
    settings["dtensor_cfg"] = {"lora_cfg": lora, **options}
    config = PolicyConfig(**settings)
    world = init_dtensor_world(config, 0)
    from megatron_lora.policy.dtensor.policy import DTensorPolicy

    policy = DTensorPolicy(config, world, pad_token_id=0, seed=0, num_steps=1000)
    trainable, total = policy.trainable_parameters()
    return _step(policy, task, policy.base.shapes.vocab_size), {"trainable": trainable, "total": total}


def _step(policy: Any, task: Task, vocab_size: int) -> Callable[[], float]:
    return training_step(policy, task.input_ids(vocab_size))


def training_step(policy: Any, ids: torch.Tensor) -> Callable[[], float]:
    """One training step over ids [rows, length] that returns its loss; every token but the first is a target."""
    from megatron_lora.data.batch import Row
    from megatron_lora.objectives.sft import SFTObjective

    every_token = torch.arange(ids.shape[1]) > 0
    groups = [[Row(input_ids=row, target_mask=every_token, index=index + 1)] for index, row in enumerate(ids)]
    objective = SFTObjective()
    return lambda: policy.train_step(groups, objective).loss


def sweep_chunks(step: Callable[[], float], policy: Any, task: Task) -> dict[str, dict[str, Any]]:
    """Measure again with other chunk sizes of the head."""
    results = {}
    for chunk in task.sweep:
        policy.engine.head = replace(policy.engine.head, chunk_size=chunk)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        results[str(chunk)] = measure(step, task.tokens, warmup=2, steps=max(3, task.steps // 2))
    return results


def _policy(task: Task, lora: bool) -> dict[str, Any]:
    return {
        "model_name": task.model,
        "precision": "bfloat16" if task.dtype == torch.bfloat16 else "float32",
        "train_global_batch_size": task.rows,
        "train_micro_batch_size": task.rows // task.micro_batches,
        "max_total_sequence_length": task.length,
        "megatron_cfg": {
            "enabled": True,
            "tensor_model_parallel_size": task.tp,
            "sequence_parallel": task.sp,
            "pipeline_model_parallel_size": task.pp,
            "context_parallel_size": task.cp,
            "activation_checkpointing": task.recompute,
            "use_fused_linear_logprobs": True,
            "fused_linear_logprobs_chunk_size": task.chunk,
            "peft": {"enabled": lora, "dim": task.rank, "alpha": task.rank},
            "optimizer": {"lr": 1e-4},
        },
    }
