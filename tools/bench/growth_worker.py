"""One rank that goes through points of a growth: `python -m tools.bench.growth_worker TASKS.json FOUND.jsonl`."""

import gc
import json
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

from tools.bench import engine_ours
from tools.bench.measure import measure
from tools.bench.processes import die_with_parent
from tools.bench.random_weights import make_weights_on
from tools.bench.task import Task
from tools.bench.worker import device_of, environment, gpu_use

KEPT = ("step_ms", "tokens_per_s", "peak_gib")


def main() -> None:
    die_with_parent()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    tasks = [Task(**task) for task in json.loads(Path(sys.argv[1]).read_text())]
    make_weights_on(device_of(tasks[0]))
    for task in tasks:
        found = _measure(task)
        if os.environ["RANK"] == "0":
            with Path(sys.argv[2]).open("a") as stream:
                stream.write(json.dumps(found | {"environment": environment()}) + "\n")
    os._exit(0)  # the process that started this one has all that it wants


def _measure(task: Task) -> dict[str, Any]:
    step, facts = None, None
    try:
        step, facts = engine_ours.build(task, lora=True)
        measured = measure(step, task.tokens, task.warmup, task.steps)
        found = {name: measured[name] for name in KEPT}
        if task.device == "cuda":
            found |= gpu_use(step, found["step_ms"])
        return found
    except RuntimeError as error:  # of memory: the other points are still measured
        return {"error": str(error).splitlines()[0][:200]}
    finally:
        del step, facts
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
