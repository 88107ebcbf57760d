"""What a worker can be asked about router replay."""

from typing import Any

from megatron_lora.data.batch import Row
from tests.distributed.build import build_policy
from tests.distributed.cases import scored_rows, training_rows
from tests.distributed.policy_checks import train_steps
from tests.support.forced_experts import routed_at_random
from tests.support.models import SIZES, family_config


def routed(rows: list[Row], seed: int) -> list[Row]:
    config: Any = family_config("qwen3_moe")
    return routed_at_random(rows, SIZES["num_hidden_layers"], config.num_experts, config.num_experts_per_tok, seed)


def routed_steps(num_steps: int) -> list[list[Row]]:
    """Training rows whose experts a rollout engine named: at random, so that hardly one is the trainer's."""
    return [routed(rows, seed) for seed, rows in enumerate(training_rows(num_steps))]


def replay(case: dict[str, Any]) -> dict[str, Any]:
    """Log-probabilities at the experts that rows name, at others, and at the model's own; then training steps."""
    policy = build_policy(case)
    rows = scored_rows()
    found: dict[str, Any] = {f"scores_{seed}": policy.score(routed(rows, seed)) for seed in (50, 51)}
    found["own"] = policy.score(rows)
    return (
        found
        | train_steps(policy, routed_steps(case["options"]["steps"]))
        | {"adapter": policy.adapter("packed").tensors}
    )


CHECKS = {"replay": replay}
