"""What a growth's points say: tables, the reason where a line is not straight, and a picture."""

import math
import os
from pathlib import Path
from typing import Any

from tools.bench.task import SHAPES, parameters_of

# Series -> (what it is called, the power of the number that the time would grow with on a straight line).
SERIES = {
    "rank": ("rank", 0),
    "tokens": ("tokens a step", 1),
    "length": ("tokens a sequence, as many a step", 0),
    "size": ("parameters", 1),
    "context": ("tokens of one sequence, CP=2, recompute", 1),
    "tp": ("TP", -1),
    "pp": ("PP, 4 micro-batches", -1),
}
PARTS = ("products", "attention", "communication", "other")


def number_of(name: str, row: dict[str, Any]) -> float:
    """What a series changes."""
    if name == "tokens":
        return row["rows"] * row["length"]
    if name == "size":
        return parameters_of(SHAPES[row["shape"]])
    return row["length" if name == "context" else name]


def table(results: dict[str, Any]) -> str:
    """A table a series, and why the last point lies where it does."""
    lines = [f"{results['environment'].get('device', '')}."]
    for name, rows in results["series"].items():
        if not rows:
            continue
        lines += [
            "",
            f"| {SERIES[name][0]} | model | tokens a step | step | tokens/s | peak memory a GPU | {_heads()} |",
        ]
        lines.append(f"|{'---|' * (lines[-1].count('|') - 1)}")
        before = None
        for row in rows:
            before = _add_row(lines, name, row, before)
        lines += _reason(name, [row for row in rows if "step_ms" in row])
    return "\n".join([*lines, ""])


def _heads() -> str:
    return " | ".join([*(f"{part}, ms" for part in PARTS), "GPU idle", "growth a doubling"])


def _add_row(lines: list[str], name: str, row: dict[str, Any], before: tuple[float, float] | None) -> Any:
    number, tokens = number_of(name, row), row["rows"] * row["length"]
    if "error" in row:
        lines.append(f"| {number:,} | {row['shape']} | {tokens:,} | {row['error'].replace('|', '/')} |{' |' * 8}")
        return before
    growth = ""
    if before is not None and number != before[0]:
        growth = f"{(row['step_ms'] / before[1]) ** (1 / math.log2(number / before[0])):.2f}"
    parts = row.get("parts_ms", {})
    cells = [f"{parts[part]:.0f}" if parts else "" for part in PARTS]
    cells.append(f"{row['idle_share']:.1%}" if "idle_share" in row else "")
    lines.append(
        f"| {number:,} | {row['shape']} | {tokens:,} | {row['step_ms']:.0f} ms | {row['tokens_per_s']:,} | "
        f"{row['peak_gib']:.1f} GiB | {' | '.join(cells)} | {growth} |"
    )
    return number, row["step_ms"]


def _reason(name: str, rows: list[dict[str, Any]]) -> list[str]:
    """What a straight line through the first point gives for the last one, and which part makes the difference."""
    if len(rows) < 2 or not all("parts_ms" in row for row in (rows[0], rows[-1])):
        return []
    first, last = rows[0], rows[-1]
    ratio = (number_of(name, last) / number_of(name, first)) ** SERIES[name][1]
    differences = {part: last["parts_ms"][part] - ratio * first["parts_ms"][part] for part in PARTS}
    differences["idle"] = _idle(last) - ratio * _idle(first)
    shown = ", ".join(
        f"{part} {value:+.0f}" for part, value in sorted(differences.items(), key=lambda item: -abs(item[1]))
    )
    straight = ratio * first["step_ms"]
    return [
        "",
        f"A straight line through the first point gives {straight:.0f} ms for the last, which took "
        f"{last['step_ms']:.0f}. The difference by parts, ms: {shown}.",
    ]


def _idle(row: dict[str, Any]) -> float:
    return row["step_ms"] - row["parts_ms"]["busy"]


# What a panel's times range over at least.
LEAST_SPREAD = 4.0


def draw(results: dict[str, Any], path: Path) -> None:
    """A panel a series: measured times on logarithmic axes, beside the straight line through the first point."""
    from matplotlib.figure import Figure

    panels = {
        name: [row for row in rows if "step_ms" in row]
        for name, rows in results["series"].items()
        if any("step_ms" in row for row in rows)
    }
    if not panels:
        return
    columns = min(4, len(panels))
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(3.6 * columns, 3.1 * lines), dpi=130, layout="constrained")
    axes: Any = figure.subplots(lines, columns, squeeze=False)
    for place, (name, rows) in zip(axes.flat, panels.items(), strict=False):
        numbers = [number_of(name, row) for row in rows]
        times = [row["step_ms"] for row in rows]
        straight = [times[0] * (number / numbers[0]) ** SERIES[name][1] for number in numbers]
        place.plot(numbers, straight, color="#9aa5b1", linestyle="--", label="straight")
        place.plot(numbers, times, color="#1b7f79", marker="o", label="measured")
        place.set_xscale("log", base=2)
        place.set_yscale("log")
        place.set_xticks(numbers, [_short(number) for number in numbers])
        place.minorticks_off()
        place.set_yticks([])
        for number, time in zip(numbers, times, strict=True):
            place.annotate(f"{time:.0f}", (number, time), (0, 5), textcoords="offset points", ha="center", fontsize=7)
        low, high = min(times + straight), max(times + straight)
        if high < LEAST_SPREAD * low:
            # A few percent are not to look like a wall.
            middle = math.sqrt(low * high)
            place.set_ylim(middle / math.sqrt(LEAST_SPREAD), middle * math.sqrt(LEAST_SPREAD))
        place.set_title(SERIES[name][0], fontsize=9)
        place.set_ylabel("ms a step", fontsize=8)
        place.tick_params(labelsize=7)
        place.spines[["top", "right"]].set_visible(False)
    for place in list(axes.flat)[len(panels) :]:
        place.set_axis_off()
    axes.flat[0].legend(frameon=False, fontsize=7)
    temporary = path.with_name(path.name + ".tmp")
    figure.savefig(temporary, format="png")
    os.replace(temporary, path)


def _short(number: float) -> str:
    for size, letter in ((1e9, "B"), (1e6, "M")):
        if number >= size:
            return f"{number / size:.1f}{letter}"
    return f"{number / 1024:g}k" if number >= 1024 else f"{number:g}"
