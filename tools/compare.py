"""One recipe on both backends, side by side: losses, gradient norms, time and memory, in a table and a picture.

    python -m tools.compare                                    the quickstart's recipe, 20 steps, two processes
    python -m tools.compare RECIPE.yaml --nproc 4 key=value    any recipe; overrides go to both runs

Only `policy.megatron_cfg.enabled` differs between the two runs. Exit status 1 where losses or gradient norms differ by
more than `--tolerance` (relative), which is meant for fp32.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from megatron_lora.reporting.console import build_console
from megatron_lora.reporting.plots import series
from tools.quickstart import ROOT, next_run_dir, run_command
from tools.tiny_model import build_base

RECIPE = "recipes/sft-quickstart-megatron.yaml"
QUICKSTART_OVERRIDES = ("sft.max_num_steps=20", "sft.val_period=0", "sft.val_at_start=false", "sft.val_at_end=false")
BACKENDS = {"megatron": "Megatron-Core", "dtensor": "transformers + peft + FSDP2"}
COLORS = {"megatron": "#2563eb", "dtensor": "#ea580c"}
Records = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Difference:
    """The largest relative difference of a metric between the two runs, and the step where it is."""

    name: str
    value: float
    step: int


def run_backend(backend: str, recipe: str, overrides: Sequence[str], num_processes: int, run_dir: Path) -> Records:
    """Train with one backend; returns its metrics' lines. Raises CalledProcessError."""
    arguments = ["--standalone", "--nproc-per-node", str(num_processes), "-m", "megatron_lora.train", recipe]
    arguments += [*overrides, f"policy.megatron_cfg.enabled={str(backend == 'megatron').lower()}"]
    arguments += [f"checkpointing.checkpoint_dir={run_dir}"]
    print("$ torchrun " + " ".join(arguments), flush=True)
    num_threads = max(1, (os.cpu_count() or 1) // num_processes)
    run_command([sys.executable, "-m", "torch.distributed.run", *arguments], OMP_NUM_THREADS=str(num_threads))
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def largest_difference(left: Records, right: Records, name: str) -> Difference:
    """Over the steps of both runs. Raises ValueError where they took different steps."""
    (steps, ours), (other_steps, theirs) = series(left, "train", name), series(right, "train", name)
    if steps != other_steps or not steps:
        raise ValueError(f"the runs logged {name} at different steps: {steps} and {other_steps}")
    relative = [abs(a - b) / max(abs(a), abs(b), 1e-30) for a, b in zip(ours, theirs, strict=True)]
    worst = max(range(len(steps)), key=relative.__getitem__)
    return Difference(name, relative[worst], steps[worst])


def median(records: Records, name: str) -> float:
    """Over all steps but the first, which also builds and compiles; 0 where the metric is not there."""
    _, values = series(records, "train", name)
    values = sorted(values[1:] or values)
    return values[len(values) // 2] if values else 0.0


def build_table(runs: Mapping[str, Records], differences: Sequence[Difference]) -> Table:
    table = Table(title="both backends, the same recipe")
    table.add_column("")
    for backend in runs:
        table.add_column(f"{backend}\n{BACKENDS[backend]}", justify="right")
    table.add_column("difference", justify="right")
    for difference in differences:
        for label, pick in (("first", 0), ("last", -1)):
            values = [series(records, "train", difference.name)[1][pick] for records in runs.values()]
            worst = f"{difference.value:.1e} (step {difference.step})" if pick == -1 else ""
            table.add_row(f"{difference.name}, {label} step", *(f"{value:.7g}" for value in values), worst)
    rows = (
        ("seconds a step (median)", "step_time_seconds", "{:.3f}"),
        ("tokens a second (median)", "tokens_per_second", "{:,.0f}"),
        ("peak memory a rank, GiB", "peak_memory_gib", "{:.2f}"),
    )
    for label, name, form in rows:
        values = [median(records, name) for records in runs.values()]
        ratio = f"x {values[1] / values[0]:.2f}" if values[0] else ""
        table.add_row(label, *(form.format(value) for value in values), ratio)
    return table


def draw(runs: Mapping[str, Records], path: Path) -> None:
    """Loss, gradient norm and step time of both runs in one PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.8), dpi=140, layout="constrained")
    panels = (("loss", "loss"), ("grad_norm", "gradient norm"), ("step_time_seconds", "seconds a step"))
    for axes, (name, label) in zip(figure.subplots(1, 3), panels, strict=True):
        for backend, records in runs.items():
            # Curves that agree lie on each other: one is thin and dashed.
            style = {"linewidth": 3.0, "alpha": 0.5} if backend == "megatron" else {"linewidth": 1.2, "linestyle": "--"}
            axes.plot(*series(records, "train", name), color=COLORS[backend], label=BACKENDS[backend], **style)
        axes.set_xlabel("step")
        axes.set_title(label, loc="left", fontsize=11)
        axes.spines[["top", "right"]].set_visible(False)
        if name == "step_time_seconds":
            axes.set_ylim(bottom=0)
    figure.axes[0].legend(frameon=False, fontsize=8)
    partial = path.with_name(f".{path.name}.partial")
    figure.savefig(partial, format="png")
    partial.replace(path)


def compare(options: argparse.Namespace) -> int:
    """Both runs, the table and the picture. Returns 0, or 1 where they disagree."""
    console = build_console()
    overrides = list(options.overrides)
    if options.recipe == RECIPE:
        base_dir = options.output_dir / "base"
        build_base(base_dir)
        overrides = [f"policy.model_name={base_dir}", *QUICKSTART_OVERRIDES, *overrides]
    folder = next_run_dir(options.output_dir, "compare")
    runs: dict[str, Records] = {}
    for backend in BACKENDS:
        console.rule(f"[bold]{BACKENDS[backend]}", align="left")
        runs[backend] = run_backend(backend, options.recipe, overrides, options.nproc, folder / backend)
    differences = [largest_difference(runs["megatron"], runs["dtensor"], name) for name in ("loss", "grad_norm")]
    draw(runs, folder / "compare.png")
    console.print(build_table(runs, differences))
    agrees = all(difference.value <= options.tolerance for difference in differences)
    verdict = "equal" if agrees else "NOT EQUAL"
    console.print(f"{verdict} within {options.tolerance:g}; picture: {folder / 'compare.png'}", markup=False)
    return 0 if agrees else 1


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default=RECIPE)
    parser.add_argument("overrides", nargs="*", help="dotted.key=value, for both runs")
    parser.add_argument("--nproc", type=int, default=2, help="processes of each run")
    parser.add_argument("--tolerance", type=float, default=1e-4, help="largest relative difference")
    parser.add_argument("--output-dir", type=Path, default=Path("quickstart-output"))
    options = parser.parse_args(arguments)
    if "=" in options.recipe:
        options.recipe, options.overrides = RECIPE, [options.recipe, *options.overrides]
    os.chdir(ROOT)
    try:
        return compare(options)
    except subprocess.CalledProcessError as error:
        print(f"stopped with exit status {error.returncode}; the reason stands above", file=sys.stderr)
        return error.returncode if error.returncode > 0 else 1


if __name__ == "__main__":
    sys.exit(main())
