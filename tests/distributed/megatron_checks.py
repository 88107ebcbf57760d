"""What a worker can be asked about a Megatron policy alone: logits, starting values in every layout."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from megatron_lora.policy.frozen_head import cap_logits
from megatron_lora.policy.megatron.adapter_gather import gather_adapter
from megatron_lora.policy.megatron.policy import MegatronPolicy
from tests.distributed.cases import scored_rows
from tests.distributed.megatron_build import build_policy


def logits(case: dict[str, Any]) -> dict[str, Any]:
    """The base's logits [T, vocabulary] (last stage), and log-probabilities by the plain and by the chunked path."""
    policy = build_policy(case)
    kept: list[Tensor] = []
    head = getattr(policy.base.chunks[-1], "output_layer", None)
    if policy.base.has_last_stage:
        assert head is not None
        # A copy: the log-probabilities are computed in place.
        hook = head.register_forward_hook(lambda module, args, out: kept.append(out[0].detach().squeeze(1).clone()))
    chunked = policy.engine.head
    policy.engine.head = replace(chunked, chunk_size=0)
    rows = scored_rows()
    plain = [policy.score([row])[0] for row in rows]
    if kept:
        hook.remove()
    policy.engine.head = chunked
    found: dict[str, Any] = {"plain": plain, "chunked": policy.score(rows)}
    with policy.adapters_disabled():
        found["without_adapter"] = policy.score(rows)
    with policy.sampling(0.7):
        found["temperature"] = policy.score(rows)
    with policy.sampling(0.7, top_k=30, top_p=0.6):
        found["cut"] = policy.score(rows)
        policy.engine.head = replace(policy.engine.head, chunk_size=0)
        found["cut_plain"] = policy.score(rows)
    found["logits"] = [cap_logits(_whole_vocabulary(policy, piece), policy.base.softcap) for piece in kept]
    found["trainable"] = policy.trainable_parameters()
    return found


def _whole_vocabulary(policy: MegatronPolicy, shard: Tensor) -> Tensor:
    pieces = [torch.empty_like(shard) for _ in range(policy.tp.size)]
    torch.distributed.all_gather(pieces, shard.contiguous(), group=policy.tp.group)
    return torch.cat(pieces, 1)


def start(case: dict[str, Any]) -> dict[str, Any]:
    """The whole factors that a policy starts with, under Megatron's names, for each pair of init methods."""
    found = {}
    for a_method, b_method in case["options"]["methods"]:
        peft = case["megatron"].get("peft", {}) | {"lora_A_init_method": a_method, "lora_B_init_method": b_method}
        policy = build_policy(case, case["megatron"] | {"peft": peft})
        assert policy.spec is not None
        found[f"{a_method}, {b_method}"] = gather_adapter(policy.adapted, policy.spec)
    return found


CHECKS = {"logits": logits, "start": start}
