"""Peak memory of this process: the GPU's where there is one, else the process's own."""

import resource

import torch

from megatron_lora.runtime import activity

_graph_pool = 0


def hold_graph_pool(num_bytes: int) -> None:
    """Note that CUDA graphs keep so many bytes more (or, below 0, no longer) for what their replays write, which torch
    counts as free."""
    global _graph_pool
    _graph_pool += num_bytes
    activity.hold("CUDA graphs (activations)", _graph_pool)


def peak_memory_bytes(device: torch.device) -> int:
    """Since the last reset on a GPU; since the process began on a CPU (the kernel keeps one mark)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) + _graph_pool
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def free_memory_bytes(device: torch.device) -> int:
    """What this process can still have of the GPU: what nobody holds, and what it holds without using it."""
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device) - _graph_pool
    return torch.cuda.mem_get_info(device)[0] + unused


def reset_peak_memory(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
