"""One engine in a process of its own, so that its memory is its own: `python -m tools.bench.worker TASK.json`."""

import importlib
import json
import logging
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from tools.bench import engine_bridge, engine_hf, engine_ours
from tools.bench.measure import gpu_parts, measure, profile
from tools.bench.processes import die_with_parent
from tools.bench.random_weights import make_weights_on
from tools.bench.task import Task

ENGINES = {
    "ours-lora": partial(engine_ours.build, lora=True),
    "ours-lora-launched": partial(engine_ours.build, lora=True, graphs="none"),
    "ours-lora-kept": partial(engine_ours.build, lora=True, recomputed=[]),
    "ours-lora-norms": partial(engine_ours.build, lora=True, recomputed=["layernorm"]),
    "ours-lora-inputs": partial(engine_ours.build, lora=True, recomputed=["layernorm", "activation"]),
    "ours-lora-fp8": partial(engine_ours.build, lora=True, fp8=True),
    "ours-lora-off": partial(engine_ours.build, lora=True, graphs="none", adapters_on=False),
    "ours-lora-experts": partial(engine_ours.build, lora=True, experts="each"),
    "ours-lora-experts-shared": partial(engine_ours.build, lora=True, experts="shared"),
    "ours-full": partial(engine_ours.build, lora=False),
    "dtensor-lora": engine_ours.build_dtensor,
    "dtensor-lora-plain": partial(engine_ours.build_dtensor, fused=False),
    "dtensor-lora-compile": partial(engine_ours.build_dtensor, compile=True),
    "dtensor-lora-offload": partial(engine_ours.build_dtensor, cpu_offload=True),
    "peft-lora": partial(engine_hf.build, lora=True),
    "peft-lora-bf16": partial(engine_hf.build, lora=True, fp32_adapter=False),
    "hf-full": partial(engine_hf.build, lora=False),
    "bridge-lora": partial(engine_bridge.build, lora=True),
    "bridge-lora-experts": partial(engine_bridge.build, lora=True, experts="each"),
    "bridge-lora-experts-shared": partial(engine_bridge.build, lora=True, experts="shared"),
    "bridge-lora-fp8": partial(engine_bridge.build, lora=True, fp8="recipe"),
    "bridge-lora-fp8-all-layers": partial(engine_bridge.build, lora=True, fp8="all-layers"),
    "bridge-full": partial(engine_bridge.build, lora=False),
}
GATE_SECONDS = 0.05
PACKAGES = (
    "torch",
    "megatron-core",
    "megatron-bridge",
    "transformers",
    "peft",
    "transformer-engine",
    "triton",
)


def wait_for_turn(task: Task) -> None:
    """Import what the engine needs, and wait until it is this engine's turn: another one is measured meanwhile."""
    if task.device == "cuda":
        torch.cuda.set_device(device_of(task))
    if task.engine.startswith("bridge"):
        engine_bridge.import_parts()
    elif task.engine.startswith("ours"):
        engine_ours.import_parts()
    elif task.engine.startswith("peft"):
        importlib.import_module("peft")
    while task.gate is not None and not Path(task.gate).exists():
        time.sleep(GATE_SECONDS)


def run(task: Task) -> dict[str, Any]:
    """Build, measure, sweep and profile. What was measured before an error stays in the result."""
    result: dict[str, Any] = {"ok": False}
    try:
        wait_for_turn(task)
        start = time.perf_counter()
        make_weights_on(device_of(task))
        step, facts = ENGINES[task.engine](task)
        policy = facts.pop("policy", None)
        result |= facts | {"build_s": round(time.perf_counter() - start, 1)}
        result |= measure(step, task.tokens, task.warmup, task.steps)
        result["ok"] = True
        _save(task, result)
        if policy is not None and task.sweep:
            result["sweep"] = engine_ours.sweep_chunks(step, policy, task)
        if task.device == "cuda":
            result |= gpu_use(step, result["step_ms"])
            _save(task, result)
        if task.profile:
            profile(step, Path(task.profile))
    except Exception as error:  # an engine that fails is a result; the other engines still run
        result["error"] = f"{type(error).__name__}: {str(error)[:600]}"
        traceback.print_exc()
    return result


def device_of(task: Task) -> torch.device:
    return (
        torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if task.device == "cuda" else torch.device("cpu")
    )


def gpu_use(step: Callable[[], float], step_ms: float) -> dict[str, Any]:
    """What the GPU does in a step, and the share of it in which it does nothing."""
    parts = gpu_parts(step)
    return {"parts_ms": parts, "idle_share": round(1 - parts["busy"] / step_ms, 4)}


def environment() -> dict[str, Any]:
    """The machine and the versions that were loaded."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "CPU"
    return {"device": device, "cuda": torch.version.cuda, "versions": versions}


def _save(task: Task, result: dict[str, Any]) -> None:
    if int(os.environ.get("RANK", "0")) == 0:
        path = Path(task.result)
        temporary = path.with_name(path.name + ".part")
        temporary.write_text(json.dumps({"environment": environment(), "result": result}))
        temporary.replace(path)


def main() -> int:
    die_with_parent()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    task = Task.load(Path(sys.argv[1]))
    result = run(task)
    _save(task, result)
    if torch.distributed.is_initialized():
        # A rank that failed would leave the others waiting in a collective.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0 if result["ok"] else 1)
    return 0 if result["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
