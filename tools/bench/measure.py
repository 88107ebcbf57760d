"""Time and memory of a training step, measured the same way for every engine."""

import gc
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

from megatron_lora.runtime.memory import peak_memory_bytes

GIB = 2**30
PROFILED_STEPS = 3
PROFILED_ROWS = 25


def measure(step: Callable[[], float], tokens: int, warmup: int, steps: int) -> dict[str, Any]:
    """Median step time over `steps` after `warmup`, tokens per second, peak memory while measuring.

    step: one whole training step, which returns its loss. On a GPU the peak is the allocator's high-water mark; on a
    CPU it is that of the whole process.
    """
    cuda = torch.cuda.is_available()
    losses = [step() for _ in range(warmup)]
    gc.collect()
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(steps):
        start = time.perf_counter()
        losses.append(step())
        if cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    typical = median(times)
    peak = peak_memory_bytes(torch.device("cuda" if cuda else "cpu"))
    return {
        "step_ms": round(typical * 1e3, 2),
        "times_ms": [round(value * 1e3, 2) for value in times],
        "tokens_per_s": round(tokens / typical),
        "peak_gib": round(peak / GIB, 2),
        "reserved_gib": round(torch.cuda.max_memory_reserved() / GIB, 2) if cuda else None,
        "first_loss": losses[0],
        "last_loss": losses[-1],
    }


def profile(step: Callable[[], float], path: Path) -> None:
    """Write the kernels that take most time over a few steps as a table."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as torch_profile

    cuda = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if cuda else [])
    with torch_profile(activities=activities) as recorded:
        for _ in range(PROFILED_STEPS):
            step()
        if cuda:
            torch.cuda.synchronize()
    averages = recorded.key_averages()
    key = "self_cuda_time_total" if cuda else "self_cpu_time_total"
    table = averages.table(sort_by=key, row_limit=PROFILED_ROWS, max_name_column_width=90)
    path.write_text(f"{PROFILED_STEPS} steps\n{table}\n")
