"""Where a GRPO step's time goes, by the way in which rollouts get their weights: prints a Markdown table.

    python -m tools.bench.rollouts --out results/grpo                      one GPU, a random Qwen2.5 1.5B shape, GSM8K
    python -m tools.bench.rollouts --out results/grpo-tp2 --nproc 2        two GPUs, TP=2 in trainer and vLLM
    python -m tools.bench.rollouts --out results/try --device cpu --shape tiny --dataset arithmetic --prompts 2 \\
        --generations 2 --new-tokens 8

Each way is a run of recipes/grpo-gsm8k-qwen2.5-1.5b-megatron.yaml through the trainer's own command line: vLLM with the
adapter handed over, vLLM with merged weights, and the training model itself. A random model ends no answer, so that all
have the full length; rewards are drawn, so that every step has something to learn. With --timeline the trainer waits
for the device around each phase, so a step takes a little longer.
"""

import argparse
import statistics
import subprocess
import sys
from pathlib import Path

from megatron_lora.errors import UserError
from megatron_lora.runtime.spans import VARIABLE
from tools.bench.grpo_step import build_step_parser, prepare, read_steps, run_settings, train, within
from tools.bench.options import check_out
from tools.bench.processes import end_when_terminated
from tools.bench.task import shape_of
from tools.bench.timeline import draw, last_step

WAYS = {
    "adapter": ("vLLM, adapter", ("policy.generation.backend=vllm", "policy.generation.refit=adapter")),
    "merge": ("vLLM, merged weights", ("policy.generation.backend=vllm", "policy.generation.refit=merge")),
    "native": ("the training model", ("policy.generation.backend=megatron",)),
}
# Metric of metrics.jsonl -> (column, format). Medians over all steps but the first, which warms up.
COLUMNS = {
    "generation_seconds": ("generation, s", "{:.2f}"),
    "generation_tokens_per_second": ("tokens/s", "{:,.0f}"),
    "reward_seconds": ("rewards, s", "{:.2f}"),
    "sleep_seconds": ("engine to sleep, s", "{:.2f}"),
    "scoring_seconds": ("log-probabilities, s", "{:.2f}"),
    "training_seconds": ("training, s", "{:.2f}"),
    "refit_seconds": ("refit, s", "{:.3f}"),
    "refit_proof_seconds": ("proof, s", "{:.2f}"),
    "refit_bytes": ("refit, MB", "{:,.1f}"),
    "step_time_seconds": ("step, s", "{:.2f}"),
    "scoring_model_tokens": ("tokens scored", "{:,.0f}"),
    "training_model_tokens": ("tokens trained", "{:,.0f}"),
    "rollout_logprob_error": ("rollout error, nats", "{:.1e}"),
}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = build_step_parser("tools.bench.rollouts", __doc__)
    parser.add_argument("--nproc", type=int, default=1, help="processes (GPUs)")
    parser.add_argument("--tp", type=int, help="of them a tensor-parallel group of the trainer; default: all")
    parser.add_argument("--limit", type=float, help="end a way after so many seconds; the steps that are done count")
    parser.add_argument("--ways", default=",".join(WAYS), help=f"of {', '.join(WAYS)}")
    parser.add_argument(
        "--timeline", action="store_true", help="also timeline.png: the phases of each way's last step, and its gaps"
    )
    return parser.parse_args(arguments)


def measure(way: str, options: argparse.Namespace) -> dict[str, float]:
    """Run the trainer; medians of its metrics, {} where no step was done. Raises CalledProcessError."""
    run_dir = options.out / way
    settings = [*run_settings(options, run_dir, options.tp or options.nproc), *WAYS[way][1], *options.overrides]
    spans = {VARIABLE: str(_spans(options, way))} if options.timeline else {}
    known = 0

    def look() -> None:
        nonlocal known
        steps = read_steps(run_dir)
        for step in steps[known:]:
            print(f"{way}: step {step['step']} took {step['step_time_seconds']:.2f} s", flush=True)
        known = len(steps)

    try:
        train(settings, options.nproc, spans, look=look, until=within(options.limit))
    except subprocess.TimeoutExpired:
        print(f"{way}: cut off after {options.limit:g} s", flush=True)
    steps = read_steps(run_dir)
    return {
        name: statistics.median(line.get(name, 0.0) for line in steps[1:] or steps) / (1e6 if "bytes" in name else 1)
        for name in (COLUMNS if steps else ())
    }


def _spans(options: argparse.Namespace, way: str) -> Path:
    return options.out / f"timeline-{way}.jsonl"


def table(found: dict[str, dict[str, float]]) -> str:
    """One row a way."""
    header = ["rollouts by", *(label for label, _ in COLUMNS.values())]
    lines = [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
    for way, values in found.items():
        cells = [form.format(values[name]) for name, (_, form) in COLUMNS.items()]
        lines.append(f"| {' | '.join([WAYS[way][0], *cells])} |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    ways = options.ways.split(",")
    try:
        if unknown := [way for way in ways if way not in WAYS]:
            raise UserError(f"--ways {','.join(unknown)}: wanted a list of {', '.join(WAYS)}")
        check_out(options.out)
        shape_of(options.shape)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    end_when_terminated()
    prepare(options)
    found = {}
    for way in ways:
        if values := measure(way, options):
            found[way] = values
            (options.out / "table.md").write_text(table(found))
            print(table({way: values}), flush=True)
    if options.timeline and found:
        timelines = [(WAYS[way][0], last_step(_spans(options, way))) for way in found]
        for label, timeline in timelines:
            print(f"{label}: {timeline.describe()}")
        draw(timelines, options.out / "timeline.png")
        print(f"wrote {options.out / 'timeline.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
