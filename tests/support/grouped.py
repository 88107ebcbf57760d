"""What a policy of either backend makes of rows that begin alike, in groups and in pairs."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron_lora.data.batch import Row
from megatron_lora.objectives.dpo import DPOConfig, DPOObjective
from megatron_lora.objectives.grpo import GRPOObjective
from megatron_lora.objectives.grpo_config import GRPOConfig
from megatron_lora.policy.interface import Policy, StepResult
from megatron_lora.trainers.dpo import with_reference
from megatron_lora.trainers.rollout_scores import OLD, with_scores
from tests.support.compare import largest_difference, relative_differences
from tests.support.models import SIZES


def make_answers(num_prompts: int, num_answers: int, seed: int, scale: int = 1) -> list[Row]:
    """Rows in groups that begin with one prompt, answers of different lengths carrying loss and random advantages."""
    vocab_size = SIZES["vocab_size"]
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for prompt_number in range(num_prompts):
        prompt = torch.randint(3, vocab_size, (scale * (5 + 4 * prompt_number),), generator=generator)
        for _ in range(num_answers):
            length = int(torch.randint(1, 12 * scale, (1,), generator=generator))
            ids = torch.cat([prompt, torch.randint(3, vocab_size, (length,), generator=generator)])
            mask = torch.arange(len(ids)) >= len(prompt)
            fields = {
                "advantages": torch.randn(1, generator=generator).expand(len(ids)),
                "rollout_logps": torch.randn(len(ids), generator=generator) / 4 - 4.5,
            }
            rows.append(Row(ids, mask, index=len(rows), token_fields=fields))
    return rows


def grouped_numbers(policy: Policy, *, ahead: bool, scale: int = 1) -> dict[str, Any]:
    """Two rollouts of two GRPO updates each, and a DPO evaluation and update.

    ahead: the old policy is scored before the updates, and the first update's ratio is to those numbers; otherwise that
    update takes them from its own forward pass. scale: how long rows are; 1 for prompts of 5 to 13 tokens.
    """
    config = GRPOConfig(
        reference_policy_kl_penalty=0.1,
        use_importance_sampling_correction=True,
        truncated_importance_sampling_type="tis",
        truncated_importance_sampling_ratio=2.0,
    )
    results: list[StepResult] = []
    old: list[torch.Tensor] = []
    for seed in range(2):
        rows = make_answers(3, 4, seed, scale)
        with policy.sampling(0.8):
            rows = with_scores(policy, rows, old_from=0 if ahead else 6, reference=True)
            for first in (0, 6):
                part = rows[first : first + 6]
                objective = GRPOObjective(config, on_policy=first == 0 and not ahead)
                result = policy.train_step([[row] for row in part], objective, keep_logps=True)
                assert result.logps is not None
                known = result.logps if "old_logps" not in part[0].token_fields else [r.token_fields[OLD] for r in part]
                old += [values[row.target_mask] for values, row in zip(known, part, strict=True)]
                results.append(result)
    grpo_tokens = policy.model_tokens
    rows = [replace(row, token_fields={}) for row in make_answers(3, 4, 0, scale)]
    pairs = with_reference(policy, [[rows[n], rows[n + 1]] for n in range(0, len(rows), 2)])
    evaluated = policy.evaluate(pairs, DPOObjective(DPOConfig()))[0]
    results.append(policy.train_step(pairs, DPOObjective(DPOConfig())))
    return {
        "grpo_tokens": grpo_tokens,
        "evaluated": evaluated,
        "old": torch.cat(old),
        "first": sum(len(values) for values in old[:6]),
        "losses": [result.loss for result in results],
        "grad_norms": [result.grad_norm for result in results],
        "metrics": [result.metrics for result in results],
        "adapter": policy.adapter().tensors,
    }


def assert_same_numbers(shared: Mapping[str, Any], whole: Mapping[str, Any]) -> None:
    """`grouped_numbers` with what rows share read once and old log-probabilities from the update, against every row
    whole and scored ahead, in fp32."""
    assert shared["grpo_tokens"] < 0.6 * whole["grpo_tokens"]
    # Exact as long as the weights are the same. AdamW then divides gradients by their size, which carries the rounding
    # of those near zero into full steps.
    torch.testing.assert_close(shared["old"][: shared["first"]], whole["old"][: whole["first"]], rtol=1e-6, atol=3e-6)
    torch.testing.assert_close(shared["old"], whole["old"], rtol=1e-3, atol=1e-3)
    for name in ("losses", "grad_norms"):
        differences = relative_differences(shared[name], whole[name])
        assert differences[0] < 1e-5 and max(differences) < 1e-3, (name, differences)
    assert abs(shared["evaluated"] - whole["evaluated"]) < 1e-4
    for number, (ours, wanted) in enumerate(zip(shared["metrics"], whole["metrics"], strict=True)):
        assert ours == pytest.approx(wanted, rel=1e-2 if number else 1e-4, abs=1e-3 if number else 1e-5)
    assert largest_difference(shared["adapter"], whole["adapter"]) < 1e-3
