"""The whole way in a few minutes on a CPU: base model, LoRA run at TP=2, export, checks, before and after.

    python -m tools.quickstart            SFT: recipes/sft-quickstart-megatron.yaml
    python -m tools.quickstart grpo       GRPO with vLLM rollouts: recipes/grpo-quickstart-megatron.yaml

Everything is written below `quickstart-output/`. A second call keeps the base model and makes a new run folder.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from megatron_lora.data.arithmetic import arithmetic_rows
from megatron_lora.errors import UserError
from megatron_lora.reporting.console import build_console
from tools.tiny_model import build_base, measure_accuracy

ROOT = Path(__file__).resolve().parent.parent
NUM_PROCESSES = 2
NUM_QUESTIONS = 500  # held out from both the base model's and the run's training
NUM_CHECKED_PROMPTS = 64
LOGIT_TOLERANCE = 1e-4  # fp32; merging rounds W + s B A once


@dataclass(frozen=True)
class Job:
    """One of the two quickstarts."""

    recipe: str
    run_name: str
    picture: str


JOBS = {
    "sft": Job("recipes/sft-quickstart-megatron.yaml", "run", "loss.png"),
    "grpo": Job("recipes/grpo-quickstart-megatron.yaml", "run-grpo", "reward.png"),
}


@dataclass(frozen=True)
class Checks:
    """Largest absolute differences of logits, and accuracies on the held-out questions."""

    adapter_to_merged: float
    base_to_merged: float
    accuracy_before: float
    accuracy_adapter: float
    accuracy_merged: float


def next_run_dir(output_dir: Path, name: str) -> Path:
    """`name`, or where an earlier run has it `name-2`, `name-3`, ...: the first that is free."""
    number = 1
    while (path := output_dir / (name if number == 1 else f"{name}-{number}")).exists():
        number += 1
    return path


def run_command(command: Sequence[str], **environment: str) -> None:
    """Run one of the project's commands from its root, its output passed through. Raises CalledProcessError."""
    subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, check=True)


def train(recipe: str, base_dir: Path, run_dir: Path) -> Path:
    """Run the trainer over two processes; returns the last checkpoint's folder."""
    arguments = ["--standalone", "--nproc-per-node", str(NUM_PROCESSES), "-m", "megatron_lora.train", recipe]
    arguments += [f"policy.model_name={base_dir}", f"checkpointing.checkpoint_dir={run_dir}"]
    print("$ torchrun " + " ".join(arguments), flush=True)
    # torchrun would give each process one thread, which wastes the other cores of a larger machine.
    num_threads = max(1, (os.cpu_count() or 1) // NUM_PROCESSES)
    run_command([sys.executable, "-m", "torch.distributed.run", *arguments], OMP_NUM_THREADS=str(num_threads))
    return run_dir / f"step_{int((run_dir / 'latest_step.txt').read_text())}"


def export(step_dir: Path, base_dir: Path, out_dir: Path) -> tuple[Path, Path]:
    """Both exports of a checkpoint, by the command-line tool: (HF PEFT adapter, merged HF model)."""
    out_dir.mkdir(parents=True, exist_ok=True)
    paths = {mode: out_dir / mode for mode in ("adapter", "merged")}
    for mode, path in paths.items():
        arguments = ["conversion/convert_lora_to_hf.py", "--mode", mode, "--adapter-ckpt", str(step_dir)]
        arguments += ["--hf-ckpt-path", str(path), "--hf-model-name", str(base_dir)]
        print("$ python " + " ".join(arguments), flush=True)
        run_command([sys.executable, *arguments])
    return paths["adapter"], paths["merged"]


@torch.no_grad()
def compute_logits(model: Any, tokenizer: Any, prompts: Sequence[str]) -> torch.Tensor:
    """Logits of the prompts' own tokens, one row after the other: [tokens, vocabulary] fp32."""
    encoded = tokenizer(list(prompts), padding=True, padding_side="right", return_tensors="pt")
    logits = model(input_ids=encoded["input_ids"], attention_mask=encoded["attention_mask"]).logits
    return logits[encoded["attention_mask"].bool()].float()


def check(base_dir: Path, adapter_dir: Path, merged_dir: Path) -> Checks:
    """Load what was exported with transformers and peft, compare the two, and ask the held-out questions."""
    tokenizer: Any = AutoTokenizer.from_pretrained(base_dir, trust_remote_code=False)
    rows = arithmetic_rows("validation")[:NUM_QUESTIONS]
    prompts = [row["prompt"] for row in rows[:NUM_CHECKED_PROMPTS]]

    def load(folder: Path) -> Any:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False).eval()

    base, merged = load(base_dir), load(merged_dir)
    base_logits, merged_logits = (compute_logits(model, tokenizer, prompts) for model in (base, merged))
    accuracy_before = measure_accuracy(base, tokenizer, rows)
    with_adapter = PeftModel.from_pretrained(base, str(adapter_dir)).eval()  # changes `base` in place
    return Checks(
        adapter_to_merged=(compute_logits(with_adapter, tokenizer, prompts) - merged_logits).abs().max().item(),
        base_to_merged=(base_logits - merged_logits).abs().max().item(),
        accuracy_before=accuracy_before,
        accuracy_adapter=measure_accuracy(with_adapter, tokenizer, rows),
        accuracy_merged=measure_accuracy(merged, tokenizer, rows),
    )


