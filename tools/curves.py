"""Learning curves of the loop that draws answers, on the quickstart's base and a CPU: a table and a picture each.

    python -m tools.curves calculator       answers of two turns: the policy learns to leave sums to a tool
    python -m tools.curves ages             asynchronous GRPO at several ages, by one rollout server (vLLM)
    python -m tools.curves distillation     taught by an adapter on the same base, that of a short SFT
    python -m tools.curves candidates       the same over the teacher's most likely tokens, by each divergence

One process trains. Everything is written below `quickstart-output/`.
"""

import argparse
import json
import os
import random
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers.utils.logging import disable_progress_bar

from megatron_lora.data.arithmetic import arithmetic_rows
from megatron_lora.errors import UserError
from megatron_lora.reporting.metrics_file import read_metrics
from megatron_lora.reporting.plots import series, smooth
from tools.quickstart import ROOT, next_run_dir, run_command
from tools.server import served
from tools.tiny_model import EOS, build_base

SFT, GRPO, DISTILLATION = (f"recipes/{name}-quickstart-megatron.yaml" for name in ("sft", "grpo", "distillation"))
COMMON = (
    "policy.megatron_cfg.tensor_model_parallel_size=1",
    "policy.generation.vllm_cfg.tensor_parallel_size=1",
    "logger.tensorboard_enabled=false",
)
BY_ITSELF = ("policy.generation.backend=megatron",)
WINDOW = 5  # steps that the table's first and last numbers are means over
AGES = (0, 1, 4)
NUM_CANDIDATES = 8
# Of the rows that warm a policy up for the calculator: how many call it.
CALL_SHARE = 0.5
WARM_UP_STEPS = 200
# The base has never written a sign: its head has to learn to.
LINEARS = "policy.megatron_cfg.peft.target_modules=[linear_qkv,linear_proj,linear_fc1,linear_fc2,output_layer]"


@dataclass(frozen=True)
class Curve:
    """A run's rewards by step, and further columns of the table."""

    rewards: list[float]
    more: Mapping[str, str]

    def mean(self, steps: slice) -> float:
        chosen = self.rewards[steps]
        return sum(chosen) / len(chosen)


def final_answer_is_right(answer: str, final_turn: str) -> float:
    """1 where the last turn is the answer, whoever worked it out."""
    return float(final_turn.strip() == answer.strip())


def train(recipe: str, base: Path, run_dir: Path, *overrides: str) -> Path:
    """One run; returns its folder. Raises CalledProcessError where it fails."""
    own = (f"policy.model_name={base}", f"checkpointing.checkpoint_dir={run_dir}")
    run_command([sys.executable, "-m", "megatron_lora.train", recipe, *COMMON, *own, *overrides])
    return run_dir


def means(run_dir: Path, names: Sequence[str]) -> dict[str, str]:
    """`first -> last` of further metrics, means over WINDOW steps."""
    records = read_metrics(run_dir / "metrics.jsonl")
    found = {name: series(records, "train", name)[1] for name in names}
    shown = {}
    for name, values in found.items():
        first, last = values[:WINDOW], values[-WINDOW:]
        shown[name] = f"{sum(first) / len(first):.2f} -> {sum(last) / len(last):.2f}"
    return shown


def read_curve(run_dir: Path, *names: str) -> Curve:
    return Curve(series(read_metrics(run_dir / "metrics.jsonl"), "train", "reward")[1], means(run_dir, names))


def calculator(base: Path, folder: Path, steps: int) -> dict[str, Curve]:
    """A policy that calls the tool in some answers, then GRPO."""
    draws = random.Random(0)
    rows = []
    for row in arithmetic_rows("train"):
        sum_, result = row["prompt"].removesuffix("="), row["completion"]
        calls = draws.random() < CALL_SHARE
        # As a rollout is: the call ends a turn, the tool writes `=` and the result, the next turn is the answer.
        rows.append({"prompt": row["prompt"], "completion": f"{sum_}{EOS}={result}{result}" if calls else result})
    path = folder / "warm-up.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = ("data.train.dataset_name=null", f"data.train.data_path={path}", "data.train.split=null")
    quiet = (f"sft.max_num_steps={WARM_UP_STEPS}", "sft.val_period=0", "sft.val_at_start=false")
    faster = (LINEARS, "policy.megatron_cfg.optimizer.lr=5.0e-3")
    warm = train(SFT, base, folder / "warm-up", *data, *quiet, *faster)
    reward = "{kind: python, name: exact_at_last, function: 'tools.curves:final_answer_is_right'}"
    run_dir = train(
        GRPO,
        base,
        folder / "calculator",
        *BY_ITSELF,
        LINEARS,
        f"policy.megatron_cfg.peft.init_adapter={warm / f'step_{WARM_UP_STEPS}' / 'hf_adapter'}",
        f"grpo.max_num_steps={steps}",
        "grpo.max_rollout_turns=2",
        "env.environment.path=megatron_lora.rollout.calculator:Calculator",
        f"env.reward_functions=[{reward}]",
    )
    return {"with a calculator": read_curve(run_dir, "num_turns", "environment_tokens", "environment_errors")}


