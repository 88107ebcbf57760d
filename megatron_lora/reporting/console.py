"""What a run shows in a terminal: a live bar, or plain lines where the output goes to a file or a CI log."""

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console, ConsoleDimensions
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Column, Table
from rich.text import Text

from megatron_lora.reporting.text_curve import text_curve
from megatron_lora.reporting.time_left import TimeLeft
from megatron_lora.runtime.terminal import folded, terminal_output

PLAIN_WIDTH = 120  # of tables where no terminal tells its width
SECONDS_BETWEEN_LINES = 5.0
# Names as in metrics.jsonl -> how a line shows them. What is not here is left to metrics.jsonl and the trackers.
_FORMATS: dict[str, Callable[[Any], str]] = {
    "loss": lambda value: f"loss {value:.4f}",
    "reward": lambda value: f"reward {value:.3f}",
    "accuracy": lambda value: f"accuracy {value:.3f}",
    "kl": lambda value: f"kl {value:.4f}",
    "rollout_logprob_error": lambda value: f"rollout error {value:.1e}",
    "grad_norm": lambda value: f"grad norm {value:.3g}",
    "lr": lambda value: f"lr {value:.2e}",
    "tokens_per_second": lambda value: f"{value:,.0f} tok/s",
    "step_time_seconds": lambda value: f"{value:.2f} s/step",
    "generation_seconds": lambda value: f"generation {value:.1f} s",
    "reward_seconds": lambda value: f"rewards {value:.1f} s",
    "scoring_seconds": lambda value: f"scoring {value:.1f} s",
    "training_seconds": lambda value: f"training {value:.1f} s",
}
_PHASES = ("generation_seconds", "reward_seconds", "training_seconds", "scoring_seconds")
# What the bar's line shows, and what it keeps for longest where the terminal is narrow.
_IN_BAR = ("loss", "reward", "accuracy", "tokens_per_second", *_PHASES)
_FIRST = ("reward", *_PHASES, "loss", "accuracy", "tokens_per_second")
# Beside the metrics: the longest label of a bar, two counts, the time left, a stump of the bar and what lies between.
_REST_OF_BAR = 38


class _UsersConsole(Console):
    """Standard output as the user has it, whatever file descriptor 1 leads to meanwhile."""

    @property
    def size(self) -> ConsoleDimensions:
        try:
            return ConsoleDimensions(*os.get_terminal_size(self.file.fileno()))
        except (OSError, ValueError):
            return super().size


def build_console() -> Console:
    """Standard output; 120 columns where it is no terminal, so that tables in a log stay whole."""
    if terminal_output().isatty():
        return _UsersConsole(file=terminal_output(), highlight=False)
    return Console(file=terminal_output(), highlight=False, width=PLAIN_WIDTH)


def describe(metrics: Mapping[str, Any], names: Sequence[str] = tuple(_FORMATS)) -> str:
    """The named metrics, those that are there, as one line for people."""
    return "  ".join(_FORMATS[name](metrics[name]) for name in names if isinstance(metrics.get(name), int | float))


def fitting(metrics: Mapping[str, Any], width: int) -> str:
    """As much of a step's metrics as fits, and no phase that took no time."""
    there = {name: value for name, value in metrics.items() if name not in _PHASES or value >= 0.05}
    shown: set[str] = set()
    for name in _FIRST:
        if len(describe(there, [each for each in _IN_BAR if each in shown | {name}])) <= width:
            shown.add(name)
    return describe(there, [name for name in _IN_BAR if name in shown])


