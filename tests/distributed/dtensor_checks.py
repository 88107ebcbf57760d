"""What a worker can be asked about a DTensor policy alone: scores in every form, dropout."""

from dataclasses import replace
from typing import Any

import torch

from megatron_lora.data.batch import Row
from megatron_lora.objectives.sft import SFTObjective
from megatron_lora.policy.dtensor import optim
from megatron_lora.policy.dtensor.policy import DTensorPolicy
from megatron_lora.policy.interface import NonFiniteLoss
from tests.distributed.cases import scored_rows, training_rows
from tests.distributed.dtensor_build import build_policy
from tests.distributed.policy_checks import train_steps


def scores(case: dict[str, Any]) -> dict[str, Any]:
    policy = build_policy(case)
    rows = scored_rows()
    adapted = policy.score(rows)
    with policy.adapters_disabled():
        base = policy.score(rows)
    with policy.sampling(0.5):
        sharp = policy.score(rows)
    with policy.sampling(0.5, top_k=30, top_p=0.6):
        cut = policy.score(rows)
    loss, _ = policy.evaluate([[row] for row in rows], SFTObjective())
    merged = dict(policy.hf_weights())
    again = policy.score(rows)
    found = {"adapted": adapted, "base": base, "sharp": sharp, "cut": cut, "again": again, "merged": merged}
    prompt = rows[0].input_ids[:5].tolist()
    answer = policy.most_likely(prompt, 9, ())
    found |= {"answer": answer, "ended": policy.most_likely(prompt, 9, answer[3:4])}
    return found | {"loss": loss, "poisoned": poisoned(policy, rows)}


def poisoned(policy: DTensorPolicy, rows: list[Row]) -> str:
    """What is said where the model's numbers are none."""
    weight = optim.local_part(policy.base.hf.model.norm.weight.detach())
    before = weight.clone()
    try:
        weight.fill_(float("nan"))
        policy.score([replace(row, index=5 + number) for number, row in enumerate(rows)])
    except NonFiniteLoss as failure:
        return str(failure)
    finally:
        weight.copy_(before)
    return ""


def dropout(case: dict[str, Any]) -> dict[str, Any]:
    """The same three steps, kept and recomputed; the loss without dropout."""
    kept = build_policy(case)
    recomputed = build_policy(case, case["dtensor"] | {"activation_checkpointing": True})
    result: dict[str, Any] = {}
    for name, policy in (("kept", kept), ("recomputed", recomputed)):
        torch.manual_seed(5 + policy.world.dp_rank)
        result[name] = train_steps(policy, training_rows(3)) | {"adapter": policy.adapter().tensors}
    groups = [[row] for row in training_rows(1, first=3)[0]]
    result["evaluated"] = [kept.evaluate(groups, SFTObjective())[0] for _ in range(2)]
    result["trained"] = [kept.train_step(groups, SFTObjective()).loss]
    return result


CHECKS = {"scores": scores, "dropout": dropout}
