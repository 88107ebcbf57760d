"""loss.png and reward.png, drawn from the records of metrics.jsonl."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

BLUE, ORANGE, GRAY = "#2563eb", "#ea580c", "#6b7280"
LOG_RATIO = 30.0  # a loss that falls this many times over is drawn on a logarithmic axis


def smooth(values: Sequence[float], width: float) -> list[float]:
    """Average under a Gaussian window with standard deviation `width` steps. Symmetric, so that the curve does not lag
    behind a falling loss as a running average does; at both ends the window is cut and renormalised."""
    offsets = np.arange(-int(3 * width) - 1, int(3 * width) + 2)
    window = np.exp(-0.5 * (offsets / width) ** 2)
    padded = np.pad(np.asarray(values, dtype=np.float64), len(offsets) // 2)
    weights = np.pad(np.ones(len(values)), len(offsets) // 2)
    smoothed = np.convolve(padded, window, mode="valid") / np.convolve(weights, window, mode="valid")
    return smoothed.tolist()


def series(records: Sequence[Mapping[str, Any]], kind: str, name: str) -> tuple[list[int], list[float]]:
    """(steps, values) of one metric; records without it, or where it was not finite, are left out."""
    points = [(r["step"], r[name]) for r in records if r.get("kind") == kind and isinstance(r.get(name), int | float)]
    return [step for step, _ in points], [float(value) for _, value in points]


def draw_curve(
    records: Sequence[Mapping[str, Any]], name: str, path: Path, label: str, title: str = "", validation: str = ""
) -> bool:
    """Draw the training curve of metric `name` (raw and smoothed) and its validation points into a PNG.

    label: the axis' name. title: what run this is. validation: the metric of validation lines, `name` if empty.
    Returns False, and writes nothing, where no record has the metric.
    """
    steps, values = series(records, "train", name)
    validation_steps, validation_values = series(records, "validation", validation or name)
    if not values and not validation_values:
        return False
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8, 4.5), dpi=140, layout="constrained")
    axes = figure.add_subplot()
    if values:
        _draw_training(axes, steps, values)
    if validation_values:
        axes.plot(
            validation_steps, validation_values, "o-", color=ORANGE, linewidth=1.2, markersize=5,
            markeredgecolor="white", label="validation",
        )  # fmt: skip
    everything = [*values, *validation_values]
    if name == "loss" and min(everything) > 0 and max(everything) > LOG_RATIO * min(everything):
        axes.set_yscale("log")
    axes.set_xlabel("step", color=GRAY)
    axes.set_ylabel(label, color=GRAY)
    axes.set_title(title or label, loc="left", fontsize=12, fontweight="bold")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.tick_params(colors=GRAY)
    axes.grid(True, which="major", color="#e5e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.margins(x=0.02)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("#d1d5db")
    axes.legend(frameon=False, labelcolor="#374151")
    temporary = path.with_name(path.name + ".tmp")
    figure.savefig(temporary, format="png")
    os.replace(temporary, path)
    return True


def _draw_training(axes: Any, steps: list[int], values: list[float]) -> None:
    smoothed = smooth(values, width=max(2.0, len(values) / 50))
    is_short = len(values) < 15  # too few to need a second curve
    axes.plot(
        steps, values, "o-" if is_short else "-", color=BLUE, alpha=1.0 if is_short else 0.25, linewidth=1.0,
        markersize=3, label="train" if is_short else "train, each step",
    )  # fmt: skip
    if not is_short:
        axes.plot(steps, smoothed, color=BLUE, linewidth=2.0, label="train, smoothed")
        axes.annotate(
            f"{smoothed[-1]:.3g}", (steps[-1], smoothed[-1]), xytext=(4, 0), textcoords="offset points",
            color=BLUE, fontsize=9, va="center", annotation_clip=False,
        )  # fmt: skip


def draw_pictures(records: Sequence[Mapping[str, Any]], run_dir: Path, title: str = "") -> list[Path]:
    """`loss.png`, and `reward.png` where there are rewards; returns what was drawn."""
    drawn = []
    if draw_curve(records, "loss", run_dir / "loss.png", "loss", title):
        drawn.append(run_dir / "loss.png")
    if draw_curve(records, "reward", run_dir / "reward.png", "mean reward", title):
        drawn.append(run_dir / "reward.png")
    return drawn
