"""What each kind of adapter costs beside LoRA, on one GPU and in one process: time and peak memory of a training step,
a pass for log-probabilities and generation by the training model; or whether QLoRA trains a shape at all.

    python -m tools.bench.adapter_kinds --out kinds
    python -m tools.bench.adapter_kinds --out fits --shapes qwen2.5-32b --kinds qlora --recompute --limit-gib 74.5
"""

import argparse
import gc
import json
import os
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

from megatron_lora.errors import UserError
from megatron_lora.runtime.quiet import quiet_libraries
from tools.bench.four_bit_model import save_random_four_bit
from tools.bench.measure import GIB, measure
from tools.bench.options import add_step_size, build_parser, check_device, check_out
from tools.bench.task import SHAPES, Shape, save_random_model, shape_of

FLOAT = {"cuda": "bfloat16", "cpu": "float32"}
# Kind -> (whether its base is in 4 bits, keys of `policy.megatron_cfg.peft`).
KINDS: dict[str, tuple[bool, dict[str, Any]]] = {
    "lora": (False, {"type": "lora"}),
    "qlora": (True, {"type": "lora"}),
    "dora-uncached": (False, {"type": "dora", "dora_cached_norms": False}),
    "dora": (False, {"type": "dora"}),
    "qdora-uncached": (True, {"type": "dora", "dora_cached_norms": False}),
    "qdora": (True, {"type": "dora"}),
}
COLUMNS = ("train", "logprobs", "generate")


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    try:
        kinds, shapes = _check(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    quiet_libraries(is_main=True)
    _one_process()
    options.out.mkdir(parents=True)
    results: dict[str, Any] = {"device": _device_name(options.device), "shapes": {}}
    with tempfile.TemporaryDirectory(prefix="adapter-kinds-") as scratch:
        for name, shape in shapes.items():
            rows = results["shapes"][name] = {}
            for kind in kinds:
                rows[kind] = _measure_or_reason(kind, name, shape, options, Path(scratch))
                print(f"{name} {kind}: {json.dumps(rows[kind])}", flush=True)
                _write(results, options.out)
            for folder in Path(scratch).glob(f"{name}-*"):
                for path in folder.iterdir():
                    path.unlink()
    print(table(results))
    return 0 if all("error" not in row for rows in results["shapes"].values() for row in rows.values()) else 1


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = build_parser("tools.bench.adapter_kinds", __doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for results.json and table.md; must not exist")
    parser.add_argument("--shapes", default="qwen2.5-1.5b,qwen2.5-7b", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--kinds", default=",".join(KINDS), help=f"of {', '.join(KINDS)}")
    add_step_size(parser)
    parser.add_argument("--steps", type=int, default=5, help="measured steps after 2 others; the median counts")
    parser.add_argument("--answers", type=int, default=16, help="answers generated at once; 0: no generation")
    parser.add_argument("--new-tokens", type=int, default=64, help="tokens of an answer")
    parser.add_argument("--recompute", action="store_true", help="recompute activations in the backward pass")
    parser.add_argument("--limit-gib", type=float, help="fail where a step takes more memory; 80 GB are 74.5 GiB")
    return parser.parse_args(arguments)


def _check(options: argparse.Namespace) -> tuple[list[str], dict[str, Shape]]:
    kinds = options.kinds.split(",")
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise UserError(f"--kinds {','.join(unknown)}: wanted a list of {', '.join(KINDS)}")
    check_out(options.out)
    check_device(options.device)
    return kinds, {name: shape_of(name) for name in options.shapes.split(",")}


def _one_process() -> None:
    """The environment that a launcher of one process would set."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    for name, value in {**settings, "MASTER_PORT": str(port)}.items():
        os.environ.setdefault(name, value)


def _measure_or_reason(
    kind: str, name: str, shape: Shape, options: argparse.Namespace, scratch: Path
) -> dict[str, Any]:
    four_bit, _ = KINDS[kind]
    base = scratch / f"{name}-{'nf4' if four_bit else 'dense'}"
    write = save_random_four_bit if four_bit else save_random_model
    write(shape, base, options.device)
    _forget()
    try:
        return _measure(kind, base, shape, options)
    except torch.OutOfMemoryError as error:
        # A result; the other kinds still run.
        return {"error": f"out of memory: {str(error)[:200]}"}
    finally:
        _forget()


def _measure(kind: str, base: Path, shape: Shape, options: argparse.Namespace) -> dict[str, Any]:
    from megatron_lora.runtime.world import init_megatron_world
    from tools.bench.engine_ours import training_step

    rows, length = options.rows or shape.rows, options.length or shape.length
    config = policy_config(kind, base, rows, length, options)
    world = init_megatron_world(config, 0)
    from megatron_lora.policy.megatron.policy import MegatronPolicy

    start = time.perf_counter()
    policy = MegatronPolicy(config, world, pad_token_id=0, seed=0, num_steps=1000)
    found: dict[str, Any] = {"load_s": round(time.perf_counter() - start, 1), "held_gib": _gib(_allocated())}
    found["load_peak_gib"] = _gib(_peak())
    vocab = policy.base.shapes.vocab_size
    ids = torch.randint(0, vocab, (rows, length), generator=torch.Generator().manual_seed(0))
    found["train"] = measure(training_step(policy, ids), rows * length, warmup=2, steps=options.steps)
    found["logprobs"] = _logprobs(policy, ids, options.steps)
    if options.answers:
        found["generate"] = _generation(policy, options, vocab)
    if options.limit_gib is not None and found["train"]["peak_gib"] > options.limit_gib:
        found["error"] = f"{found['train']['peak_gib']} GiB are above --limit-gib {options.limit_gib}"
    return found


def policy_config(kind: str, base: Path, rows: int, length: int, options: argparse.Namespace) -> Any:
    from megatron_lora.config.schema import PolicyConfig

    dtype = FLOAT[options.device]
    peft = {"enabled": True, "dim": options.rank, "alpha": options.rank, "lora_dtype": dtype} | KINDS[kind][1]
    megatron = {
        "enabled": True,
        "use_fused_linear_logprobs": True,
        "fused_linear_logprobs_chunk_size": 1024,
        "activation_checkpointing": options.recompute,
        "peft": peft,
        "optimizer": {"lr": 1e-4},
    }
    return PolicyConfig.model_validate(
        {
            "model_name": str(base),
            "precision": dtype,
            "train_global_batch_size": rows,
            "train_micro_batch_size": rows,
            "logprob_batch_size": rows,
            "max_total_sequence_length": length,
            "megatron_cfg": megatron,
        }
    )


def _logprobs(policy: Any, ids: torch.Tensor, steps: int) -> dict[str, Any]:
    from megatron_lora.data.batch import Row

    mask = torch.arange(ids.shape[1]) > 0
    rows = [Row(input_ids=row, target_mask=mask, index=index) for index, row in enumerate(ids)]
    return _timed(lambda: policy.score(rows), ids.numel(), steps)


def _generation(policy: Any, options: argparse.Namespace, vocab: int) -> dict[str, Any]:
    from megatron_lora.rollout.generator import SamplingOptions
    from megatron_lora.rollout.native import NativeGenerator

    generator = NativeGenerator(policy, None)
    generator.start()
    prompts = torch.randint(0, vocab, (options.answers, 16), generator=torch.Generator().manual_seed(1)).tolist()
    sampling = SamplingOptions(max_new_tokens=options.new_tokens, temperature=1.0, seed=0)
    tokens = options.answers * options.new_tokens
    return _timed(lambda: generator.generate(prompts, 1, sampling), tokens, max(2, options.steps // 2))


def _timed(run: Callable[[], Any], tokens: int, steps: int) -> dict[str, Any]:
    run()
    _forget()
    times = []
    for _ in range(steps):
        start = time.perf_counter()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    seconds = median(times)
    return {
        "step_ms": round(seconds * 1e3, 2),
        "tokens_per_s": round(tokens / seconds, 1),
        "peak_gib": _gib(_peak()),
    }


def _forget() -> None:
    """Free what is no longer held, and begin a new peak."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _allocated() -> int | None:
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else None


def _peak() -> int | None:
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None


def _gib(size: int | None) -> float | None:
    """None on a CPU, whose memory the process shares with its libraries."""
    return None if size is None else round(size / GIB, 2)


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name(0) if device == "cuda" else "CPU"


def _write(results: dict[str, Any], out: Path) -> None:
    for name, text in (("results.json", json.dumps(results, indent=1)), ("table.md", table(results))):
        temporary = out / f"{name}.part"
        temporary.write_text(text)
        temporary.replace(out / name)


def table(results: dict[str, Any]) -> str:
    """A row a kind and shape: milliseconds (tokens/s for generation) and GiB, and both over LoRA's of the run."""
    lines = [
        "| shape | kind | train | peak | log-probabilities | peak | generation | peak | held |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for shape, rows in results["shapes"].items():
        for kind, row in rows.items():
            if "train" not in row:
                lines.append(f"| {shape} | {kind} | {row['error'].partition(':')[0]} | | | | | | |")
                continue
            cells = [cell for column in COLUMNS for cell in _cells(row, rows.get("lora", {}), column)]
            lines.append(f"| {shape} | {kind} | {' | '.join(cells)} | {_shown(row['held_gib'])} |")
    return "\n".join(lines) + "\n"


def _shown(gib: float | None) -> str:
    return "-" if gib is None else f"{gib} GiB"


def _cells(row: dict[str, Any], lora: dict[str, Any], column: str) -> list[str]:
    if column not in row:
        return ["", ""]
    own, beside = row[column], lora.get(column)
    generates = column == "generate"
    value = f"{own['tokens_per_s']} tokens/s" if generates else f"{own['step_ms']:.0f} ms"
    peak = _shown(own["peak_gib"])
    if beside is None or beside is own:
        return [value, peak]
    key = "tokens_per_s" if generates else "step_ms"
    ratio = f"{own['peak_gib'] / beside['peak_gib']:.2f}" if own["peak_gib"] else "-"
    return [f"{value} ({own[key] / beside[key]:.2f})", f"{peak} ({ratio})"]


if __name__ == "__main__":
    sys.exit(main())
