"""Rewards: from a prompt and its completion to a number.

A `Reward` is any callable `(prompt: str, completion: str, answer: str, extra: dict) -> float`. A `RewardSpec` names
one, built in or a user's; a `RewardRunner` scores batches with several of them, in worker processes where a call could
hang.
Nothing here imports torch, so a worker process starts quickly.
"""

from megatron_lora.rollout.rewards.functions import Reward
from megatron_lora.rollout.rewards.runner import RewardOutcome, RewardRunner, RewardSample
from megatron_lora.rollout.rewards.spec import RewardSpec, build_reward

__all__ = ["Reward", "RewardOutcome", "RewardRunner", "RewardSample", "RewardSpec", "build_reward"]
