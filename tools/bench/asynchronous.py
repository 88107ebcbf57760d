"""What it gains to answer ahead of training, on two GPUs: prints a Markdown table.

    python -m tools.bench.asynchronous --out results/async           a random Qwen2.5 1.5B shape, GSM8K
    python -m tools.bench.asynchronous --out results/try --device cpu --shape tiny --dataset arithmetic --prompts 2 \\
        --generations 2 --new-tokens 8

`turns` and `ahead` have one rollout server on GPU 1 and one trainer on GPU 0, which wait for each other or answer ahead
(`grpo.async_grpo`); in `colocated` both GPUs train (DP=2) and answer (a vLLM engine each). The model is random, so all
answers have the full length, and rewards are drawn, as in tools.bench.rollouts. A GPU is idle while it runs no kernel.

table.md is written anew after each step, so that a cut-off leaves what was measured up to there; the last column
says how many steps a row is of. The server is started once, for both of its ways, and loads while the first trainer
does. With `--budget` a way is cut off where it would take the time of those behind it; what it waits for the server
is not counted as its own.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from megatron_lora.errors import UserError
from tools.bench.gpu_use import watch_gpus
from tools.bench.grpo_step import RECIPE, build_step_parser, prepare, read_steps, run_settings, train
from tools.bench.options import check_out
from tools.bench.task import shape_of
from tools.server import START_SECONDS, Server, starting

APART = ("policy.generation.colocated.enabled=false", "policy.generation.refit=adapter")
# The server loads while the first trainer starts.
WAITS = f"policy.generation.servers.start_timeout_seconds={START_SECONDS}"
# The steps of `ahead` but the first have answers of older weights; the loss is the same in all ways.
CORRECTED = "loss_fn.use_importance_sampling_correction=true"
# CUDA graphs without torch.compile: an engine is ready sooner, and a token takes longer.
QUICK = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}
# What it says of its start goes to server.log.
TALKATIVE = {"VLLM_LOGGING_LEVEL": "INFO"}
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

_began = time.monotonic()


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = build_step_parser("tools.bench.asynchronous", __doc__)
    parser.add_argument("--ways", default="turns,ahead", help=f"of {', '.join(WAYS)}")
    parser.add_argument("--age", type=int, default=1, help="versions that an answer may be behind")
    parser.add_argument("--budget", type=float, default=math.inf, help="seconds that the whole call may take")
    parser.add_argument("--quick-start", action="store_true", help="vLLM records CUDA graphs without torch.compile")
    options = parser.parse_args(arguments)
    options.ways = options.ways.split(",")
    if unknown := [way for way in options.ways if way not in WAYS]:
        raise UserError(f"--ways {','.join(unknown)}: wanted a list of {', '.join(WAYS)}")
    if options.steps <= WARM_UP:
        raise UserError(f"--steps {options.steps}: wanted more than {WARM_UP}, which warm up and are not counted")
    return options


def settings_of(way: str, options: argparse.Namespace, run_dir: Path) -> list[str]:
    """Overrides of the recipe; of a server, those of `ahead`, which have places for every version that answers."""
    settings = [*run_settings(options, run_dir, 1), CORRECTED]
    settings.append(f"policy.generation.vllm_kwargs={json.dumps({'compilation_config': compilation(options)})}")
    settings += APART if way != "colocated" else ()
    if way == "ahead":
        age = f"max_trajectory_age_steps: {options.age}, in_flight_weight_updates: true"
        settings.append(f"grpo.async_grpo={{enabled: true, {age}}}")
    return [*settings, *options.overrides]


def compilation(options: argparse.Namespace) -> dict[str, Any]:
    """vLLM's `compilation_config`: CUDA graphs of few numbers of answers, and of all of a step's, since each takes
    time at the start."""
    most = options.prompts * options.generations
    sizes = sorted({most, *(1 << power for power in range(most.bit_length()))})
    return {"cudagraph_capture_sizes": sizes} | (QUICK if options.quick_start else {})


def cut_off(budget: float, began: float | None, ways: int) -> float:
    """When (`time.monotonic`) the first of so many ways is cut off that share what is left of the call's seconds.
    began: when it had all that it needs; None: not yet."""
    end = _began + budget
    return end if began is None or math.isinf(end) else began + (end - began) / ways


def measure(
    way: str, options: argparse.Namespace, server: Server | None, found: Callable[[dict], None], ways: int
) -> None:
    """Run the trainer, and give what is known after each step. ways: that are left, with this one. Raises UserError
    where the server has ended."""
    run_dir = options.out / way
    settings = settings_of(way, options, run_dir)
    if server is not None:
        settings += [f"policy.generation.servers.urls=[{server.url}]", WAITS]
    counted = lambda: WARM_UP <= len(read_steps(run_dir)) < options.steps  # noqa: E731
    known, began = 0, None if server is not None else time.monotonic()
    with watch_gpus(counted) as use:

        def look() -> None:
            nonlocal known, began
            if server is not None:
                server.check()
                if began is None and server.answers():
                    began = time.monotonic()
                    say("the rollout server answers")
            steps = read_steps(run_dir)
            if len(steps) > known:
                known = len(steps)
                say(f"{way}: step {known} took {steps[-1]['step_time_seconds']:.2f} s")
                found(summary(steps) | {"idle": use.idle_shares()})

        say(f"{way}: starting the trainer")
        try:
            train(
                settings,
                2 if server is None else 1,
                _on(options, server),
                look=look,
                until=lambda: cut_off(options.budget, began, ways),
            )
        except subprocess.TimeoutExpired as error:
            say(f"{way}: cut off {error.timeout:.0f} s after its start")
        except subprocess.CalledProcessError as error:
            say(f"{way}: the trainer ended with status {error.returncode}")
        look()


def _on(options: argparse.Namespace, server: Server | None) -> dict[str, str]:
    """The trainer's GPUs."""
    alone = server is not None and options.device == "cuda"
    return {"CUDA_VISIBLE_DEVICES": str(TRAINER_GPU)} if alone else {}


