"""Where a trainer reports to: metrics.jsonl, the trackers, the terminal and the pictures, all on one rank."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console

from megatron_lora.config.schema_run import LoggerConfig
from megatron_lora.reporting.console import RunConsole
from megatron_lora.reporting.logins import login_notices
from megatron_lora.reporting.metrics_file import MetricsFile, read_metrics
from megatron_lora.reporting.plots import draw_pictures
from megatron_lora.reporting.trackers import Tracker, build_trackers, check_trackers

METRICS_NAME = "metrics.jsonl"
__all__ = ["RunReporter", "check_metrics", "check_trackers", "login_notices"]


def check_metrics(run_dir: Path, step: int) -> list[str]:
    """Notices about the metrics.jsonl of a run that is to go on after `step`. Raises UserError where it is damaged."""
    path = run_dir / METRICS_NAME
    if not path.exists():
        return [f"{path} is missing: it begins anew at step {step + 1}"]
    last = max((record["step"] for record in read_metrics(path) if record.get("kind") == "train"), default=0)
    if last < step:
        return [f"{path} ends at step {last}, the checkpoint is of step {step}: the steps between are not in it"]
    return []


class RunReporter:
    """Writes and shows what a run does. On every rank but one `enabled` is False and all methods do nothing.

    with RunReporter(run_dir, total_steps, logger=recipe.logger, resume_step=step, enabled=rank == 0) as reporter:
        reporter.start()
        reporter.log("train", step, {"loss": loss, ...})
    """

    def __init__(
        self,
        run_dir: Path,
        total_steps: int,
        *,
        logger: LoggerConfig | None = None,
        config: Mapping[str, Any] | None = None,
        resume_step: int = 0,
        title: str = "train",
        curve: str = "loss",
        val_period: int = 0,
        val_at_end: bool = False,
        enabled: bool = True,
        console: Console | None = None,
    ):
        """run_dir: `checkpointing.checkpoint_dir`. total_steps: of the whole run, for the bar. logger: the recipe's
        section (None: no trackers). config: the resolved recipe, shown in W&B. resume_step: the checkpoint's step;
        records after it are dropped. title: names the bar and the pictures. curve: the metric shown at the end.
        val_period, val_at_end: as in the recipe, for the time that is left. Writes nothing before `start`."""
        self.run_dir = Path(run_dir)
        self.enabled = enabled
        self._title, self._curve = title, curve
        self._closed = not enabled
        self._logger, self._config, self._resume_step = logger, config or {}, resume_step
        self._file: MetricsFile | None = None
        self._trackers: list[Tracker] = []
        self.failure: OSError | None = None
        self.result: Path | None = None  # the run's adapter or weights, named in the last line
        if enabled:
            self._console = RunConsole(
                title, total_steps, resume_step, console, val_period=val_period, val_at_end=val_at_end
            )

    def start(self) -> None:
        """Open metrics.jsonl and the trackers, when nothing can fail on a user's mistake any more. Raises UserError
        where the folder cannot be written or a tracker cannot start."""
        if not self.enabled:
            return
        self._file = MetricsFile(self.run_dir / METRICS_NAME, self._resume_step)
        if self._logger is not None:
            self._trackers = build_trackers(self._logger, self.run_dir, self._config, self._resume_step)

    def log(self, kind: str, step: int, metrics: Mapping[str, Any]) -> None:
        """Record metrics under the contract's names. kind "train" moves the bar to `step`; any other kind
        ("validation") is shown as a line. Tensors and numpy numbers are accepted.

        Where metrics.jsonl or the terminal cannot be written, `failure` says so: the other ranks have to learn of it
        before this one stops. A tracker that fails is told and left out from then on.
        """
        if not self.enabled:
            return
        if self._file is None:
            raise ValueError("log before start")
        try:
            record = self._file.append(kind, step, metrics)
            values = {name: value for name, value in record.items() if name not in ("kind", "step")}
            self._track(kind, step, values)
            if kind == "train":
                self._console.train_step(step, values)
            else:
                self._console.event(kind, step, values)
        except OSError as error:
            self.failure = error

    def _track(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        for tracker in list(self._trackers):
            try:
                tracker.log(kind, step, values)
            except Exception as error:
                self._trackers.remove(tracker)
                self.warning(f"{type(tracker).__name__} failed at step {step} and is left out: {_reason(error)}")

    @contextmanager
    def progress(self, title: str, total: int, unit: str = "samples") -> Iterator[Callable[[int], None]]:
        """A bar of its own inside a step (a rollout, a validation); yields `advance(count)`."""
        if not self.enabled:
            yield lambda count: None
            return
        with self._console.progress(title, total, unit) as advance:
            yield advance

    def table(
        self, title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], caption: str | None = None
    ) -> None:
        """Show a table (adapted modules, sample answers with rewards) above the bar."""
        if self.enabled:
            self._console.table(title, columns, rows, caption)

    def message(self, text: str) -> None:
        """Show one line above the bar."""
        if self.enabled:
            self._console.print(text, style="dim")

    def warning(self, text: str) -> None:
        """Show one line that must not be missed above the bar."""
        if self.enabled:
            self._console.print(f"warning: {text}", style="bold yellow")

    def close(self, succeeded: bool = True) -> None:
        """Stop the bar, close files and trackers, draw the pictures. Doing it twice is harmless. What fails here is
        told in a line: it must not hide why the run ended."""
        if self._closed:
            return
        self._closed = True
        with self._telling("the bar"):
            self._console.close()
        if self._file is None:
            return
        with self._telling(METRICS_NAME):
            self._file.close()
        for tracker in self._trackers:
            with self._telling(type(tracker).__name__):
                tracker.close(succeeded)
        with self._telling("the pictures"):
            records = read_metrics(self._file.path)
            if succeeded:
                self._console.curve(records, self._curve)
            drawn = draw_pictures(records, self.run_dir, self._title)
            if drawn:
                results = [self.result] if self.result is not None else []
                paths = ", ".join(str(path) for path in [self._file.path, *drawn, *results])
                self._console.print(f"wrote {paths}", style="dim")

    @contextmanager
    def _telling(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            # Standard output itself may be what cannot be written.
            with suppress(OSError):
                self.warning(f"{what} could not be finished: {_reason(error)}")

    def __enter__(self) -> "RunReporter":
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close(succeeded=error_type is None)


def _reason(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
