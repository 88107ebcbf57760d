"""This project's step: MegatronPolicy.train_step, as the SFT trainer calls it."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from tools.bench.measure import measure
from tools.bench.task import Task


def build(task: Task, *, lora: bool) -> tuple[Callable[[], float], dict[str, Any]]:
    """(one training step that returns its loss, what to report of the model)."""
    from megatron_lora.config.schema import PolicyConfig
    from megatron_lora.data.batch import Row
    from megatron_lora.objectives.sft import SFTObjective
    from megatron_lora.runtime.world import init_megatron_world

    config = PolicyConfig(**_policy(task, lora))
    world = init_megatron_world(config, 0)
    from megatron_lora.policy.megatron.policy import MegatronPolicy

    policy = MegatronPolicy(config, world, pad_token_id=0, seed=0, num_steps=1000)
    ids = task.input_ids(policy.base.shapes.vocab_size)
    every_token = torch.arange(task.length) > 0
    groups = [[Row(input_ids=row, target_mask=every_token, index=index + 1)] for index, row in enumerate(ids)]
    objective = SFTObjective()

    def step() -> float:
        return policy.train_step(groups, objective).loss

    trainable, total = policy.trainable_parameters()
    return step, {"trainable": trainable, "total": total, "chunk": task.chunk, "policy": policy}


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
        "train_micro_batch_size": task.rows,
        "max_total_sequence_length": task.length,
        "megatron_cfg": {
            "enabled": True,
            "tensor_model_parallel_size": task.tp,
            "sequence_parallel": task.sp,
            "use_fused_linear_logprobs": True,
            "fused_linear_logprobs_chunk_size": task.chunk,
            "peft": {"enabled": lora, "dim": task.rank, "alpha": task.rank},
            "optimizer": {"lr": 1e-4},
        },
    }
