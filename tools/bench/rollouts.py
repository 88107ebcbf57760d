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
import json
import random
import statistics
import sys
from pathlib import Path

from megatron_lora.errors import UserError
from megatron_lora.runtime.spans import VARIABLE
from tools.bench.__main__ import write_model
from tools.bench.options import build_parser, check_out
from tools.bench.task import shape_of
from tools.bench.timeline import draw, last_step
from tools.quickstart import run_command
from tools.tiny_model import build_tokenizer

RECIPE = "recipes/grpo-gsm8k-qwen2.5-1.5b-megatron.yaml"
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


def drawn_reward(prompt: str, completion: str, answer: str, extra: dict) -> float:
    """A reward that differs between a group's answers, whatever they are."""
    return random.random()


def build_step_parser(tool: str, description: str | None) -> argparse.ArgumentParser:
    """Options that say how large a step is, and where the run goes."""
    parser = build_parser(tool, description)
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs and table.md; must not exist")
    parser.add_argument("--shape", default="qwen2.5-1.5b")
    parser.add_argument("--dataset", default="gsm8k", help="gsm8k or arithmetic")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--generations", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("overrides", nargs="*", help="further dotted.key=value")
    return parser


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = build_step_parser("tools.bench.rollouts", __doc__)
    parser.add_argument("--nproc", type=int, default=1, help="processes (GPUs), all one tensor-parallel group")
    parser.add_argument("--ways", default=",".join(WAYS), help=f"of {', '.join(WAYS)}")
    parser.add_argument(
        "--timeline", action="store_true", help="also timeline.png: the phases of each way's last step, and its gaps"
    )
    return parser.parse_args(arguments)


def run_settings(options: argparse.Namespace, model: Path, run_dir: Path, tensor_parallel: int) -> list[str]:
    """Overrides of RECIPE for a run of a random model, whatever draws its answers."""
    # The byte tokenizer's prompts are three to four times as long as Qwen's own.
    longest = options.new_tokens + 1024
    return [
        f"policy.model_name={model}",
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
        "env.reward_functions=[{kind: python, function: 'tools.bench.rollouts:drawn_reward'}]",
        "checkpointing.enabled=false",
        f"checkpointing.checkpoint_dir={run_dir}",
    ]


def measure(way: str, model: Path, options: argparse.Namespace) -> dict[str, float]:
    """Run the trainer; medians of its metrics. Raises CalledProcessError."""
    run_dir = options.out / way
    settings = run_settings(options, model, run_dir, options.nproc)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(options.nproc)]
    command = [sys.executable, *launcher, "-m", "megatron_lora.train", RECIPE, *settings, *WAYS[way][1]]
    environment = {VARIABLE: str(_spans(options, way))} if options.timeline else {}
    run_command([*command, *options.overrides], **environment)
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "train"]
    return {
        name: statistics.median(line.get(name, 0.0) for line in steps[1:] or steps) / (1e6 if "bytes" in name else 1)
        for name in COLUMNS
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
    options.out = options.out.resolve()
    options.out.mkdir(parents=True)
    model = options.out / "model"
    write_model(options, model)
    build_tokenizer().save_pretrained(model)
    found = {}
    for way in ways:
        found[way] = measure(way, model, options)
        (options.out / "table.md").write_text(table(found))
    print(table(found))
    if options.timeline:
        timelines = [(WAYS[way][0], last_step(_spans(options, way))) for way in ways]
        for label, timeline in timelines:
            print(f"{label}: {timeline.describe()}")
        draw(timelines, options.out / "timeline.png")
        print(f"wrote {options.out / 'timeline.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
