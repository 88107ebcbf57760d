"""What it gains to answer ahead of training, on two GPUs: prints a Markdown table.

    python -m tools.bench.asynchronous --out results/async           a random Qwen2.5 1.5B shape, GSM8K
    python -m tools.bench.asynchronous --out results/try --device cpu --shape tiny --dataset arithmetic --prompts 2 \\
        --generations 2 --new-tokens 8

`turns` and `ahead` have one rollout server on GPU 1 and one trainer on GPU 0, which wait for each other or answer ahead
(`grpo.async_grpo`); in `colocated` both GPUs train (DP=2) and answer (a vLLM engine each). The model is random, so all
answers have the full length, and rewards are drawn, as in tools.bench.rollouts. A GPU is idle while it runs no kernel.
"""

import argparse
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_lora.errors import UserError
from megatron_lora.reporting.metrics_file import read_metrics
from tools.bench.__main__ import write_model
from tools.bench.gpu_use import watch_gpus
from tools.bench.options import check_out
from tools.bench.rollouts import RECIPE, build_step_parser, run_settings
from tools.bench.task import shape_of
from tools.quickstart import run_command
from tools.server import served
from tools.tiny_model import build_tokenizer

APART = ("policy.generation.colocated.enabled=false", "policy.generation.refit=adapter")
# The steps of `ahead` but the first have answers of older weights; the loss is the same in all ways.
CORRECTED = "loss_fn.use_importance_sampling_correction=true"
WAYS = {
    "turns": "one trains, one answers, in turn",
    "ahead": "one trains while one answers",
    "colocated": "both train and answer",
}
# Metric of metrics.jsonl -> (column, format). Medians over the steps after the first WARM_UP.
COLUMNS = {
    "step_time_seconds": ("step, s", "{:.2f}"),
    "samples_per_second": ("answers/s", "{:.1f}"),
    "generation_seconds": ("generation, s", "{:.2f}"),
    "rollout_wait_seconds": ("waited for answers, s", "{:.2f}"),
    "scoring_seconds": ("log-probabilities, s", "{:.2f}"),
    "training_seconds": ("training, s", "{:.2f}"),
    "refit_seconds": ("refit, s", "{:.3f}"),
    "refit_proof_seconds": ("proof, s", "{:.2f}"),
}
WARM_UP = 2
AGE = "staleness_share_"
SERVER_GPU, TRAINER_GPU = 1, 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = build_step_parser("tools.bench.asynchronous", __doc__)
    parser.add_argument("--ways", default="turns,ahead", help=f"of {', '.join(WAYS)}")
    parser.add_argument("--age", type=int, default=1, help="versions that an answer may be behind")
    options = parser.parse_args(arguments)
    options.ways = options.ways.split(",")
    if unknown := [way for way in options.ways if way not in WAYS]:
        raise UserError(f"--ways {','.join(unknown)}: wanted a list of {', '.join(WAYS)}")
    if options.steps <= WARM_UP:
        raise UserError(f"--steps {options.steps}: wanted more than {WARM_UP}, which warm up and are not counted")
    return options


def _ahead(options: argparse.Namespace) -> str:
    return f"grpo.async_grpo={{enabled: true, max_trajectory_age_steps: {options.age}, in_flight_weight_updates: true}}"


def _on(options: argparse.Namespace, gpu: int) -> dict[str, str]:
    return {"CUDA_VISIBLE_DEVICES": str(gpu)} if options.device == "cuda" else {}


def measure(way: str, options: argparse.Namespace, ranks: int, *settings: str, **environment: str) -> dict[str, Any]:
    """Run the trainer: medians of its metrics, the share of answers of each age, and each GPU's idle share. Raises
    CalledProcessError."""
    run_dir = options.out / way
    settings = (*run_settings(options, options.out / "model", run_dir, 1), CORRECTED, *settings, *options.overrides)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    with watch_gpus(lambda: WARM_UP <= len(_steps(run_dir)) < options.steps) as use:
        run_command([sys.executable, *launcher, "-m", "megatron_lora.train", RECIPE, *settings], **environment)
    steps = _steps(run_dir)[WARM_UP:]
    for step in steps:
        step["samples_per_second"] = step["num_samples"] / step["step_time_seconds"]
    found: dict[str, Any] = {
        name: statistics.median(step[name] for step in steps) for name in COLUMNS if name in steps[0]
    }
    ages = sorted(name for name in steps[0] if name.startswith(AGE))
    found["ages"] = {int(name.removeprefix(AGE)): statistics.mean(step[name] for step in steps) for name in ages}
    found["idle"] = use.idle_shares()
    return found


def measure_all(options: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    """(way, what it took), each as it is done."""
    apart = [way for way in ("turns", "ahead") if way in options.ways]
    if apart:
        settings = run_settings(options, options.out / "model", options.out, 1)
        settings += [CORRECTED, *APART, _ahead(options), *options.overrides]
        with served(RECIPE, options.out / "server.log", *settings, **_on(options, SERVER_GPU)) as url:
            for way in apart:
                place = (*APART, f"policy.generation.servers.urls=[{url}]")
                more = (_ahead(options),) if way == "ahead" else ()
                yield way, measure(way, options, 1, *place, *more, **_on(options, TRAINER_GPU))
    if "colocated" in options.ways:
        yield "colocated", measure("colocated", options, 2)


def _steps(run_dir: Path) -> list[dict[str, Any]]:
    return [line for line in read_metrics(run_dir / "metrics.jsonl") if line["kind"] == "train"]


def table(found: Mapping[str, Mapping[str, Any]]) -> str:
    """One row a way."""
    header = ["two GPUs", *(label for label, _ in COLUMNS.values()), "answers by age", "idle: GPU 0, 1"]
    lines = [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
    for way, values in found.items():
        cells = [form.format(values[name]) if name in values else "-" for name, (_, form) in COLUMNS.items()]
        cells.append(", ".join(f"{age}: {share:.0%}" for age, share in values["ages"].items()) or "-")
        cells.append(", ".join(f"{share:.0%}" for share in values["idle"].values()) or "-")
        lines.append(f"| {' | '.join([WAYS[way], *cells])} |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    try:
        options = parse(arguments)
        check_out(options.out)
        shape_of(options.shape)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    options.out = options.out.resolve()
    options.out.mkdir(parents=True)
    write_model(options, options.out / "model")
    build_tokenizer().save_pretrained(options.out / "model")
    found: dict[str, dict[str, Any]] = {}
    try:
        for way, values in measure_all(options):
            found[way] = values
            (options.out / "table.md").write_text(table(found))
            print(table(found), flush=True)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
