"""The DTensor backend (transformers + peft + FSDP2): `policy.dtensor_cfg`, `policy.optimizer`, `policy.scheduler`."""

from typing import Self

from pydantic import Field, model_validator

from megatron_lora.config.schema_adapters import LoraConfig
from megatron_lora.config.schema_base import Environment, KeywordArguments, PositiveInt, Section


class TorchOptimizerConfig(Section):
    """`policy.optimizer`: a torch optimizer."""

    name: str = Field(default="torch.optim.AdamW", description="Import path of the optimizer's class.")
    kwargs: KeywordArguments = Field(default_factory=dict, description="Its keyword arguments.")


class TorchSchedulerConfig(Section):
    """One entry of `policy.scheduler`: a torch scheduler, or the milestones between those before it."""

    name: str | None = Field(default=None, description="Import path of the scheduler's class.")
    kwargs: KeywordArguments = Field(default_factory=dict, description="Its keyword arguments.")
    milestones: list[PositiveInt] | None = Field(
        default=None, description="Steps at which the next scheduler of the list takes over; the only key of its entry."
    )

    @model_validator(mode="after")
    def _scheduler_or_milestones(self) -> Self:
        if (self.name is None) == (self.milestones is None) or (self.milestones is not None and self.kwargs):
            raise ValueError("an entry is either {name, kwargs} or {milestones}")
        return self


class DTensorConfig(Section):
    """`policy.dtensor_cfg`. Used where `policy.megatron_cfg.enabled` is false."""

    tensor_parallel_size: PositiveInt = Field(default=1, description="Ranks that share each layer's matrices (TP).")
    sequence_parallel: bool = Field(
        default=False, description="Split activations over TP ranks where the model's plan can."
    )
    activation_checkpointing: bool = Field(
        default=False, description="Recompute activations in the backward pass instead of keeping them."
    )
    cpu_offload: bool = Field(default=False, description="Keep weights, gradients and optimizer state in CPU memory.")
    compile: bool = Field(default=False, description="torch.compile each layer.")
    env_vars: Environment = Field(
        default_factory=dict,
        description="Environment variables that are set before this backend is imported; those of the shell win.",
    )
    lora_cfg: LoraConfig = Field(default_factory=LoraConfig, description="Adapters.")


def check_schedulers(schedulers: list[TorchSchedulerConfig]) -> None:
    """Refuse a list whose milestones do not fit its schedulers. Raises ValueError."""
    named = [entry for entry in schedulers if entry.name is not None]
    milestones = [entry.milestones for entry in schedulers if entry.milestones is not None]
    if not named:
        raise ValueError("scheduler has no entry with a name")
    if len(milestones) > 1:
        raise ValueError(f"scheduler has {len(milestones)} entries of milestones; wanted one")
    got = milestones[0] if milestones else []
    if len(got) != len(named) - 1 or sorted(set(got)) != got:
        raise ValueError(
            f"scheduler has {len(named)} schedulers and milestones {got}; wanted {len(named) - 1} increasing steps"
        )
