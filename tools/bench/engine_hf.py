"""transformers, and transformers + peft, as their own training loop runs them: sdpa attention, a bf16 model, the loss
from full logits, fused AdamW, gradient clipping."""

from collections.abc import Callable
from typing import Any

import torch

from tools.bench.random_weights import random_tensor
from tools.bench.task import Task

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def build(task: Task, *, lora: bool, fp32_adapter: bool = True) -> tuple[Callable[[], float], dict[str, Any]]:
    """(one training step that returns its loss, what to report of the model).

    fp32_adapter: peft's default keeps the factors in fp32 and casts activations to them.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    device = torch.device(task.device)
    configuration = AutoConfig.from_pretrained(task.model, trust_remote_code=False)
    with device:
        model: Any = AutoModelForCausalLM.from_config(
            configuration, dtype=task.dtype, attn_implementation="sdpa", trust_remote_code=False
        )
    _fill(model)
    model.config.use_cache = False
    if lora:
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=task.rank, lora_alpha=task.rank, target_modules=TARGETS, task_type="CAUSAL_LM")
        model = get_peft_model(model, config, autocast_adapter_dtype=fp32_adapter)
    model.train()
    ids = task.input_ids(model.config.vocab_size, device)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.01, fused=device.type == "cuda")

    def step() -> float:
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    total = sum(parameter.numel() for parameter in model.parameters())
    return step, {"trainable": sum(parameter.numel() for parameter in parameters), "total": total}


@torch.no_grad()
def _fill(model: torch.nn.Module) -> None:
    for name, parameter in model.named_parameters():
        assert not name.endswith("gate_up_proj"), "experts in one tensor have no values that other engines have as well"
        parameter.copy_(random_tensor(name, tuple(parameter.shape), parameter.dtype, parameter.device))
