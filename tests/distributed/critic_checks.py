"""What a worker can be asked about a policy and its critic, on either backend."""

from pathlib import Path
from typing import Any

import torch

from megatron_lora.conversion.adapter_checkpoint import read_adapter
from megatron_lora.lora.peft_format import to_hf
from megatron_lora.objectives.sft import SFTObjective
from megatron_lora.objectives.value import ValueObjective
from megatron_lora.policy.interface import Policy
from tests.distributed.build import build_policy
from tests.distributed.cases import scored_rows, training_rows
from tests.support.critic import CLIP, with_values

NUM_STEPS, HALF = 6, 3


def critic(case: dict[str, Any]) -> dict[str, Any]:
    """Steps of policy and critic in turn, a checkpoint of both in the middle; then policies that go on from it.

    options.layouts: name -> the backend's keys of each policy that loads.
    """
    saved, end = (Path(case["shared_folder"]) / f"{case['name']}_{name}" for name in ("half", "end"))
    policy = build_policy(case)
    found: dict[str, Any] = {"whole": _train(policy, 0, saved), "trainable": _trainable(policy), "continued": {}}
    _save(policy, end)
    spec, factors = read_adapter(end / "critic" / "weights")
    found["critic"] = to_hf(spec, factors)[1]
    for name, keys in case["options"]["layouts"].items():
        again = build_policy(case, keys, seed=99)
        _load(again, saved)
        found["continued"][name] = _train(again, HALF)
    return found


def _train(policy: Policy, first: int, saved: Path | None = None) -> dict[str, Any]:
    assert policy.critic is not None
    found: dict[str, Any] = {"losses": [], "grad_norms": [], "value_losses": [], "value_norms": [], "metrics": []}
    for step, rows in list(enumerate(training_rows(NUM_STEPS)))[first:]:
        if step == HALF and saved is not None:
            _save(policy, saved)
        result = policy.train_step([[row] for row in rows], SFTObjective())
        found["losses"].append(result.loss)
        found["grad_norms"].append(result.grad_norm)
        groups = [[row] for row in with_values(rows, step)]
        result = policy.critic.train_step(groups, ValueObjective(CLIP))
        found["value_losses"].append(result.loss)
        found["value_norms"].append(result.grad_norm)
        found["metrics"].append(result.metrics)
    found["scores"] = policy.score(scored_rows())
    found["values"] = policy.critic.score(scored_rows())
    found["adapter"] = policy.adapter("packed").tensors
    # Asked again: the policy is as it was before its critic was asked.
    assert all(torch.equal(a, b) for a, b in zip(found["scores"], policy.score(scored_rows()), strict=True))
    return found


def _trainable(policy: Policy) -> tuple[tuple[int, int], tuple[int, int]]:
    assert policy.critic is not None
    return policy.trainable_parameters(), policy.critic.trainable_parameters()


def _save(policy: Policy, folder: Path) -> None:
    assert policy.critic is not None
    policy.save(folder / "policy" / "weights", folder / "policy" / "optimizer")
    policy.critic.save(folder / "critic" / "weights", folder / "critic" / "optimizer")


def _load(policy: Policy, folder: Path) -> None:
    assert policy.critic is not None
    policy.load(folder / "policy" / "weights", folder / "policy" / "optimizer")
    policy.critic.load(folder / "critic" / "weights", folder / "critic" / "optimizer")


CHECKS = {"critic": critic}
