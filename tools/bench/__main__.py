"""The benchmark's command line: one engine after another, each in processes of its own, results after each."""

import argparse
import json
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatron_lora.errors import UserError
from tools.bench.options import add_step_size, build_parser, check_device, check_out
from tools.bench.random_weights import write_hollow_model
from tools.bench.task import SHAPES, Task, shape_of
from tools.bench.turns import run_in_turn
from tools.bench.worker import ENGINES

RESULTS = "results.json"
LOG = "log.txt"


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    try:
        results = bench(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0 if all(row["ok"] for row in results["engines"].values()) else 1


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = build_parser("tools.bench", __doc__)
    parser.add_argument("--shape", default="qwen2.5-1.5b", help=f"one of {', '.join(SHAPES)}")
    parser.add_argument("--name", help="what the table is called in docs/benchmarks.md; default: the shape")
    parser.add_argument("--engines", default="ours-lora,peft-lora,bridge-lora", help=f"of {', '.join(ENGINES)}")
    parser.add_argument("--out", type=Path, required=True, help="folder for results.json, table.md, chart.png, logs")
    add_step_size(parser)
    parser.add_argument("--warmup", type=int, default=3, help="steps before measuring")
    parser.add_argument("--steps", type=int, default=10, help="measured steps; the median counts")
    parser.add_argument("--chunk", type=int, default=1024, help="tokens of a chunk of this project's head")
    parser.add_argument("--sweep-chunks", default="", help="further chunk sizes for ours, such as 256,512,2048")
    parser.add_argument("--nproc", type=int, default=1, help="processes (GPUs) of ours and bridge")
    parser.add_argument("--tp", type=int, default=1, help="tensor parallelism of ours and bridge")
    parser.add_argument("--sp", action="store_true", help="sequence parallelism of ours and bridge")
    parser.add_argument("--profile", action="store_true", help="write ours' kernels that take most time")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds for one engine, from its turn")
    return parser.parse_args(arguments)


def bench(options: argparse.Namespace) -> dict[str, Any]:
    """Measure every engine asked for. results.json holds what is known after each of them."""
    shape = shape_of(options.shape)
    names = _check(options)
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {
        "shape": options.shape,
        "name": options.name or options.shape,
        "rows": options.rows or shape.rows,
        "length": options.length or shape.length,
        "rank": options.rank,
        "warmup": options.warmup,
        "steps": options.steps,
        "nproc": options.nproc,
        "tp": options.tp,
        "sp": options.sp,
        "engines": {},
    }
    with tempfile.TemporaryDirectory(prefix="bench-") as scratch:
        model = Path(scratch) / "model"
        dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
        tasks = [_task(name, options, results, model, Path(scratch)) for name in names]
        prepare = partial(write_hollow_model, shape, model, dtype)
        for task, answer in run_in_turn(tasks, options.nproc, options.timeout, out / LOG, prepare):
            results["environment"] = answer.get("environment") or results.get("environment")
            results["engines"][task.engine] = answer["result"]
            _write(results, out)
            print(f"{task.engine}: {_one_line(answer['result'])}", flush=True)
    return results


def _check(options: argparse.Namespace) -> list[str]:
    names = [name.strip() for name in options.engines.split(",") if name.strip()]
    unknown = [name for name in names if name not in ENGINES]
    if unknown or not names:
        raise UserError(f"--engines {options.engines!r}: wanted a list of {', '.join(ENGINES)}")
    if options.nproc > 1 and any(name.startswith(("peft", "hf")) for name in names):
        raise UserError("--nproc above 1 is for ours and bridge alone; measure peft and hf in a run of one process")
    if options.tp != options.nproc:
        raise UserError(f"--tp {options.tp} needs --nproc {options.tp}, got {options.nproc}")
    check_device(options.device)
    check_out(options.out / RESULTS)
    return names


def _task(name: str, options: argparse.Namespace, results: dict[str, Any], model: Path, scratch: Path) -> Task:
    ours = name.startswith("ours")
    sweep = [int(size) for size in options.sweep_chunks.split(",") if size] if name == "ours-lora" else []
    profile = str((options.out / f"profile-{name}.txt").resolve()) if options.profile and ours else None
    return Task(
        engine=name,
        model=str(model),
        device=options.device,
        rows=results["rows"],
        length=results["length"],
        rank=options.rank,
        warmup=options.warmup,
        steps=options.steps,
        chunk=options.chunk,
        sweep=sweep,
        tp=options.tp,
        sp=options.sp,
        profile=profile,
        result=str(scratch / f"{name}.json"),
        gate=str(scratch / f"{name}.gate"),
    )


def _write(results: dict[str, Any], out: Path) -> None:
    from tools.bench.report import draw_chart, markdown_table

    temporary = out / f"{RESULTS}.part"
    temporary.write_text(json.dumps(results, indent=1))
    temporary.replace(out / RESULTS)
    (out / "table.md").write_text(markdown_table(results))
    draw_chart(results, out / "chart.png")


def _one_line(result: dict[str, Any]) -> str:
    if "step_ms" not in result:
        return result.get("error", "failed")
    line = f"{result['step_ms']} ms, {result['tokens_per_s']} tokens/s, {result['peak_gib']} GiB"
    line += f", first loss {result['first_loss']:.5f}, built in {result['build_s']} s"
    if "idle_share" in result:
        line += f", GPU idle {result['idle_share']:.1%}"
    for chunk, row in result.get("sweep", {}).items():
        line += f"\n  chunk {chunk}: {row['step_ms']} ms, {row['peak_gib']} GiB"
    return line + (f"; then {result['error']}" if "error" in result else "")


if __name__ == "__main__":
    sys.exit(main())
