"""From answers to rows: rewards, shaping, what the optimizer is given, and what the log says of them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_lora.config.schema_algorithms import GrpoConfig
from megatron_lora.data.batch import Row
from megatron_lora.data.dataset import Prompt
from megatron_lora.objectives.reward_shaping import scale_rewards, soft_overlong_penalty, stop_properly_penalty
from megatron_lora.rollout.generator import Sample
from megatron_lora.rollout.rewards import RewardOutcome, RewardRunner, RewardSample
from megatron_lora.runtime.agreement import from_first_rank
from megatron_lora.runtime.world import World


@dataclass
class Group:
    """A prompt, its answers and their rewards."""

    prompt: Prompt
    samples: list[Sample]
    outcomes: list[RewardOutcome]

    @property
    def rewards(self) -> list[float]:
        """Each answer's weighted sum of rewards, before any shaping; NaN where every reward abstained."""
        return [math.nan if outcome.total is None else outcome.total for outcome in self.outcomes]


def reward_answers(
    runner: RewardRunner, prompts: Sequence[Prompt], answers: Sequence[list[Sample]], world: World
) -> list[Group]:
    """Score every answer. One rank does, because a user's reward may be slow or draw random numbers. Collective: what
    keeps it from scoring is raised on every rank, as a UserError."""
    pairs = zip(prompts, answers, strict=True)
    found = from_first_rank(
        world, lambda: runner([_reward_sample(prompt, sample) for prompt, samples in pairs for sample in samples])
    )
    outcomes = iter(found)
    return [
        Group(prompt, samples, [next(outcomes) for _ in samples])
        for prompt, samples in zip(prompts, answers, strict=True)
    ]


def _reward_sample(prompt: Prompt, sample: Sample) -> RewardSample:
    extra = prompt.extra | {"num_tokens": len(sample.completion_ids)}
    if sample.sampled is not None:
        extra |= {"final_turn": sample.final_turn, "num_turns": sample.num_turns}
    return RewardSample(prompt.text, sample.text, prompt.answer, extra)


def raw_rewards(groups: Sequence[Group]) -> Tensor:
    """[groups, generations] fp64, NaN where every reward abstained."""
    return torch.tensor([group.rewards for group in groups], dtype=torch.float64)


def shaped_rewards(groups: Sequence[Group], grpo: GrpoConfig) -> Tensor:
    """[groups, generations]: scaled, then penalised for length, as `grpo` says."""
    rewards, scaling, shaping = raw_rewards(groups), grpo.reward_scaling, grpo.reward_shaping
    if scaling.enabled:
        rewards = scale_rewards(rewards, scaling.source_min, scaling.source_max, scaling.target_min, scaling.target_max)
    if not shaping.enabled:
        return rewards
    if shaping.stop_properly_penalty_coef is not None:
        truncated = torch.tensor([[is_truncated(sample) for sample in group.samples] for group in groups])
        return stop_properly_penalty(rewards, truncated, shaping.stop_properly_penalty_coef)
    assert shaping.max_response_length is not None
    lengths = torch.tensor([[len(sample.completion_ids) for sample in group.samples] for group in groups])
    return rewards + soft_overlong_penalty(
        lengths, shaping.max_response_length, shaping.overlong_buffer_length, shaping.overlong_buffer_penalty
    )


def is_truncated(sample: Sample) -> bool:
    return sample.finish_reason == "length"


def build_rows(groups: Sequence[Group], advantages: Tensor) -> list[Row]:
    """A row an answer, group by group: loss on the tokens that the model drew, with the token fields "advantages" and
    "rollout_logps" and the row field "reward". advantages: [groups, generations]."""
    rows = []
    for group, values in zip(groups, advantages.tolist(), strict=True):
        for sample, reward, advantage in zip(group.samples, group.rewards, values, strict=True):
            prompt_length, size = len(sample.prompt_ids), len(sample.completion_ids)
            length = prompt_length + size
            rows.append(
                Row(
                    input_ids=torch.tensor(sample.prompt_ids + sample.completion_ids),
                    target_mask=torch.cat([torch.zeros(prompt_length, dtype=torch.bool), sample.sampled_mask]),
                    index=group.prompt.index,
                    token_fields={
                        "advantages": torch.full((length,), advantage),
                        "rollout_logps": torch.cat([torch.zeros(prompt_length), sample.logprobs]),
                    },
                    row_fields={"reward": 0.0 if math.isnan(reward) else reward},
                    routed_experts=sample.routed_experts,
                )
            )
    return rows


def describe_groups(groups: Sequence[Group]) -> dict[str, float]:
    """Means over all answers for the log: rewards (over those that were given one), lengths, what ended them."""
    samples = [sample for group in groups for sample in group.samples]
    outcomes = [outcome for group in groups for outcome in group.outcomes]
    given = torch.tensor([outcome.total for outcome in outcomes if outcome.total is not None], dtype=torch.float64)
    values = {
        "reward": float(given.mean()) if len(given) else 0.0,
        "reward_std": float(given.std(correction=0)) if len(given) else 0.0,
        "reward_errors": sum(len(outcome.errors) for outcome in outcomes),
        "unrewarded": len(outcomes) - len(given),
        "response_length": sum(len(sample.completion_ids) for sample in samples) / len(samples),
        "truncated_share": sum(map(is_truncated, samples)) / len(samples),
    }
    if samples[0].sampled is not None:
        values |= {
            "num_turns": sum(sample.num_turns for sample in samples) / len(samples),
            "environment_errors": sum(bool(sample.environment_error) for sample in samples),
            "environment_tokens": sum(int((~sample.sampled_mask).sum()) for sample in samples) / len(samples),
        }
    for name in outcomes[0].values:
        numbers = [value for outcome in outcomes if (value := outcome.values[name]) is not None]
        if numbers:
            values[f"reward_{name}"] = sum(numbers) / len(numbers)
    return values


def num_generated(groups: Sequence[Group]) -> int:
    """Tokens that the model drew."""
    return sum(int(sample.sampled_mask.sum()) for group in groups for sample in group.samples)


def sample_table(groups: Sequence[Group], count: int) -> list[tuple[Any, ...]]:
    """(prompt, answer, reference answer, reward, tokens) of the first answer to each of the first prompts."""
    return [
        (
            group.prompt.text,
            group.samples[0].text,
            group.prompt.answer,
            float(group.rewards[0]),
            len(group.samples[0].completion_ids),
        )
        for group in groups[:count]
    ]
