"""PPO's critic as both backends have it: the policy's frozen base with a second adapter of the same form, and a value
head on the last hidden states.

It starts where the policy starts: with the same factors, and values near 0. A checkpoint of it is one of an adapter
whose value head is a module that trains whole, under the name that Hugging Face's models with one label give it.
"""

from dataclasses import replace

import torch
from torch import Tensor

from megatron_lora.config.schema import PolicyConfig
from megatron_lora.config.schema_critic import CriticConfig
from megatron_lora.errors import UserError
from megatron_lora.lora.layout import AdapterSpec

VALUE_HEAD = "score"
VALUE_HEAD_WEIGHT = f"{VALUE_HEAD}.weight"


def critic_spec(spec: AdapterSpec) -> AdapterSpec:
    """The policy's adapter without the output layer's, which no value goes through, and the head. Raises UserError
    where nothing is left."""
    modules = [module for module in spec.modules if module.kind != "output_layer"]
    if not modules:
        raise UserError(
            "a critic (grpo.adv_estimator.name=gae) has adapters where the policy has, and the policy's are on the "
            "output layer alone, which a value head takes the place of; adapt linears of the layers too"
        )
    return replace(spec, modules=modules, saved={VALUE_HEAD_WEIGHT: (1, spec.shapes.hidden_size)})


def draw_value_head(hidden_size: int, seed: int) -> Tensor:
    """[1, h] fp32, normal with deviation 1 / (h + 1), so that values begin near 0."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, hidden_size, generator=generator) / (hidden_size + 1)


def critic_policy(policy: PolicyConfig, critic: CriticConfig) -> PolicyConfig:
    """The policy's section with the critic's optimizer in the place of its own."""
    optim = critic.optim
    named = policy.optimizer
    if named is not None:
        changed = {"lr": optim.lr, "weight_decay": optim.weight_decay}
        named = named.model_copy(update={"kwargs": named.kwargs | changed})
    megatron = policy.megatron_cfg
    rates = {"lr": optim.lr, "min_lr": optim.min_lr, "weight_decay": optim.weight_decay, "clip_grad": None}
    optimizer = megatron.optimizer.model_copy(update=rates)
    decay = {"start_weight_decay": optim.weight_decay, "end_weight_decay": optim.weight_decay}
    scheduler = megatron.scheduler.model_copy(update=decay | {"weight_decay_incr_style": "constant"})
    return policy.model_copy(
        update={
            "optimizer": named,
            "max_grad_norm": critic.max_grad_norm,
            "megatron_cfg": megatron.model_copy(update={"optimizer": optimizer, "scheduler": scheduler}),
        }
    )