def summary(steps: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Medians of the steps' metrics, and the share of answers of each age. Of the last step, while all warm up."""
    counted = [dict(step) for step in steps[WARM_UP:] or steps[-1:]]
    for step in counted:
        step["samples_per_second"] = step["num_samples"] / step["step_time_seconds"]
    values: dict[str, Any] = {
        name: statistics.median(step[name] for step in counted) for name in COLUMNS if name in counted[0]
    }
    ages = sorted(name for name in counted[0] if name.startswith(AGE))
    values["ages"] = {int(name.removeprefix(AGE)): statistics.mean(step[name] for step in counted) for name in ages}
    values["steps"] = max(0, len(steps) - WARM_UP)
    return values


def measure_all(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """way -> what it took; table.md has what is known so far."""
    found: dict[str, dict[str, Any]] = {}
    with ExitStack() as stack:
        server: Server | None = None
        if set(options.ways) & {"turns", "ahead"}:
            place = {"CUDA_VISIBLE_DEVICES": str(SERVER_GPU)} if options.device == "cuda" else {}
            settings = settings_of("ahead", options, options.out)
            say("starting the rollout server")
            server = stack.enter_context(starting(RECIPE, options.out / "server.log", *settings, **TALKATIVE, **place))
        ways = sorted(options.ways, key=list(WAYS).index)
        for number, way in enumerate(ways):
            if time.monotonic() >= _began + options.budget:
                say(f"no time is left for {', '.join(ways[number:])}")
                break
            if way == "colocated":  # the server's GPU is wanted
                stack.close()
                server = None

            def note(values: dict[str, Any], way: str = way) -> None:
                found[way] = values
                (options.out / "table.md").write_text(table(found))

            measure(way, options, server, note, len(ways) - number)
            if way in found:
                print(table(found), flush=True)
    return found


def say(what: str) -> None:
    print(f"[{time.monotonic() - _began:.0f} s] {what}", flush=True)


def table(found: Mapping[str, Mapping[str, Any]]) -> str:
    """One row a way."""
    header = ["two GPUs", *(label for label, _ in COLUMNS.values()), "answers by age", "idle: GPU 0, 1", "steps"]
    lines = [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
    for way, values in found.items():
        cells = [form.format(values[name]) if name in values else "-" for name, (_, form) in COLUMNS.items()]
        cells.append(", ".join(f"{age}: {share:.0%}" for age, share in values["ages"].items()) or "-")
        cells.append(", ".join(f"{share:.0%}" for share in values["idle"].values()) or "-")
        cells.append(str(values["steps"] or "0 (the last one that warms up)"))
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
    prepare(options)
    say(f"the model is at {options.model}")
    try:
        found = measure_all(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0 if len(found) == len(options.ways) else 1


if __name__ == "__main__":
    sys.exit(main())
