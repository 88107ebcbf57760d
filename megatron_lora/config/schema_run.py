"""What a run writes: `checkpointing` and `logger`."""

import re
from typing import Self

from pydantic import Field, field_validator, model_validator

from megatron_lora.config.schema_base import NonNegativeInt, Place, PositiveFloat, PositiveInt, Section


class CheckpointingConfig(Section):
    """`checkpointing`."""

    enabled: bool = Field(default=True, description="Write `step_N/` folders.")
    checkpoint_dir: Place = Field(default="results", description="Folder of the run.")
    resume: bool = Field(
        default=True, description="Go on from the latest complete step; off: refuse a folder that has a run."
    )
    save_period: PositiveInt = Field(
        default=10, description="Steps between checkpoints; the last step is always saved."
    )
    keep_top_k: PositiveInt | None = Field(
        default=3,
        description="Checkpoints kept: so many of the best by `metric_name`, and the latest besides; null: all.",
    )
    metric_name: str | None = Field(
        default="val:loss", description="`val:` or `train:` and a metric of metrics.jsonl; null: keep the latest."
    )
    higher_is_better: bool = Field(default=False, description="Whether a larger metric is better.")
    save_optimizer: bool = Field(default=True, description="Save what exact resumption needs.")

    checkpoint_must_save_by: str | None = Field(
        default=None,
        description="`DD:HH:MM:SS` of training, by which the run has saved and ended with status 0: a step that would "
        "end later is not begun. The same command goes on. null: no such time.",
    )

    @field_validator("checkpoint_must_save_by")
    @classmethod
    def _is_a_duration(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"\d+:\d{1,2}:\d{1,2}:\d{1,2}", value):
            raise ValueError("wanted days, hours, minutes and seconds, such as 00:03:45:00")
        return value

    @property
    def seconds_to_save(self) -> float | None:
        """`checkpoint_must_save_by` in seconds."""
        if self.checkpoint_must_save_by is None:
            return None
        days, hours, minutes, seconds = map(int, self.checkpoint_must_save_by.split(":"))
        return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)

    @model_validator(mode="after")
    def _saves_what_has_to_be_saved(self) -> Self:
        if self.checkpoint_must_save_by is not None and not self.enabled:
            raise ValueError(
                f"checkpoint_must_save_by={self.checkpoint_must_save_by} with enabled=false would end the run and save "
                "nothing; set enabled=true, or checkpoint_must_save_by=null"
            )
        return self

    @model_validator(mode="after")
    def _metric_has_a_split(self) -> Self:
        if self.metric_name is not None and self.metric is None:
            raise ValueError(f"metric_name={self.metric_name!r}: wanted `val:NAME` or `train:NAME`")
        return self

    @property
    def metric(self) -> tuple[str, str] | None:
        """(`kind`, name) of the metrics.jsonl value that ranks checkpoints; NeMo RL's names are understood:
        `val:val_loss` and `val:validation-default_loss` are `loss` of validation lines."""
        if self.metric_name is None:
            return None
        split, _, name = self.metric_name.partition(":")
        for prefix in ("validation-default_", "val_"):
            name = name.removeprefix(prefix)
        if split not in ("val", "train") or not name:
            return None
        return ("validation" if split == "val" else "train"), name


class TimeoutsConfig(Section):
    """`timeouts`: how long a rank may show no sign of life before the run ends and names it."""

    training_seconds: PositiveFloat = Field(
        default=300.0, description="Between two micro-batches of a step, or of SFT's and DPO's validation."
    )
    slow_seconds: PositiveFloat = Field(
        default=7200.0,
        description="While loading, generating and rewarding answers, or writing a checkpoint.",
    )


class WandbConfig(Section):
    """`logger.wandb`. Offline with `WANDB_MODE=offline` in the environment."""

    project: str = Field(default="megatron-lora", description="Project.")
    name: str | None = Field(default=None, description="Name of the run; null: W&B's choice.")


class TrackioConfig(Section):
    """`logger.trackio`."""

    project: str = Field(default="megatron-lora", description="Project.")
    name: str | None = Field(default=None, description="Name of the run; null: Trackio's choice.")
    space_id: str | None = Field(
        default=None, description="Hugging Face Space to log to, `owner/name`; null: the local database."
    )


class SwanlabConfig(Section):
    """`logger.swanlab`. Offline with `SWANLAB_MODE=offline` in the environment."""

    project: str = Field(default="megatron-lora", description="Project.")
    name: str | None = Field(default=None, description="Name of the run; null: SwanLab's choice.")


class MlflowConfig(Section):
    """`logger.mlflow`."""

    experiment_name: str = Field(default="megatron-lora", description="Experiment; made where there is none.")
    run_name: str | None = Field(default=None, description="Name of the run; null: MLflow's choice.")
    tracking_uri: str | None = Field(
        default=None,
        description="Server (`http://host:5000`) or database; null: `MLFLOW_TRACKING_URI`, without it the file "
        "`mlflow.db` in `logger.log_dir`.",
    )


class TensorboardConfig(Section):
    """`logger.tensorboard`."""

    log_dir: Place | None = Field(
        default=None, description="Folder of event files, below `logger.log_dir`; null: `tensorboard`."
    )


class LoggerConfig(Section):
    """`logger`. metrics.jsonl is always written."""

    log_dir: Place = Field(default="logs", description="Folder of the trackers' files.")
    wandb_enabled: bool = Field(default=False, description="Log to Weights & Biases.")
    wandb: WandbConfig = Field(default_factory=WandbConfig, description="Weights & Biases.")
    tensorboard_enabled: bool = Field(default=False, description="Write TensorBoard event files.")
    tensorboard: TensorboardConfig = Field(default_factory=TensorboardConfig, description="TensorBoard.")
    trackio_enabled: bool = Field(default=False, description="Log to Trackio (extra `trackers`).")
    trackio: TrackioConfig = Field(default_factory=TrackioConfig, description="Trackio.")
    swanlab_enabled: bool = Field(default=False, description="Log to SwanLab (extra `trackers`).")
    swanlab: SwanlabConfig = Field(default_factory=SwanlabConfig, description="SwanLab.")
    mlflow_enabled: bool = Field(default=False, description="Log to MLflow (extra `trackers`).")
    mlflow: MlflowConfig = Field(default_factory=MlflowConfig, description="MLflow.")
    num_val_samples_to_print: NonNegativeInt = Field(default=0, description="GRPO: sample answers shown at validation.")
