"""Rewards and environments: `env`."""

from typing import Literal, Self

from pydantic import Field, model_validator

from megatron_lora.config.schema_base import Float, KeywordArguments, PositiveFloat, PositiveInt, Section

RewardKind = Literal["exact", "math", "dapo_math_verify", "gsm8k", "format", "length", "python"]
# Kinds that compare an answer with the row's reference.
REFERENCE_KINDS = frozenset({"exact", "math", "dapo_math_verify", "gsm8k"})
# `reward_<name>` is a metric; these are others.
_TAKEN_NAMES = frozenset({"std", "errors", "seconds"})
_NEEDED = {"format": "pattern", "length": "max_tokens", "python": "function"}


class RewardFunctionConfig(Section):
    """One entry of `env.reward_functions`. A sample's reward is the weighted sum over the entries."""

    kind: RewardKind = Field(
        description="`exact`: the answer is the reference; `math`: symbolically equal (math-verify); "
        "`dapo_math_verify`: DAPO's check of the text after `Answer:`; `gsm8k`: the number after the last `####`; "
        "`format`: `pattern` matches; `length`: penalty beyond `max_tokens`; `python`: `function`."
    )
    name: str | None = Field(default=None, description="Name in the metrics; null: `kind`.")
    weight: Float = Field(default=1.0, description="Factor of this reward in the sum.")
    timeout_seconds: PositiveFloat = Field(
        default=10.0,
        le=86_400,
        description="A call that takes longer gives 0 and is counted; a whole batch may be one call.",
    )
    pattern: str | None = Field(
        default=None, description="`format`: regular expression that the whole answer has to match."
    )
    max_tokens: PositiveInt | None = Field(default=None, description="`length`: tokens that cost nothing.")
    function: str | None = Field(
        default=None, description="`python`: import path `package.module:function` or `path/file.py:function`."
    )
    kwargs: KeywordArguments = Field(default_factory=dict, description="`python`: further arguments of the function.")

    @model_validator(mode="after")
    def _check(self) -> Self:
        needed = _NEEDED.get(self.kind)
        if needed is not None and getattr(self, needed) is None:
            raise ValueError(f"kind={self.kind} needs {needed}")
        for kind, key in _NEEDED.items():
            if kind != self.kind and getattr(self, key) is not None:
                raise ValueError(f"{key} belongs to kind={kind}, not to kind={self.kind}")
        if self.kwargs and self.kind != "python":
            raise ValueError(f"kwargs belongs to kind=python, not to kind={self.kind}")
        self.name = self.name or self.kind
        if self.name in _TAKEN_NAMES:
            raise ValueError(f"name={self.name} would hide the metric reward_{self.name}; give it another")
        return self

    @property
    def needs_reference(self) -> bool:
        """Whether the reward compares with a row's reference answer, so that a row without one cannot be rewarded."""
        return self.kind in REFERENCE_KINDS


class MathEnvConfig(Section):
    """`env.math`."""

    num_workers: PositiveInt = Field(default=8, description="Processes that compute rewards, at most.")
    math_verify_impl: Literal["hf_math_verify", "dapo_math_verify"] | None = Field(
        default=None,
        description="What a reward of kind `math` is: math-verify (also null), or the kind `dapo_math_verify`.",
    )


class EnvironmentConfig(Section):
    """`env.environment`: the user's class that answers what the model wrote, turn by turn (docs/environments.md)."""

    path: str = Field(description="The class: `package.module:Class` or `path/file.py:Class`.")
    kwargs: KeywordArguments = Field(default_factory=dict, description="Arguments that it is built with.")
    timeout_seconds: PositiveFloat = Field(
        default=10.0, le=86_400, description="A step that takes longer ends its answer and is counted."
    )
    max_result_tokens: PositiveInt = Field(
        default=256, description="Tokens of what it answers in a turn, at most; the rest is cut off."
    )


def _math_reward() -> list[RewardFunctionConfig]:
    return [RewardFunctionConfig(kind="math")]


class EnvConfig(Section):
    """`env`: where GRPO's rewards come from, and what answers the model between turns."""

    math: MathEnvConfig = Field(default_factory=MathEnvConfig, description="NeMo RL's math environment.")
    environment: EnvironmentConfig | None = Field(
        default=None, description="Answers of several turns (`grpo.max_rollout_turns`); null: one turn."
    )
    reward_functions: list[RewardFunctionConfig] = Field(
        default_factory=_math_reward, min_length=1, description="Rewards that are added up."
    )

    @model_validator(mode="after")
    def _distinct_names(self) -> Self:
        names = [reward.name for reward in self.reward_functions]
        if len(set(names)) < len(names):
            raise ValueError(f"reward_functions have the names {names}; give each its own `name`")
        if not any(reward.weight for reward in self.reward_functions):
            raise ValueError("every weight of reward_functions is 0, so no answer is better than another; raise one")
        return self
