"""How long a run of the 1.5B recipe takes to its first step, by part, and how long its first steps take: a cold start,
then warm ones. Prints a Markdown table.

    python -m tools.bench.start --out results/start                      one GPU, a random Qwen2.5 1.5B shape, GSM8K
    python -m tools.bench.start --out results/try --device cpu --shape tiny --dataset arithmetic
"""

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from megatron_lora.errors import UserError
from tools.bench.grpo_step import prepare, read_steps, train, within
from tools.bench.options import build_parser, check_out
from tools.bench.processes import end_when_terminated
from tools.bench.task import shape_of

RECIPE = "recipes/sft-gsm8k-qwen2.5-1.5b-megatron.yaml"
# What the run says after its first step (`megatron_lora.runtime.activity`).
SAID = re.compile(r"the first step was done ([\d.]+) s after the start: (.*)")
STEPS = 4


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = build_parser("tools.bench.start", __doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs, table.md and start.json")
    parser.add_argument("--model", type=Path, help="folder of the model, kept if it is there; default: OUT/model")
    parser.add_argument("--shape", default="qwen2.5-1.5b")
    parser.add_argument("--dataset", default="gsm8k", help="gsm8k or arithmetic")
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--limit", type=float, default=180.0, help="seconds for a run")
    parser.add_argument("overrides", nargs="*", help="further dotted.key=value")
    return parser.parse_args(arguments)


def settings_of(options: argparse.Namespace, run_dir: Path) -> list[str]:
    return [
        f"policy.model_name={options.model}",
        f"policy.precision={'bfloat16' if options.device == 'cuda' else 'float32'}",
        f"sft.max_num_steps={STEPS}",
        "sft.val_at_start=false",
        "sft.val_period=0",
        "sft.val_at_end=false",
        f"data.train.dataset_name={options.dataset}",
        "data.validation=null",
        "checkpointing.enabled=false",
        f"checkpointing.checkpoint_dir={run_dir}",
        *options.overrides,
    ]


def measure(options: argparse.Namespace, number: int) -> dict[str, Any]:
    """One run from the command to its last step."""
    run_dir, log = options.out / f"run-{number}", options.out / f"run-{number}.txt"
    found: dict[str, Any] = {}
    try:
        with log.open("wb") as stream:
            train(settings_of(options, run_dir), 1, {}, until=within(options.limit), recipe=RECIPE, log=stream)
    except subprocess.SubprocessError as error:
        found["error"] = str(error)[-200:]
    found["steps_s"] = [step["step_time_seconds"] for step in read_steps(run_dir)]
    if said := SAID.search(log.read_text(errors="replace")):
        found |= {"first_step_done_s": float(said[1]), "parts": said[2]}
    return found


def table(runs: list[dict[str, Any]]) -> str:
    lines = ["| run | first step done after | first step | second step | parts, s |", "|---|---|---|---|---|"]
    for number, run in enumerate(runs):
        steps = [f"{seconds:.2f} s" for seconds in run["steps_s"][:2]] + ["", ""]
        after = f"{run['first_step_done_s']:.1f} s" if "first_step_done_s" in run else run.get("error", "")
        name = "cold" if number == 0 else "warm"
        lines.append(f"| {name} | {after} | {steps[0]} | {steps[1]} | {run.get('parts', '')} |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    try:
        check_out(options.out)
        shape_of(options.shape)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    end_when_terminated()
    prepare(options)
    runs: list[dict[str, Any]] = []
    for number in range(options.runs):
        runs.append(measure(options, number))
        (options.out / "start.json").write_text(json.dumps(runs, indent=1))
        (options.out / "table.md").write_text(table(runs))
        print(f"run {number}: {runs[-1]}", flush=True)
    print(table(runs))
    return 0 if all("first_step_done_s" in run for run in runs) else 1


if __name__ == "__main__":
    sys.exit(main())
