"""What a recipe says about one reward, and how that becomes a callable."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from megatron_lora.errors import UserError
from megatron_lora.rollout.rewards.calling import Arguments, UserReward, score_samples
from megatron_lora.rollout.rewards.dapo_math import dapo_math_match
from megatron_lora.rollout.rewards.functions import (
    Reward,
    exact_match,
    format_match,
    gsm8k_match,
    length_penalty,
    load_math_match,
)
from megatron_lora.rollout.user_code import absolute_path, hint, import_object

KINDS = ("exact", "math", "dapo_math_verify", "gsm8k", "format", "length", "python")
BOUNDED_KINDS = frozenset({"exact", "dapo_math_verify", "gsm8k", "length"})
"""Kinds that take microseconds whatever the text says; they need no worker process and no time limit."""


@dataclass(frozen=True)
class RewardSpec:
    """One entry of `env.reward_functions`, plain data that a worker process can be sent.

    kind: one of KINDS. name: in metrics and messages. weight: factor in the sum. timeout_seconds: of one call.
    pattern (format), max_tokens (length), function and kwargs (python): see the recipe's schema.
    """

    kind: str
    name: str = ""
    weight: float = 1.0
    timeout_seconds: float = 10.0
    pattern: str | None = None
    max_tokens: int | None = None
    function: str | None = None
    kwargs: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_config(cls, entry: Any) -> "RewardSpec":
        """From an object with the same fields, such as the schema's RewardFunctionConfig."""
        values = {name: getattr(entry, name) for name in cls.__dataclass_fields__}
        return cls(**{**values, "name": entry.name or entry.kind, "kwargs": dict(entry.kwargs)})

    def resolved(self) -> "RewardSpec":
        """With a name and with absolute paths, so that it means the same in a process started elsewhere."""
        function = None if self.function is None else absolute_path(self.function)
        return replace(self, name=self.name or self.kind, function=function)


def build_reward(spec: RewardSpec) -> Reward:
    """The callable that `spec` names. Raises UserError where there is none."""
    if spec.kind == "format":
        try:
            return format_match(_needed(spec, "pattern"))
        except re.error as error:
            raise UserError(
                f"env.reward_functions: pattern={spec.pattern!r} of reward '{spec.name}' is no regular expression: "
                f"{error}; mend the pattern"
            ) from error
    if spec.kind == "length":
        return length_penalty(_needed(spec, "max_tokens"))
    if spec.kind == "python":
        return import_reward(_needed(spec, "function"), spec.kwargs, spec.timeout_seconds)
    if spec.kind == "math":
        return load_math_match()
    if spec.kind == "dapo_math_verify":
        return dapo_math_match
    if spec.kind == "exact":
        return exact_match
    if spec.kind == "gsm8k":
        return gsm8k_match
    raise UserError(
        f"env.reward_functions: kind={spec.kind!r} is unknown; use one of {', '.join(KINDS)}{hint(spec.kind, KINDS)}"
    )


def build_scorer(specs: Sequence[RewardSpec]) -> Callable[[tuple[int, list[Arguments]]], Any]:
    """For a worker process: scores the samples of (a reward's number, samples)."""
    rewards = [build_reward(spec) for spec in specs]
    return lambda call: score_samples(rewards[call[0]], call[1])


def import_reward(path: str, kwargs: dict[str, Any], timeout_seconds: float) -> UserReward:
    """A user's function from `package.module:function` or `path/to/file.py:function`, with kwargs bound.

    Raises UserError, with the nearest names, where it cannot be imported or cannot be called as a reward.
    """
    function = import_object(path, "reward function")
    return UserReward(function, path, kwargs, timeout_seconds)


def _needed(spec: RewardSpec, key: str) -> Any:
    value = getattr(spec, key)
    if value is None:
        raise UserError(f"env.reward_functions: reward '{spec.name}' of kind={spec.kind} needs {key}")
    return value
