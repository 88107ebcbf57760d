"""GRPO with every kind of adapter on the quickstart's base, on a CPU: a table and one picture of the rewards.

    python -m tools.kinds                         every kind of KINDS
    python -m tools.kinds lora pissa --steps 20   some of them

Each is the GRPO quickstart's recipe in one process, answers drawn by the training model, or by vLLM where the name says
so. Everything is written below `quickstart-output/`.
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
from transformers.utils.logging import disable_progress_bar

from megatron_lora.reporting.console import build_console
from megatron_lora.reporting.plots import series, smooth
from tools.quickstart import ROOT, next_run_dir, run_command
from tools.tiny_model import build_base

RECIPE = "recipes/grpo-quickstart-megatron.yaml"
PEFT = "policy.megatron_cfg.peft"
VLLM = ("policy.generation.backend=vllm", "policy.generation.vllm_cfg.tensor_parallel_size=1")
NF4 = (f"{PEFT}.quantization=nf4", f"{PEFT}.lora_dtype=float32")
COMMON = (
    "policy.megatron_cfg.tensor_model_parallel_size=1",
    "checkpointing.enabled=false",
    "grpo.val_period=0",
    "logger.tensorboard_enabled=false",
)
# Of a picture's lines: where a reward has been is the mean over so many steps.
WINDOW = 5

# name -> overrides of the recipe. PiSSA starts at the weights' largest singular values, where steps are wide.
KINDS: dict[str, tuple[str, ...]] = {
    "lora": (),
    "canonical_lora": (f"{PEFT}.type=canonical_lora",),
    "rslora": (f"{PEFT}.use_rslora=true",),
    "lora+": (f"{PEFT}.lora_plus_ratio=4",),
    "dora": (f"{PEFT}.type=dora",),
    "dora, vLLM": (f"{PEFT}.type=dora", "policy.generation.refit=merge", *VLLM),
    "pissa": (f"{PEFT}.init_lora_weights=pissa",),
    "pissa, vLLM": (f"{PEFT}.init_lora_weights=pissa", *VLLM),
    "qlora": NF4,
    "qdora": (f"{PEFT}.type=dora", *NF4),
    "modules_to_save": (f"{PEFT}.modules_to_save=[norm,input_layernorm]",),
}


@dataclass(frozen=True)
class Outcome:
    """rewards: the mean of each step. seconds: a step's, median. refit: how weights reached the engine."""

    rewards: list[float]
    seconds: float
    refit: str

    @property
    def first(self) -> float:
        return sum(self.rewards[:WINDOW]) / len(self.rewards[:WINDOW])

    @property
    def last(self) -> float:
        return sum(self.rewards[-WINDOW:]) / len(self.rewards[-WINDOW:])


def train(name: str, base_dir: Path, run_dir: Path, steps: int) -> Outcome:
    """One run. Raises CalledProcessError where it fails."""
    overrides = [*COMMON, "policy.generation.backend=megatron", *KINDS[name]]
    overrides += [f"policy.model_name={base_dir}", f"checkpointing.checkpoint_dir={run_dir}"]
    command = ["-m", "megatron_lora.train", RECIPE, *overrides, f"grpo.max_num_steps={steps}"]
    run_command([sys.executable, *command])
    return read_outcome(run_dir, "vLLM" in name)


def read_outcome(run_dir: Path, engine: bool) -> Outcome:
    records: list[dict[str, Any]] = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    seconds = sorted(series(records, "train", "step_time_seconds")[1])
    megabytes = sorted(series(records, "train", "refit_bytes")[1])
    handed = f"{megabytes[len(megabytes) // 2] / 1e6:.2f} MB a step" if engine else "none: the model itself"
    return Outcome(series(records, "train", "reward")[1], seconds[len(seconds) // 2], handed)


def build_table(found: Mapping[str, Outcome]) -> Table:
    table = Table(title=f"GRPO on the quickstart's base, mean reward of {WINDOW} steps")
    for column in ("kind", "first steps", "last steps", "seconds a step", "refit"):
        table.add_column(column, justify="left" if column in ("kind", "refit") else "right")
    for name, outcome in found.items():
        numbers = (f"{outcome.first:.3f}", f"{outcome.last:.3f}", f"{outcome.seconds:.2f}")
        table.add_row(name, *numbers, outcome.refit)
    return table


def markdown(found: Mapping[str, Outcome]) -> str:
    """The table as the documentation has it."""
    lines = ["| kind | first steps | last steps | refit |", "|---|---|---|---|"]
    lines += [f"| {name} | {o.first:.3f} | {o.last:.3f} | {o.refit} |" for name, o in found.items()]
    return "\n".join(lines) + "\n"


def draw(found: Mapping[str, Outcome], path: Path) -> None:
    """The smoothed reward of every kind over the steps, in one PNG."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=140, layout="constrained")
    axes = figure.add_subplot()
    for number, (name, outcome) in enumerate(found.items()):
        style = "--" if "vLLM" in name else "-"
        values = smooth(outcome.rewards, 1.5)
        color = colormaps["tab20"](number)  # a colour each: the default cycle has ten
        axes.plot(range(1, len(values) + 1), values, style, color=color, linewidth=1.5, label=name)
    axes.set_xlabel("step")
    axes.set_ylabel("mean reward")
    axes.set_title("GRPO with each kind of adapter, the quickstart's base", loc="left", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    partial = path.with_name(f".{path.name}.partial")
    figure.savefig(partial, format="png")
    partial.replace(path)


def run(kinds: Sequence[str], steps: int, output_dir: Path) -> int:
    """Every kind, the table and the picture. Returns 0, or 1 where a reward has not risen."""
    console = build_console()
    base_dir = output_dir / "base"
    build_base(base_dir)
    folder = next_run_dir(output_dir, "kinds")
    found: dict[str, Outcome] = {}
    for name in kinds:
        console.rule(f"[bold]{name}", align="left")
        found[name] = train(name, base_dir, folder / name.replace(", ", "-"), steps)
    draw(found, folder / "kinds.png")
    (folder / "kinds.md").write_text(markdown(found))
    console.print(build_table(found))
    console.print(f"picture: {folder / 'kinds.png'}", markup=False)
    return 0 if all(outcome.last > outcome.first for outcome in found.values()) else 1


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", choices=[[], *KINDS], default=[], help="default: all")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--output-dir", type=Path, default=Path("quickstart-output"))
    options = parser.parse_args(arguments)
    disable_progress_bar()
    os.chdir(ROOT)
    try:
        return run(options.kinds or list(KINDS), options.steps, options.output_dir)
    except subprocess.CalledProcessError as error:
        print(f"stopped with exit status {error.returncode}; the reason stands above", file=sys.stderr)
        return error.returncode if error.returncode > 0 else 1


if __name__ == "__main__":
    sys.exit(main())
