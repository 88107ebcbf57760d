"""Time and memory of this project's LoRA step against the adapters' rank, tokens a step and tokens a sequence.

One process on one GPU, one point after another on the same random model; table.md and growth.json hold what is known
after each point. Each series changes one number, and its last column says how many times as long a step takes for twice
that number: 2.00 is a straight line through nothing, 1.00 no growth.
"""

import argparse
import gc
import json
import math
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_lora.errors import UserError
from tools.bench import engine_ours
from tools.bench.__main__ import write_model
from tools.bench.measure import measure
from tools.bench.options import build_parser, check_device, check_out
from tools.bench.task import Task, shape_of
from tools.bench.worker import environment

RESULTS = "growth.json"


@dataclass(frozen=True)
class Point:
    """rows x length: tokens of a step, one micro-batch."""

    rank: int
    rows: int
    length: int

    @property
    def tokens(self) -> int:
        return self.rows * self.length


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    try:
        grow(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = build_parser("tools.bench.growth", __doc__)
    parser.add_argument("--shape", default="qwen2.5-1.5b")
    parser.add_argument("--out", type=Path, required=True, help=f"folder for {RESULTS} and table.md")
    parser.add_argument("--model", type=Path, help="random model's folder, written if absent; default: a temporary one")
    parser.add_argument("--ranks", type=_numbers, default=[8, 32, 64, 128, 256])
    parser.add_argument("--rows", type=_numbers, default=[1, 2, 4, 8], help="sequences a step, of the shape's length")
    parser.add_argument("--lengths", type=_numbers, default=[1024, 2048, 4096, 8192, 16384], help="of as many tokens")
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5, help="measured steps; the median counts")
    return parser.parse_args(arguments)


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def grow(options: argparse.Namespace) -> dict[str, Any]:
    """Measure every point. A point that fails has its error in the place of its numbers."""
    shape = shape_of(options.shape)
    check_device(options.device)
    check_out(options.out / RESULTS)
    options.out.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    tokens = shape.rows * shape.length
    series = {
        "rank": [Point(rank, shape.rows, shape.length) for rank in options.ranks],
        "tokens": [Point(32, rows, shape.length) for rows in options.rows],
        "length": [Point(32, max(1, tokens // length), length) for length in options.lengths],
    }
    results: dict[str, Any] = {"shape": options.shape, "environment": environment(), "series": {}}
    measured: dict[Point, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="growth-") as scratch:
        model = options.model or Path(scratch) / "model"
        write_model(options, model)
        for name, points in series.items():
            rows = results["series"][name] = []
            for point in points:
                measured[point] = measured.get(point) or _measure(point, options, model)
                rows.append({"rank": point.rank, "rows": point.rows, "length": point.length} | measured[point])
                _write(results, options.out)
                print(f"{name}: {point}: {measured[point]}", flush=True)
    return results


def _measure(point: Point, options: argparse.Namespace, model: Path) -> dict[str, Any]:
    task = Task(
        engine="ours-lora",
        model=str(model),
        device=options.device,
        rows=point.rows,
        length=point.length,
        rank=point.rank,
        warmup=options.warmup,
        steps=options.steps,
        chunk=2048,
        sweep=[],
        tp=1,
        sp=False,
        profile=None,
        result="",
    )
    step, facts = None, None
    try:
        step, facts = engine_ours.build(task, lora=True)
        found = measure(step, task.tokens, task.warmup, task.steps)
        return {name: found[name] for name in ("step_ms", "tokens_per_s", "peak_gib")}
    except RuntimeError as error:  # of memory: the other points are still measured
        return {"error": str(error).splitlines()[0][:200]}
    finally:
        del step, facts
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _write(results: dict[str, Any], out: Path) -> None:
    for name, text in ((RESULTS, json.dumps(results, indent=1)), ("table.md", table(results))):
        temporary = out / f"{name}.part"
        temporary.write_text(text)
        temporary.replace(out / name)


def table(results: dict[str, Any]) -> str:
    """A table a series."""
    lines = [f"{results['environment']['device']}, {results['shape']}."]
    for name, rows in results["series"].items():
        lines += ["", f"| {name} | tokens a step | step | tokens/s | peak memory | growth a doubling |"]
        lines.append("|---|---|---|---|---|---|")
        before = None
        for row in rows:
            tokens = row["rows"] * row["length"]
            number = tokens if name == "tokens" else row[name]
            if "error" in row:
                lines.append(f"| {number:,} | {tokens:,} | {row['error'].replace('|', '/')} | | | |")
                continue
            growth = ""
            if before is not None:
                growth = f"{(row['step_ms'] / before[1]) ** (1 / math.log2(number / before[0])):.2f}"
            before = number, row["step_ms"]
            lines.append(
                f"| {number:,} | {tokens:,} | {row['step_ms']:.0f} ms | {row['tokens_per_s']:,} | "
                f"{row['peak_gib']:.1f} GiB | {growth} |"
            )
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    sys.exit(main())