def build_summary(checks: Checks, places: dict[str, Path], seconds: float) -> Panel:
    """The last thing that is printed: accuracies, checks and paths."""
    agrees = checks.adapter_to_merged <= LOGIT_TOLERANCE
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    gain = f"{checks.accuracy_before:.1%} before, {checks.accuracy_adapter:.1%} with the adapter, "
    table.add_row("accuracy", f"{gain}{checks.accuracy_merged:.1%} merged ({NUM_QUESTIONS} held-out questions)")
    verdict = Text("equal" if agrees else "NOT EQUAL", style="green" if agrees else "bold red")
    difference = (
        f": largest logit difference {checks.adapter_to_merged:.1e} (base to merged {checks.base_to_merged:.2g})"
    )
    table.add_row("peft adapter and merged", verdict + Text(difference))
    for name, path in places.items():
        table.add_row(name, Text(str(path)))
    return Panel(table, title=f"done in {seconds:.0f} s", border_style="green" if agrees else "red", expand=False)


def run(algorithm: str, output_dir: Path) -> int:
    """The five steps. Returns 0, or 1 where the exports disagree."""
    started = time.monotonic()
    console, job = build_console(), JOBS[algorithm]
    console.rule("[bold]1/4  base model", align="left")
    base_dir = output_dir / "base"
    kept = base_dir.exists()
    build_base(base_dir)
    console.print(f"{'kept' if kept else 'built'} {base_dir}", markup=False)
    run_dir = next_run_dir(output_dir, job.run_name)
    console.rule("[bold]2/4  training", align="left")
    step_dir = train(job.recipe, base_dir, run_dir)
    console.rule("[bold]3/4  export", align="left")
    adapter_dir, merged_dir = export(step_dir, base_dir, run_dir / "export")
    console.rule("[bold]4/4  check against transformers and peft", align="left")
    checks = check(base_dir, adapter_dir, merged_dir)
    places = {
        "picture": run_dir / job.picture,
        "metrics": run_dir / "metrics.jsonl",
        "checkpoint": step_dir,
        "adapter (peft, vLLM)": adapter_dir,
        "merged model": merged_dir,
        "base model": base_dir,
    }
    console.print(build_summary(checks, places, time.monotonic() - started))
    return 0 if checks.adapter_to_merged <= LOGIT_TOLERANCE else 1


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("algorithm", nargs="?", choices=sorted(JOBS), default="sft")
    parser.add_argument("--output-dir", type=Path, default=Path("quickstart-output"))
    options = parser.parse_args(arguments)
    disable_progress_bar()
    try:
        # Relative to the project, so that what is printed and written into adapter_config.json stays short.
        os.chdir(ROOT)
        return run(options.algorithm, options.output_dir)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    except subprocess.CalledProcessError as error:
        print(f"stopped with exit status {error.returncode}; the reason stands above", file=sys.stderr)
        return error.returncode if error.returncode > 0 else 1


if __name__ == "__main__":
    sys.exit(main())
