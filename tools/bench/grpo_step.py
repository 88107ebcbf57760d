"""A GRPO run of a random model, as tools.bench.rollouts and tools.bench.asynchronous measure its steps."""

import argparse
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import psutil

from megatron_lora.reporting.metrics_file import read_metrics
from tools.bench.options import build_parser
from tools.bench.processes import start
from tools.quickstart import ROOT
from tools.tiny_model import build_tokenizer

RECIPE = "recipes/grpo-gsm8k-qwen2.5-1.5b-megatron.yaml"
LOOK_SECONDS = 0.5
END_SECONDS = 40.0  # torchrun gives its ranks 30 seconds to end
CUT_OFF_SECONDS = 5.0  # a run that is cut off has nothing to save


def build_step_parser(tool: str, description: str | None) -> argparse.ArgumentParser:
    """Options that say how large a step is, and where the run goes."""
    parser = build_parser(tool, description)
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs and table.md; must not exist")
    parser.add_argument("--model", type=Path, help="folder of the model, kept if it is there; default: OUT/model")
    parser.add_argument("--shape", default="qwen2.5-1.5b")
    parser.add_argument("--dataset", default="gsm8k", help="gsm8k or arithmetic")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--generations", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("overrides", nargs="*", help="further dotted.key=value")
    return parser


def prepare(options: argparse.Namespace) -> None:
    """Make the folder of the runs, and the model with its tokenizer at `options.model`."""
    options.out = options.out.resolve()
    options.out.mkdir(parents=True)
    options.model = (options.model or options.out / "model").resolve()
    write_model(options, options.model)
    build_tokenizer().save_pretrained(options.model)


def write_model(options: argparse.Namespace, folder: Path) -> None:
    """A random model's folder with its weights, for engines that read them; in a process of its own, which leaves no
    GPU memory behind."""
    code = "import sys; from pathlib import Path; from tools.bench.task import *; "
    code += "save_random_model(shape_of(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])"
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code, options.shape, str(folder), options.device], check=True)
    print(f"random model of shape {options.shape}: {time.perf_counter() - start:.0f} s", flush=True)


def run_settings(options: argparse.Namespace, run_dir: Path, tensor_parallel: int) -> list[str]:
    """Overrides of RECIPE for a run of the random model, whatever draws its answers."""
    # The byte tokenizer's prompts are three to four times as long as Qwen's own.
    longest = options.new_tokens + 1024
    return [
        f"policy.model_name={options.model}",
        f"policy.precision={'bfloat16' if options.device == 'cuda' else 'float32'}",
        f"policy.max_total_sequence_length={longest}",
        f"policy.sequence_packing.train_mb_tokens={max(16384, longest)}",
        f"policy.megatron_cfg.tensor_model_parallel_size={tensor_parallel}",
        f"policy.megatron_cfg.sequence_parallel={str(tensor_parallel > 1).lower()}",
        f"policy.generation.max_new_tokens={options.new_tokens}",
        # An engine a GPU where the model fits one.
        "policy.generation.vllm_cfg.tensor_parallel_size=null",
        f"grpo.max_num_steps={options.steps}",
        f"grpo.num_prompts_per_step={options.prompts}",
        f"grpo.num_generations_per_prompt={options.generations}",
        "grpo.val_period=0",
        "grpo.val_at_start=false",
        "data.validation=null",
        f"data.train.dataset_name={options.dataset}",
        "env.reward_functions=[{kind: python, function: 'tools.bench.drawn_reward:drawn_reward'}]",
        "checkpointing.enabled=false",
        f"checkpointing.checkpoint_dir={run_dir}",
    ]


def read_steps(run_dir: Path) -> list[dict[str, Any]]:
    """The metrics of the steps that are done."""
    return [line for line in read_metrics(run_dir / "metrics.jsonl") if line["kind"] == "train"]


def within(seconds: float | None) -> Callable[[], float]:
    """For `until`: so many seconds from now on; None: as long as it takes."""
    end_of_time = math.inf if seconds is None else time.monotonic() + seconds
    return lambda: end_of_time


def train(
    settings: Sequence[str],
    ranks: int,
    environment: Mapping[str, str],
    *,
    look: Callable[[], None] = lambda: None,
    until: Callable[[], float] = lambda: math.inf,
    recipe: str = RECIPE,
    log: IO[bytes] | None = None,
) -> None:
    """Run the trainer. look: called twice a second meanwhile; an error of it ends the run. until: gives the
    `time.monotonic()` at which the run is cut off, asked as often. log: gets what the run prints. Raises
    CalledProcessError; TimeoutExpired, with nothing left of the run, where it was cut off."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command = [sys.executable, *launcher, "-m", "megatron_lora.train", recipe, *settings]
    process = start(command, {**os.environ, **environment}, log, how=signal.SIGTERM, cwd=ROOT)
    began = time.monotonic()
    try:
        while process.poll() is None:
            if time.monotonic() > until():
                end(process, CUT_OFF_SECONDS)
                raise subprocess.TimeoutExpired(command, time.monotonic() - began)
            look()
            time.sleep(LOOK_SECONDS)
    finally:
        end(process)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)


def end(process: subprocess.Popen, seconds: float = END_SECONDS) -> None:
    """End it, and what it started: politely, after `seconds` not."""
    if process.poll() is not None:
        return
    started = psutil.Process(process.pid).children(recursive=True)
    process.terminate()
    _, left = psutil.wait_procs([psutil.Process(process.pid), *started], timeout=seconds)
    for one in left:
        one.kill()
    process.wait()
