"""W&B and TensorBoard, each behind the same two methods."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol
from uuid import uuid4

from megatron_lora.config.schema_run import LoggerConfig
from megatron_lora.errors import UserError


class Tracker(Protocol):
    """Somewhere metrics go besides metrics.jsonl."""

    def log(self, kind: str, step: int, metrics: Mapping[str, Any]) -> None: ...
    def close(self, succeeded: bool) -> None: ...


class TensorBoardTracker:
    """Event files in `log_dir`; curves of a resumed run continue where the checkpoint was."""

    def __init__(self, log_dir: Path, resume_step: int = 0):
        from torch.utils.tensorboard import SummaryWriter

        try:
            self._writer = SummaryWriter(str(log_dir), purge_step=resume_step + 1 if resume_step else None)
        except OSError as error:
            raise UserError(
                f"logger.tensorboard.log_dir: {log_dir} cannot be written ({error}); name another folder or set "
                "logger.tensorboard_enabled=false"
            ) from error

    def log(self, kind: str, step: int, metrics: Mapping[str, Any]) -> None:
        for name, value in numbers(metrics).items():
            self._writer.add_scalar(f"{kind}/{name}", value, step)

    def close(self, succeeded: bool) -> None:
        self._writer.close()


class WandbTracker:
    """A W&B run, online or (WANDB_MODE=offline) on disk below `log_dir`.

    The run's id is kept in `run_dir`, so that a resumed training run goes on in the same W&B run. Curves are drawn
    over the metric `step`, since W&B's own step counter cannot go back to a checkpoint.
    """

    def __init__(
        self, project: str, name: str | None, log_dir: Path, run_dir: Path, config: Mapping[str, Any], resume_step: int
    ):
        import wandb

        id_file = run_dir / "wandb_run_id.txt"
        run_id = id_file.read_text().strip() if resume_step and id_file.exists() else uuid4().hex[:8]
        try:
            log_dir.mkdir(parents=True, exist_ok=True)
            self._run = wandb.init(
                project=project,
                name=name,
                id=run_id,
                dir=str(log_dir),
                config=dict(config),
                # Offline files of one id are joined when they are synced; W&B would warn of this setting there.
                resume=None if os.environ.get("WANDB_MODE") == "offline" else "allow",
                settings=wandb.Settings(console="off", silent=True),
            )
        except (wandb.Error, OSError) as error:
            raise UserError(
                f"logger.wandb_enabled=true, but W&B did not start ({error}); log in with `wandb login`, or set "
                "WANDB_MODE=offline in the environment, or logger.wandb_enabled=false"
            ) from error
        id_file.write_text(run_id + "\n")
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")

    def log(self, kind: str, step: int, metrics: Mapping[str, Any]) -> None:
        self._run.log({"step": step, **{f"{kind}/{name}": value for name, value in numbers(metrics).items()}})

    def close(self, succeeded: bool) -> None:
        self._run.finish(exit_code=0 if succeeded else 1)


def numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Those of the metrics that are numbers, with `/` between the names of nested ones."""
    flat: dict[str, float] = {}
    for name, value in metrics.items():
        if isinstance(value, Mapping):
            flat |= {f"{name}/{inner}": number for inner, number in numbers(value).items()}
        elif isinstance(value, int | float) and not isinstance(value, bool):
            flat[name] = value
    return flat


def build_trackers(
    logger: LoggerConfig, run_dir: Path, config: Mapping[str, Any], resume_step: int = 0
) -> list[Tracker]:
    """The trackers that the recipe's `logger` section asks for. Raises UserError where one cannot start."""
    trackers: list[Tracker] = []
    log_dir = Path(logger.log_dir).expanduser()
    if logger.tensorboard_enabled:
        trackers.append(TensorBoardTracker(log_dir / (logger.tensorboard.log_dir or "tensorboard"), resume_step))
    if logger.wandb_enabled:
        wandb = logger.wandb
        trackers.append(WandbTracker(wandb.project, wandb.name, log_dir, run_dir, config, resume_step))
    return trackers
