"""A picture of one GRPO step from the spans that the trainer recorded (`megatron_lora.runtime.spans`)."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STEP = "step"
COLOURS = {
    "wake": "#9ca3af",
    "generation": "#2563eb",
    "rewards": "#a855f7",
    "sleep": "#9ca3af",
    "scoring": "#ea580c",
    "training": "#16a34a",
    "refit": "#dc2626",
    "proof": "#f59e0b",
    "forward": "#86efac",
}


@dataclass(frozen=True)
class Span:
    name: str
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """A step's seconds, its phases in order (start and end from the step's beginning), and the spans inside them."""

    seconds: float
    phases: list[Span]
    inner: list[Span]

    @property
    def gap_share(self) -> float:
        """The part of the step that lies in no phase."""
        return 1 - sum(phase.end - phase.start for phase in self.phases) / self.seconds

    def describe(self) -> str:
        """`step 6.21 s: generation 2.50, ..., 1.2 % in no phase`, phases of one name added up."""
        totals: dict[str, float] = {}
        for phase in self.phases:
            totals[phase.name] = totals.get(phase.name, 0.0) + phase.end - phase.start
        parts = ", ".join(f"{name} {seconds:.2f}" for name, seconds in totals.items())
        return f"step {self.seconds:.2f} s: {parts}; {self.gap_share:.1%} in no phase"


def last_step(path: Path) -> Timeline:
    """The last whole step of a file of spans. Raises ValueError where there is none."""
    spans = [Span(**json.loads(line)) for line in path.read_text().splitlines()]
    steps = [span for span in spans if span.name == STEP]
    if not steps:
        raise ValueError(f"{path} holds no whole step")
    step = steps[-1]
    within = [
        Span(span.name, span.start - step.start, span.end - step.start)
        for span in spans
        if span.name != STEP and step.start <= span.start and span.end <= step.end
    ]
    within.sort(key=lambda span: (span.start, -span.end))
    phases: list[Span] = []
    inner: list[Span] = []
    for span in within:
        (inner if phases and span.start < phases[-1].end else phases).append(span)
    return Timeline(step.end - step.start, phases, inner)


def draw(timelines: Sequence[tuple[str, Timeline]], path: Path) -> None:
    """A PNG with two lanes a run: its phases, and the forward passes inside them."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    figure = Figure(figsize=(10, 1.2 + 1.1 * len(timelines)), dpi=140, layout="constrained")
    axes: Any = figure.add_subplot()
    labels = []
    for number, (label, timeline) in enumerate(timelines):
        for lane, spans in ((0.0, timeline.phases), (0.45, timeline.inner)):
            for span in spans:
                bar = [(span.start, max(span.end - span.start, timeline.seconds / 2000))]
                axes.broken_barh(bar, (number + lane, 0.4), color=COLOURS.get(span.name, "#111827"))
        labels.append(f"{label}\n{timeline.seconds:.2f} s, {timeline.gap_share:.1%} gaps")
    axes.set_yticks([number + 0.42 for number in range(len(labels))], labels)
    axes.set_xlabel("seconds")
    axes.invert_yaxis()
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    names = {span.name for _, timeline in timelines for span in (*timeline.phases, *timeline.inner)}
    handles = [Patch(color=colour, label=name) for name, colour in COLOURS.items() if name in names]
    axes.legend(handles=handles, ncols=len(handles), frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    temporary = path.with_name(path.name + ".tmp")
    figure.savefig(temporary, format="png")
    os.replace(temporary, path)
