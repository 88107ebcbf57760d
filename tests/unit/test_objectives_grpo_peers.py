"""Numbers of NeMo RL's, verl's and TRL's own tests: losses of three tokens, and KL estimates."""

import math
from typing import Any

import pytest
import torch
from objective_batches import make_row, mean_loss_and_grads

from megatron_lora.objectives.grpo import GRPOObjective
from megatron_lora.objectives.grpo_config import GRPOConfig
from megatron_lora.objectives.kl import kl_estimate

RATIOS, ADVANTAGES = (0.5, 1.0, 1.5), (1.0, -1.0, 2.0)
# name -> (ratios, advantages, keys of loss_fn, the mean loss)
LOSSES: dict[str, tuple[tuple[float, ...], tuple[float, ...], dict[str, Any], float]] = {
    "clipped": (RATIOS, ADVANTAGES, {}, -0.6333),
    "forced on-policy": (RATIOS, ADVANTAGES, {"force_on_policy_ratio": True}, -0.6667),
    "dual clip": ((0.5, 1.0, 10.0), (1.0, -1.0, -4.0), {"ratio_clip_c": 3.0}, 4.1667),
    "GSPO": (
        RATIOS,
        ADVANTAGES,
        {"sequence_level_importance_ratios": True, "token_level_loss": False},
        -0.6057,
    ),
}


def loss(policy: list[float], old: list[float], advantages: tuple[float, ...], keys: dict[str, Any]) -> float:
    fields = {"policy": policy, "old_logps": old, "advantages": list(advantages)}
    tensors = {name: torch.tensor(value, dtype=torch.float64) for name, value in fields.items()}
    row = make_row(5, 3, policy=tensors["policy"], old_logps=tensors["old_logps"], advantages=tensors["advantages"])
    config = GRPOConfig(reference_policy_kl_penalty=0.0, **keys)
    return mean_loss_and_grads(GRPOObjective(config), [[row]])[0]


@pytest.mark.parametrize("name", LOSSES)
def test_policy_loss(name: str) -> None:
    ratios, advantages, keys, wanted = LOSSES[name]
    old = [-1.0, -1.0, -3.0]
    policy = [value + math.log(ratio) for value, ratio in zip(old, ratios, strict=True)]
    assert loss(policy, old, advantages, keys) == pytest.approx(wanted, abs=5e-5)


def test_reinforce() -> None:
    found = loss([-0.5, -1.0, -1.5], [-1.0] * 3, ADVANTAGES, {"disable_ppo_ratio": True})
    assert found == pytest.approx(0.8333, abs=5e-5)


def test_k3() -> None:
    zero = torch.zeros(3, dtype=torch.float64)

    def k3(*log_ratios: float) -> torch.Tensor:
        return kl_estimate(zero[: len(log_ratios)], torch.tensor(log_ratios, dtype=torch.float64), "k3")

    assert k3(2.0, 1.0).tolist() == pytest.approx([4.389056, 0.718282], abs=1e-6)
    assert float(k3(-1.0, 0.0, 1.0).mean()) == pytest.approx(0.362, abs=5e-4)