class RunConsole:
    """A run's terminal output. The bar stays at the bottom, everything else scrolls above it."""

    def __init__(
        self,
        title: str,
        total_steps: int,
        first_step: int = 0,
        console: Console | None = None,
        *,
        val_period: int = 0,
        val_at_end: bool = False,
    ):
        """first_step: the number of steps that were done before this start (a resumed run). val_period, val_at_end: as
        in the recipe, for the time that is left."""
        self.console = console or build_console()
        self.title = title
        self.total_steps = total_steps
        self.first_step = first_step
        self._time_left = TimeLeft(total_steps, val_period, val_at_end)
        self._last_step, self._last_line = time.monotonic(), 0.0
        self._live: Progress | None = None
        if self.console.is_terminal:
            fixed = Column(no_wrap=True)  # only the bar gives way in a narrow terminal
            self._live = Progress(
                TextColumn("[bold]{task.description}", table_column=fixed.copy()),
                BarColumn(None, complete_style="cyan", finished_style="green", table_column=Column(ratio=1)),
                MofNCompleteColumn(table_column=fixed.copy()),
                _MetricsColumn(table_column=fixed.copy()),
                _TimeLeftColumn(table_column=fixed.copy()),
                console=self.console,
                expand=True,
                refresh_per_second=4,
                # What libraries print belongs into the log, where the streams lead.
                redirect_stdout=False,
                redirect_stderr=False,
            )
            self._main = self._live.add_task(title, total=total_steps, completed=first_step, metrics="", left="")
            self._live.start()

    def train_step(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Move the bar to `step`; without a terminal a line for the first and last step and every five seconds."""
        now = time.monotonic()
        seconds = metrics.get("step_time_seconds")
        self._time_left.step_took(seconds if isinstance(seconds, int | float) else now - self._last_step)
        self._last_step = now
        left = self._time_left.describe(step)
        if self._live is not None:
            text = fitting(metrics, self.console.width - _REST_OF_BAR)
            self._live.update(self._main, completed=step, metrics=text, left=left)
            return
        is_edge = step == self.first_step + 1 or step >= self.total_steps
        if is_edge or now - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = now
            width = len(str(self.total_steps))
            self.print(f"{self.title} {step:>{width}}/{self.total_steps}  {describe(metrics)}  ETA {left}")

    def event(self, kind: str, step: int, metrics: Mapping[str, Any]) -> None:
        """A line for a record that is not a training step (validation)."""
        if isinstance(seconds := metrics.get("step_time_seconds"), int | float):
            self._time_left.validation_took(seconds)
        self.console.print(Text(f"{kind} at step {step}  ", style="bold magenta") + Text(describe(metrics)))

    def print(self, text: str, style: str = "") -> None:
        """One line of plain text, taken literally."""
        self.console.print(Text(folded(text, self.console.file), style=style), soft_wrap=True)

    def curve(self, records: Sequence[Mapping[str, Any]], name: str) -> None:
        """The course of a metric, drawn in text."""
        for line in text_curve(records, name, self.console.width):
            self.console.print(Text(line, style="cyan"), no_wrap=True, crop=False)

    def table(
        self, title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], caption: str | None = None
    ) -> None:
        """A table; cells are taken literally, columns of numbers stand on the right."""
        table = Table(title=title, caption=caption, title_justify="left", caption_justify="left", title_style="bold")
        for number, name in enumerate(columns):
            is_numeric = bool(rows) and all(isinstance(row[number], int | float) for row in rows)
            table.add_column(name, justify="right" if is_numeric else "left", overflow="fold")
        for row in rows:
            table.add_row(*(Text(_cell(value)) for value in row))
        self.console.print(table)

    @contextmanager
    def progress(self, title: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
        """A second bar while something inside a step goes on; yields `advance(count)`. Without a terminal only a line
        at the end, and none for what took under five seconds."""
        started, done = time.monotonic(), 0
        live = self._live
        task = None if live is None else live.add_task(f"  {title}", total=total, metrics=unit)

        def advance(count: int = 1) -> None:
            nonlocal done
            done += count
            if live is not None and task is not None:
                live.advance(task, count)

        try:
            yield advance
        finally:
            if live is not None and task is not None:
                live.remove_task(task)
        elapsed = time.monotonic() - started
        if live is None and elapsed >= SECONDS_BETWEEN_LINES:
            self.print(f"{title}: {done:,} {unit} in {elapsed:.1f} s")

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None


class _MetricsColumn(ProgressColumn):
    """The task's `metrics` text, literally."""

    def render(self, task: Task) -> Text:
        return Text(task.fields.get("metrics", ""), style="cyan", no_wrap=True)


class _TimeLeftColumn(ProgressColumn):
    """The run's time left; of a bar inside a step what rich makes of its speed."""

    def __init__(self, table_column: Column):
        super().__init__(table_column)
        self._inner = TimeRemainingColumn(compact=True, elapsed_when_finished=True)

    def render(self, task: Task) -> Text:
        if "left" in task.fields:
            return Text(task.fields["left"], style="progress.remaining")
        return self._inner.render(task)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
