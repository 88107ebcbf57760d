"""Time and memory of this project's LoRA step against one number at a time: the adapters' rank, tokens a step, tokens a
sequence, the model's size, and on two GPUs the length with CP=2, TP and PP.

    python -m tools.bench.growth --out results/growth                                     one GPU
    python -m tools.bench.growth --out results/growth-2 --series context,tp,pp            two GPUs

Points that need as many processes share one start of them. table.md, growth.json and growth.png hold what is known
after each point; a point that takes longer than --limit is ended with its processes, and the next ones still run. A
table's last column says how many times as long a step takes for twice the number. Below each table: what a straight
line would give for the last point, and which part of the GPU's work makes the difference.
"""

import argparse
import json
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from megatron_lora.errors import UserError
from tools.bench.growth_report import draw, table
from tools.bench.options import build_parser, check_device, check_out
from tools.bench.processes import kill_tree
from tools.bench.random_weights import write_hollow_model
from tools.bench.task import Task, shape_of
from tools.bench.turns import start_ranks

RESULTS = "growth.json"
ONE_GPU = ("rank", "tokens", "length", "size")
TWO_GPUS = ("context", "tp", "pp")
LOOK_SECONDS = 0.1


@dataclass(frozen=True)
class Point:
    """rows x length: tokens of a step, a micro-batch or several. recompute: activations in the backward pass."""

    shape: str
    rank: int
    rows: int
    length: int
    tp: int = 1
    pp: int = 1
    cp: int = 1
    micro_batches: int = 1
    recompute: bool = False

    @property
    def num_processes(self) -> int:
        return self.tp * self.pp * self.cp


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
    parser.add_argument("--out", type=Path, required=True, help=f"folder for {RESULTS}, table.md and growth.png")
    parser.add_argument("--series", default=",".join(ONE_GPU), help=f"of {', '.join(ONE_GPU + TWO_GPUS)}")
    parser.add_argument("--shape", default="qwen2.5-1.5b", help="of rank, tokens, length, context")
    parser.add_argument("--split-shape", default="qwen2.5-7b", help="of tp and pp")
    parser.add_argument("--ranks", type=_numbers, default=[8, 16, 32, 64, 128, 256])
    parser.add_argument("--rows", type=_numbers, default=[1, 2, 4, 8], help="sequences a step, of the shape's length")
    parser.add_argument("--lengths", type=_numbers, default=[1024, 2048, 4096, 8192, 16384], help="of as many tokens")
    parser.add_argument(
        "--contexts", type=_numbers, default=[16384, 32768, 65536, 131072], help="of one sequence, CP=2"
    )
    parser.add_argument("--shapes", default="qwen2.5-0.5b,qwen2.5-1.5b,qwen2.5-3b,qwen2.5-7b", help="of size")
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5, help="measured steps; the median counts")
    parser.add_argument("--limit", type=float, default=60.0, help="seconds for a point; the first has 60 more")
    return parser.parse_args(arguments)


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def series_of(options: argparse.Namespace) -> dict[str, list[Point]]:
    """The points of each series asked for. Raises UserError."""
    shape, split = shape_of(options.shape), shape_of(options.split_shape)
    sizes = {name: shape_of(name) for name in options.shapes.split(",")}
    usual = Point(options.shape, 32, shape.rows, shape.length)
    tokens = shape.rows * shape.length
    halved = Point(options.split_shape, 32, split.rows, split.length)
    in_parts = replace(halved, rows=4, micro_batches=4)
    known = {
        "rank": [replace(usual, rank=rank) for rank in options.ranks],
        "tokens": [replace(usual, rows=rows) for rows in options.rows],
        "length": [replace(usual, rows=max(1, tokens // length), length=length) for length in options.lengths],
        # As many tokens as the largest has.
        "size": [replace(usual, shape=name, rows=min(each.rows for each in sizes.values())) for name in sizes],
        "context": [replace(usual, rows=1, length=length, cp=2, recompute=True) for length in options.contexts],
        "tp": [halved, replace(halved, tp=2)],
        "pp": [in_parts, replace(in_parts, pp=2)],
    }
    names = options.series.split(",")
    if unknown := [name for name in names if name not in known]:
        raise UserError(f"--series {','.join(unknown)}: wanted a list of {', '.join(known)}")
    return {name: known[name] for name in names}


def grow(options: argparse.Namespace) -> dict[str, Any]:
    """Measure every point. A point that fails has its error in the place of its numbers."""
    series = series_of(options)
    check_device(options.device)
    check_out(options.out / RESULTS)
    needed = max(point.num_processes for points in series.values() for point in points)
    if options.device == "cuda" and needed > torch.cuda.device_count():
        raise UserError(f"--series {options.series} needs {needed} GPUs; PyTorch sees {torch.cuda.device_count()}")
    options.out.mkdir(parents=True, exist_ok=True)
    measured: dict[Point, dict[str, Any]] = {}
    results: dict[str, Any] = {"environment": {}, "series": {name: [] for name in series}}
    with tempfile.TemporaryDirectory(prefix="growth-") as scratch:
        for num_processes in sorted({point.num_processes for points in series.values() for point in points}):
            wanted = [point for points in series.values() for point in points if point.num_processes == num_processes]
            todo = list(dict.fromkeys(wanted))
            while todo:
                todo = _measure(todo, num_processes, options, Path(scratch), measured, results, series)
    return results


def _measure(
    todo: list[Point],
    num_processes: int,
    options: argparse.Namespace,
    scratch: Path,
    measured: dict[Point, dict[str, Any]],
    results: dict[str, Any],
    series: dict[str, list[Point]],
) -> list[Point]:
    """One start of processes, which go through the points. Returns those that are left when it ended."""
    found, tasks = scratch / "found.jsonl", scratch / "tasks.json"
    found.write_text("")
    tasks.write_text(json.dumps([asdict(_task(point, options, scratch)) for point in todo]))
    with (options.out / "log.txt").open("ab") as log:
        process = start_ranks(["-m", "tools.bench.growth_worker", str(tasks), str(found)], num_processes, log)
        try:
            done, until = 0, time.monotonic() + options.limit + 60
            while done < len(todo):
                lines = found.read_text().splitlines()
                for line in lines[done:]:
                    answer = json.loads(line)
                    results["environment"] = answer.pop("environment")
                    _note(todo[done], answer, measured, results, series, options.out)
                    done, until = done + 1, time.monotonic() + options.limit
                if process.poll() is not None and len(found.read_text().splitlines()) == done < len(todo):
                    _note(todo[done], {"error": f"status {process.returncode}"}, measured, results, series, options.out)
                    return todo[done + 1 :]
                if time.monotonic() > until:
                    _note(
                        todo[done], {"error": f"no end in {options.limit:g} s"}, measured, results, series, options.out
                    )
                    return todo[done + 1 :]
                time.sleep(LOOK_SECONDS)
            return []
        finally:
            kill_tree(process)


def _note(
    point: Point,
    answer: dict[str, Any],
    measured: dict[Point, dict[str, Any]],
    results: dict[str, Any],
    series: dict[str, list[Point]],
    out: Path,
) -> None:
    measured[point] = answer
    for name, points in series.items():
        results["series"][name] = [asdict(each) | measured[each] for each in points if each in measured]
    for name, text in ((RESULTS, json.dumps(results, indent=1)), ("table.md", table(results))):
        temporary = out / f"{name}.part"
        temporary.write_text(text)
        temporary.replace(out / name)
    draw(results, out / "growth.png")
    print(f"{point}: {answer}", flush=True)


def _task(point: Point, options: argparse.Namespace, scratch: Path) -> Task:
    model = scratch / point.shape
    write_hollow_model(shape_of(point.shape), model, torch.bfloat16 if options.device == "cuda" else torch.float32)
    return Task(
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
        tp=point.tp,
        sp=point.tp > 1,
        profile=None,
        result="",
        pp=point.pp,
        cp=point.cp,
        recompute=point.recompute,
        micro_batches=point.micro_batches,
    )


if __name__ == "__main__":
    sys.exit(main())
