"""Time and memory of a training step, measured the same way for every engine."""

import gc
import re
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from megatron_lora.runtime.memory import peak_memory_bytes

GIB = 2**30
PROFILED_STEPS = 3
PROFILED_ROWS = 25
# Kernels by what they are for; the first pattern that a name has counts.
KERNELS = {
    "communication": r"nccl",
    "attention": r"flash|fmha|sdpa|attention",
    "products": r"gemm|nvjet|cutlass|xmma|cublas|splitk|matmul",
}


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


def gpu_parts(step: Callable[[], float], steps: int = 2) -> dict[str, float]:
    """Milliseconds of a step in which the GPU runs at least one kernel or copy (`busy`), and of that by the kind of
    kernel. Communication is what no other kernel hides.

    Kernels take as long with the profiler as without; the step takes longer with it.
    """
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as torch_profile

    with torch_profile(activities=[ProfilerActivity.CUDA]) as recorded:
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    spans = [
        (event.name, event.time_range.start, event.time_range.end)
        for event in recorded.events() or []
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation
    ]
    return {name: round(value / 1e3 / steps, 2) for name, value in parts_of(spans).items()}


def parts_of(spans: Sequence[tuple[str, float, float]]) -> dict[str, float]:
    """(kernel, start, end) -> how long the device is busy, and with what."""
    by_kind: dict[str, list[tuple[float, float]]] = {kind: [] for kind in (*KERNELS, "other")}
    for name, start, end in spans:
        kind = next((kind for kind, pattern in KERNELS.items() if re.search(pattern, name, re.IGNORECASE)), "other")
        by_kind[kind].append((start, end))
    result = {"busy": covered([(start, end) for _, start, end in spans])}
    computing = [span for kind, found in by_kind.items() if kind != "communication" for span in found]
    for kind, found in by_kind.items():
        result[kind] = result["busy"] - covered(computing) if kind == "communication" else covered(found)
    return result


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """The length of the union of intervals."""
    total, end = 0.0, float("-inf")
    for start, stop in sorted(spans):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total
