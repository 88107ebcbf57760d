"""PPO's critic: `critic`."""

from typing import Self

from pydantic import Field, model_validator

from megatron_lora.config.schema_base import Int, NonNegativeFloat, PositiveFloat, Section


class CriticOptimizerConfig(Section):
    """`critic.optim`."""

    lr: PositiveFloat = Field(description="Highest learning rate; often above the policy's.")
    min_lr: NonNegativeFloat = Field(default=0.0, description="Learning rate that a decaying schedule ends at.")
    weight_decay: NonNegativeFloat = Field(default=0.01, description="Weight decay.")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr={self.min_lr} is above lr={self.lr}; lower min_lr or raise lr")
        return self


class CriticConfig(Section):
    """`critic`: PPO's value function, an adapter of its own on the policy's frozen base and a value head. Whatever
    these keys do not say (adapter, batches, layout, betas, schedule) is the policy's."""

    optim: CriticOptimizerConfig = Field(description="Optimizer.")
    max_grad_norm: NonNegativeFloat | None = Field(
        default=1.0, description="Largest gradient norm; null or 0: no clipping."
    )
    cliprange_value: PositiveFloat | None = Field(
        default=0.5,
        description="A value that has moved by more than this since the rollout gains nothing by it; null: the plain "
        "squared error.",
    )
    warmup_steps: Int = Field(
        default=0, ge=0, description="First rollout steps of the run, in which the critic trains alone."
    )
