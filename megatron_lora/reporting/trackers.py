"""W&B, TensorBoard, Trackio, SwanLab and MLflow, each behind the same two methods."""

import importlib.util
import logging
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol
from uuid import uuid4

from megatron_lora.config.schema_run import LoggerConfig, MlflowConfig, SwanlabConfig, TrackioConfig
from megatron_lora.errors import UserError

# `logger.NAME_enabled` -> the optional package behind it, and the extra that installs it.
OPTIONAL = {"trackio": "trackio", "swanlab": "swanlab", "mlflow": "mlflow"}
EXTRA = "trackers"
# What an MLflow server takes.
PARAMETERS_AT_ONCE, PARAMETER_LENGTH = 100, 6000
IMPATIENT = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "20"}


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

        run_id = _kept(run_dir / "wandb_run_id.txt", resume_step) or uuid4().hex[:8]
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
        (run_dir / "wandb_run_id.txt").write_text(run_id + "\n")
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")

    def log(self, kind: str, step: int, metrics: Mapping[str, Any]) -> None:
        self._run.log({"step": step, **_named(kind, metrics)})

    def close(self, succeeded: bool) -> None:
        self._run.finish(exit_code=0 if succeeded else 1)


class TrackioTracker:
    """A Trackio run in the local database (`TRACKIO_DIR`) that `trackio show` reads, or in a Space.

    The run's name is kept in `run_dir`, so that a resumed training run goes on in the same Trackio run.
    """

    def __init__(self, options: TrackioConfig, run_dir: Path, config: Mapping[str, Any], resume_step: int):
        import trackio

        name_file = run_dir / "trackio_run_name.txt"
        name = _kept(name_file, resume_step)
        try:
            self._run = trackio.init(
                project=options.project,
                name=name or options.name,
                space_id=options.space_id,
                config=dict(config),
                resume="allow" if name else "never",
                embed=False,
                auto_log_cpu=False,
                auto_log_gpu=False,
            )
        except Exception as error:  # it has no error of its own: OSError, ValueError, httpx's, huggingface_hub's
            raise UserError(
                f"logger.trackio_enabled=true, but Trackio did not start ({_first_line(error)}); mend logger.trackio, "
                "or set logger.trackio_enabled=false"
            ) from error
        name_file.write_text(self._run.name + "\n")

    def log(self, kind: str, step: int, metrics: Mapping[str, Any]) -> None:
        self._run.log(_named(kind, metrics), step=step)

    def close(self, succeeded: bool) -> None:
        self._run.finish()


class SwanLabTracker:
    """A SwanLab run, online or (SWANLAB_MODE=offline, local) on disk below `log_dir`. Its id is kept in `run_dir`, so
    that a resumed training run goes on in the same SwanLab run."""

    def __init__(
        self, options: SwanlabConfig, log_dir: Path, run_dir: Path, config: Mapping[str, Any], resume_step: int
    ):
        import swanlab

        id_file = run_dir / "swanlab_run_id.txt"
        run_id = _kept(id_file, resume_step) or uuid4().hex[:8]
        try:
            self._run = swanlab.init(
                project=options.project,
                name=options.name,
                id=run_id,
                resume="allow",
                log_dir=str(log_dir / "swanlab"),
                config=dict(config),
            )
        except Exception as error:  # RuntimeError without a login, others of its client
            raise UserError(
                f"logger.swanlab_enabled=true, but SwanLab did not start ({_first_line(error)}); log in with `swanlab "
                "login`, or set SWANLAB_MODE=offline in the environment, or logger.swanlab_enabled=false"
            ) from error
        id_file.write_text(run_id + "\n")

    def log(self, kind: str, step: int, metrics: Mapping[str, Any]) -> None:
        self._run.log(_named(kind, metrics), step=step)

    def close(self, succeeded: bool) -> None:
        self._run.finish(state="success" if succeeded else "crashed")


