"""A metric's course as a few lines of text, for the end of a run in a terminal."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_lora.reporting.plots import series

BLOCKS = " ▁▂▃▄▅▆▇█"
FEWEST, WIDEST, HEIGHT = 3, 72, 6


def text_curve(records: Sequence[Mapping[str, Any]], name: str, width: int) -> list[str]:
    """Lines of at most `width` columns that show metric `name` of the training steps, each column the mean of as many
    steps; none where fewer than three steps have it."""
    steps, found = series(records, "train", name)
    points = [(step, value) for step, value in zip(steps, found, strict=True) if math.isfinite(value)]
    if len(points) < FEWEST:
        return []
    values = [value for _, value in points]
    labels = [f"{value:.4g}" for value in (max(values), min(values))]
    margin = max(map(len, labels))
    columns = _means(values, min(WIDEST, width - margin - 2))
    low, high = min(columns), max(columns)
    steps_of_block = len(BLOCKS) - 1
    # The lowest column is one eighth high, so that a flat curve is a line.
    heights = [
        1 + round((value - low) / (high - low) * (HEIGHT * steps_of_block - 1)) if high > low else 1
        for value in columns
    ]
    lines = [f"{name}, steps {points[0][0]} to {points[-1][0]}: {values[0]:.4g} to {values[-1]:.4g}"]
    for row in reversed(range(HEIGHT)):
        label = {HEIGHT - 1: labels[0], 0: labels[1]}.get(row, "")
        bars = "".join(BLOCKS[min(steps_of_block, max(0, height - row * steps_of_block))] for height in heights)
        lines.append(f"{label:>{margin}} ▏{bars}".rstrip())
    return lines


def _means(values: Sequence[float], columns: int) -> list[float]:
    """The means of `columns` equal parts; the values themselves where there are no more."""
    if len(values) <= columns:
        return list(values)
    bounds = [round(number * len(values) / columns) for number in range(columns + 1)]
    return [sum(values[a:b]) / (b - a) for a, b in zip(bounds, bounds[1:], strict=False)]