def distillation(base: Path, folder: Path, steps: int) -> dict[str, Curve]:
    """A teacher that SFT made, then a fresh adapter that it teaches."""
    run_dir = _taught(base, folder / "distillation", _teacher(base, folder), steps)
    return {"distillation": read_curve(run_dir, "teacher_kl", "teacher_kl_k3")}


def candidates(base: Path, folder: Path, steps: int) -> dict[str, Curve]:
    """The same, with the divergence summed over the teacher's most likely tokens."""
    teacher, found = _teacher(base, folder), {}
    for divergence in ("reverse", "forward"):
        keys = (f"distillation.topk_logits_k={NUM_CANDIDATES}", f"loss_fn.kl_type={divergence}")
        run_dir = _taught(base, folder / divergence, teacher, steps, *keys)
        found[divergence] = read_curve(run_dir, "teacher_kl", "reverse_kl", "forward_kl", "teacher_candidate_mass")
    return found


def _teacher(base: Path, folder: Path) -> Path:
    return train(SFT, base, folder / "teacher") / "step_60" / "hf_adapter"


def _taught(base: Path, run_dir: Path, teacher: Path, steps: int, *keys: str) -> Path:
    given = (f"teacher.adapter={teacher}", f"distillation.max_num_steps={steps}")
    return train(DISTILLATION, base, run_dir, *BY_ITSELF, *given, *keys)


def ages(base: Path, folder: Path, steps: int) -> dict[str, Curve]:
    """Asynchronous GRPO with each age, all by one server."""
    ahead = ("policy.generation.colocated.enabled=false", "loss_fn.use_importance_sampling_correction=true")
    found = {}
    oldest = (*COMMON, f"policy.model_name={base}", *ahead, _ahead(max(AGES)))
    with served(GRPO, folder / "server.log", *oldest) as url:
        for age in AGES:
            place = f"policy.generation.servers.urls=[{url}]"
            run_dir = train(
                GRPO, base, folder / f"age-{age}", *ahead, place, _ahead(age), f"grpo.max_num_steps={steps}"
            )
            names = ("staleness_mean", "sampling_importance_ratio", "rollout_wait_seconds", "step_time_seconds")
            found[f"age {age}"] = read_curve(run_dir, *names)
    return found


def _ahead(age: int) -> str:
    return f"grpo.async_grpo={{enabled: true, max_trajectory_age_steps: {age}, in_flight_weight_updates: true}}"


def markdown(found: Mapping[str, Curve]) -> str:
    """The table as the documentation has it."""
    more = list(next(iter(found.values())).more)
    head = f"| run | reward, first {WINDOW} steps | last {WINDOW} | {' | '.join(more)} |"
    lines = [head, "|---|---|---|" + "---|" * len(more)]
    for name, curve in found.items():
        first, last = curve.mean(slice(None, WINDOW)), curve.mean(slice(-WINDOW, None))
        lines.append(f"| {name} | {first:.3f} | {last:.3f} | {' | '.join(curve.more.values())} |")
    return "\n".join(lines) + "\n"


def draw(found: Mapping[str, Curve], path: Path, title: str) -> None:
    """The smoothed reward of each run over the steps, in one PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), dpi=140, layout="constrained")
    axes = figure.add_subplot()
    for name, curve in found.items():
        axes.plot(range(1, len(curve.rewards) + 1), smooth(curve.rewards, 1.5), linewidth=1.5, label=name)
    axes.set_xlabel("step")
    axes.set_ylabel("mean reward")
    axes.set_title(title, loc="left", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    partial = path.with_name(f".{path.name}.partial")
    figure.savefig(partial, format="png")
    partial.replace(path)


RUNS = {
    "calculator": (calculator, "GRPO with a calculator, the quickstart's base"),
    "ages": (ages, "Asynchronous GRPO by the age of answers, the quickstart's base"),
    "distillation": (distillation, "On-policy distillation, the quickstart's base"),
    "candidates": (
        candidates,
        f"Distillation over the teacher's {NUM_CANDIDATES} most likely tokens, the quickstart's base",
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0, or 1 where a reward has not risen or a run failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", choices=RUNS)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--output-dir", type=Path, default=Path("quickstart-output"))
    options = parser.parse_args(arguments)
    disable_progress_bar()
    os.chdir(ROOT)
    make, title = RUNS[options.run]
    output_dir = options.output_dir.absolute()
    build_base(output_dir / "base")
    folder = next_run_dir(output_dir, f"curves-{options.run}")
    folder.mkdir(parents=True)
    try:
        found = make(output_dir / "base", folder, options.steps)
    except subprocess.CalledProcessError as error:
        print(f"stopped with exit status {error.returncode}; the reason stands above", file=sys.stderr)
        return 1
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    draw(found, folder / f"{options.run}.png", title)
    (folder / f"{options.run}.md").write_text(markdown(found))
    print(markdown(found), f"picture: {folder / f'{options.run}.png'}", sep="\n")
    risen = (curve.mean(slice(-WINDOW, None)) > curve.mean(slice(None, WINDOW)) for curve in found.values())
    return 0 if all(risen) else 1


if __name__ == "__main__":
    sys.exit(main())