class MlflowTracker:
    """A run of an MLflow server, or of the SQLite file `mlflow.db` below `log_dir`.

    Its id is kept in `run_dir`, so that a resumed training run goes on in the same MLflow run. A
    server that does not answer is waited for seconds: the client's own default is minutes, longer than a rank may be
    silent.
    """

    def __init__(
        self, options: MlflowConfig, log_dir: Path, run_dir: Path, config: Mapping[str, Any], resume_step: int
    ):
        import mlflow

        logging.getLogger("mlflow").setLevel(logging.WARNING)
        id_file = run_dir / "mlflow_run_id.txt"
        uri = options.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
        try:
            if not uri:
                log_dir.mkdir(parents=True, exist_ok=True)
                uri = f"sqlite:///{log_dir.resolve() / 'mlflow.db'}"
            self._client = mlflow.MlflowClient(tracking_uri=uri, registry_uri="")
            with _environment(IMPATIENT):
                self._run_id = _kept(id_file, resume_step) or self._begin(options, config)
                self._client.update_run(self._run_id, status="RUNNING")
        except Exception as error:  # MlflowException, OSError, sqlalchemy's, requests'
            raise UserError(
                f"logger.mlflow_enabled=true, but MLflow did not start at {uri} ({_first_line(error)}); mend "
                "logger.mlflow.tracking_uri, or set logger.mlflow_enabled=false"
            ) from error
        id_file.write_text(self._run_id + "\n")

    def _begin(self, options: MlflowConfig, config: Mapping[str, Any]) -> str:
        """A new run with the recipe's keys as its parameters; its id."""
        experiment = self._client.get_experiment_by_name(options.experiment_name)
        experiment_id = (
            experiment.experiment_id if experiment else self._client.create_experiment(options.experiment_name)
        )
        run_id = self._client.create_run(experiment_id, run_name=options.run_name).info.run_id
        from mlflow.entities import Param

        parameters = [Param(name, str(value)[:PARAMETER_LENGTH]) for name, value in flat(config).items()]
        for start in range(0, len(parameters), PARAMETERS_AT_ONCE):
            self._client.log_batch(run_id, params=parameters[start : start + PARAMETERS_AT_ONCE])
        return run_id

    def log(self, kind: str, step: int, metrics: Mapping[str, Any]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        values = [Metric(name, value, now, step) for name, value in _named(kind, metrics).items()]
        with _environment(IMPATIENT):
            self._client.log_batch(self._run_id, metrics=values)

    def close(self, succeeded: bool) -> None:
        with _environment(IMPATIENT):
            self._client.set_terminated(self._run_id, "FINISHED" if succeeded else "FAILED")


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Environment variables for as long as the block lasts; those of the shell win."""
    added = {name: value for name, value in values.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


def _kept(path: Path, resume_step: int) -> str | None:
    """What an earlier start of the run left in `path`, None where this one is not resumed."""
    return path.read_text().strip() or None if resume_step and path.exists() else None


def _named(kind: str, metrics: Mapping[str, Any]) -> dict[str, float]:
    return {f"{kind}/{name}": value for name, value in numbers(metrics).items()}


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Those of the metrics that are numbers, with `/` between the names of nested ones."""
    return {
        name: value
        for name, value in flat(metrics, "/").items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }


def flat(values: Mapping[str, Any], between: str = ".") -> dict[str, Any]:
    """Nested dicts as one, with `between` the names; an empty one is left out."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= {f"{name}{between}{inner}": item for inner, item in flat(value, between).items()}
        else:
            found[name] = value
    return found


def check_trackers(logger: LoggerConfig) -> None:
    """Raise UserError where the recipe turns on a tracker whose package is not installed."""
    for name, package in OPTIONAL.items():
        if getattr(logger, f"{name}_enabled") and importlib.util.find_spec(package) is None:
            raise UserError(
                f"logger.{name}_enabled=true needs the package {package}, which is not installed: `make install "
                f"EXTRAS={EXTRA}` adds it; or set the key to false"
            )


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
    if logger.trackio_enabled:
        trackers.append(TrackioTracker(logger.trackio, run_dir, config, resume_step))
    if logger.swanlab_enabled:
        trackers.append(SwanLabTracker(logger.swanlab, log_dir, run_dir, config, resume_step))
    if logger.mlflow_enabled:
        trackers.append(MlflowTracker(logger.mlflow, log_dir, run_dir, config, resume_step))
    return trackers
