"""When the phases of a run began and ended, for a picture of a step (`tools.bench.rollouts --timeline`).

Recording is on where MEGATRON_LORA_TIMELINE names a file; rank 0 then appends a line of JSON for each span. The device
is waited for at both ends of one, so that its time is the work's and not the launches'; otherwise a span costs nothing.
"""

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

VARIABLE = "MEGATRON_LORA_TIMELINE"


@contextmanager
def span(name: str) -> Iterator[None]:
    """Record the block as `name`. Spans may lie in one another."""
    path = os.environ.get(VARIABLE)
    if not path or os.environ.get("RANK", "0") != "0":
        yield
        return
    start = _now()
    try:
        yield
    finally:
        line = json.dumps({"name": name, "start": start, "end": _now()})
        with open(path, "a") as file:
            file.write(f"{line}\n")


def _now() -> float:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()
