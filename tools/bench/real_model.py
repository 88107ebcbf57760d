"""A real pretrained model on one GPU: SFT on GSM8K, then GRPO from its adapter, with accuracies before and after.

    MEGATRON_LORA_GSM8K=<folder> python -m tools.bench.real_model results/real-model --report OUT [--gguf FILE]

Stages that are done are left out, and a stage that the time is up for (`--minutes`) saves a checkpoint and ends: the
same command again goes on. Each call writes what there is into `--report`: summary.json, the curves as pictures and the
two metrics.jsonl. Recipes: recipes/{sft,grpo}-gsm8k-smollm2-135m-megatron.yaml.
"""

import argparse
import json
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tools.smollm2 import build_model

ROOT = Path(__file__).resolve().parents[2]
RECIPES = {name: ROOT / "recipes" / f"{name}-gsm8k-smollm2-135m-megatron.yaml" for name in ("sft", "grpo")}
# What a trainer may still take after the signal (the step under way and its checkpoint), and what must be left to begin
# a stage: an engine's start cannot be cut short.
SECONDS_TO_SAVE, SECONDS_TO_START = 30.0, 150.0
# metrics.jsonl -> medians over a run's steps but the first.
MEDIANS = (
    "step_time_seconds",
    "tokens_per_second",
    "num_tokens",
    "peak_memory_gib",
    "generation_seconds",
    "generation_tokens_per_second",
    "response_length",
    "scoring_seconds",
    "training_seconds",
    "refit_seconds",
    "refit_proof_seconds",
    "refit_probe_error",
    "refit_probe_tolerance",
    "rollout_logprob_error",
)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench.real_model",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("work", type=Path, help="folder of the model and the runs; kept between calls")
    parser.add_argument("--report", type=Path, required=True, help="folder of the few files to look at")
    parser.add_argument("--gguf", type=Path, help="the model's weights, where there is no package registry")
    parser.add_argument("--minutes", type=float, default=9.0, help="how long this call may take")
    parser.add_argument("--questions", type=int, help="only so many test questions")
    parser.add_argument("--sft", nargs="*", default=[], help="further dotted.key=value of the SFT run")
    parser.add_argument("--grpo", nargs="*", default=[], help="further dotted.key=value of the GRPO run")
    return parser.parse_args(arguments)


class Study:
    """The stages in order. Each returns whether it is done."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.work: Path = options.work.resolve()
        self.deadline = time.monotonic() + 60 * options.minutes
        self.model = self.work / "model"
        self.accuracy = self.work / "accuracy.json"

    def run(self) -> bool:
        """Whether all is done."""
        self.work.mkdir(parents=True, exist_ok=True)
        if not self.model.is_dir():
            build_model(self.model, self.options.gguf)
        if not self._train("sft", self.options.sft):
            return False
        adapter = self._last_adapter("sft")
        if not self._measure({"base": None, "sft": adapter}):
            return False
        start = f"policy.megatron_cfg.peft.init_adapter={adapter}"
        return self._train("grpo", [start, *self.options.grpo]) and self._measure({"grpo": self._last_adapter("grpo")})

    def _left(self) -> float:
        return self.deadline - time.monotonic()

    def _train(self, name: str, overrides: Sequence[str]) -> bool:
        done = self.work / f"{name}.done"
        if done.exists():
            return True
        if self._left() < SECONDS_TO_START:
            return False
        settings = [f"policy.model_name={self.model}", f"checkpointing.checkpoint_dir={self.work / name}", *overrides]
        with (self.work / f"{name}.log").open("a") as log:
            command = [sys.executable, "-m", "megatron_lora.train", str(RECIPES[name]), *settings]
            trainer = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
            stopped = False
            try:
                trainer.wait(max(1.0, self._left() - SECONDS_TO_SAVE))
            except subprocess.TimeoutExpired:
                stopped = True
                trainer.send_signal(signal.SIGTERM)
            status = trainer.wait()
        if status != 0:
            raise SystemExit(f"{name} ended with status {status}:\n{self._end_of_log(name)}")
        if not stopped:
            done.touch()
        return not stopped

    def _end_of_log(self, name: str) -> str:
        return "\n".join((self.work / f"{name}.log").read_text().splitlines()[-60:])

    def _last_adapter(self, name: str) -> Path:
        run = self.work / name
        return run / f"step_{(run / 'latest_step.txt').read_text().strip()}" / "hf_adapter"

    def _measure(self, adapters: dict[str, Path | None]) -> bool:
        known = json.loads(self.accuracy.read_text()) if self.accuracy.exists() else {}
        missing = [
            name if folder is None else f"{name}={folder}" for name, folder in adapters.items() if name not in known
        ]
        if not missing:
            return True
        if self._left() < SECONDS_TO_START:
            return False
        limit = [] if self.options.questions is None else ["--questions", str(self.options.questions)]
        command = ["-m", "tools.bench.gsm8k_accuracy", str(self.model), *missing, "--out", str(self.accuracy), *limit]
        subprocess.run([sys.executable, *command], cwd=ROOT, check=True)
        return True

    def report(self) -> dict[str, Any]:
        """Write `--report` from what there is."""
        report: Path = self.options.report
        report.mkdir(parents=True, exist_ok=True)
        summary: dict[str, Any] = {}
        for name in RECIPES:
            run = self.work / name
            if (run / "metrics.jsonl").exists():
                shutil.copyfile(run / "metrics.jsonl", report / f"{name}_metrics.jsonl")
                summary[name] = summarize(run / "metrics.jsonl")
            for picture in run.glob("*.png"):
                shutil.copyfile(picture, report / f"{name}_{picture.name}")
        if self.accuracy.exists():
            summary["accuracy"] = json.loads(self.accuracy.read_text())
        (report / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
        return summary


def summarize(metrics: Path) -> dict[str, Any]:
    """What the docs say of a run: medians, ends of its curves, and how near the proof came to its tolerance."""
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "train"]
    later = steps[1:] or steps
    found: dict[str, Any] = {"steps": len(steps)}
    found["medians"] = {
        name: statistics.median(line[name] for line in later) for name in MEDIANS if later and name in later[0]
    }
    for name in ("loss", "reward"):
        if steps and name in steps[0]:
            values = [line[name] for line in steps]
            found[name] = {
                "first_10": statistics.mean(values[:10]),
                "last_10": statistics.mean(values[-10:]),
                "largest": max(values),
            }
    if steps and "refit_probe_error" in steps[0]:
        found["largest_probe_error"] = max(line["refit_probe_error"] for line in steps)
        found["nearest_to_tolerance"] = max(line["refit_probe_error"] / line["refit_probe_tolerance"] for line in steps)
        found["largest_rollout_error"] = max(line["rollout_logprob_error"] for line in steps)
    found["validation"] = [
        {name: line[name] for name in ("step", "loss", "accuracy", "tokens_per_second") if name in line}
        for line in lines
        if line["kind"] == "validation"
    ]
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    study = Study(parse(arguments))
    try:
        done = study.run()
    finally:
        print(json.dumps(study.report(), indent=2), flush=True)
    print("all stages are done" if done else "the time is up: the same command goes on from here")
    return 0


if __name__ == "__main__":
    sys.exit(main())
