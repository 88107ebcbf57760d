"""Stand-ins for CUDA, so that Megatron-Core's real code runs on a machine without a GPU.

Everything that pretends is in this file and in `transformer_engine.py`; both do nothing where a GPU is there.
Megatron-Core names CUDA directly in few places: the current device, streams and events, the CUDA random number
generator, `device="cuda"`, `Tensor.cuda()`, and the string that `Tensor.type()` answers.
"""

import contextlib
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode

from megatron_lora.runtime.megatron_core import import_megatron_core

_installed = False
_mode: TorchFunctionMode | None = None


class InertStream:
    """Stands for torch.cuda.Stream: work on a CPU is done when the call returns, so there is nothing to order."""

    def __init__(self, *args: Any, **kwargs: Any):
        self.cuda_stream = 0

    def synchronize(self) -> None: ...

    def wait_stream(self, stream: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def record_event(self, event: Any = None) -> Any:
        return event or InertEvent()

    def query(self) -> bool:
        return True

    def __enter__(self) -> "InertStream":
        return self

    def __exit__(self, *exception: Any) -> None: ...


class InertEvent:
    """Stands for torch.cuda.Event."""

    def __init__(self, *args: Any, **kwargs: Any): ...

    def record(self, stream: Any = None) -> None: ...

    def wait(self, stream: Any = None) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True


class _CudaDeviceIsCpu(TorchFunctionMode):
    """Rewrites `device="cuda"` to the CPU in every torch call, and pins no memory for copies to a GPU."""

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if "device" in kwargs and _names_cuda(kwargs["device"]):
            kwargs = {**kwargs, "device": torch.device("cpu")}
        if "pin_memory" in kwargs:
            kwargs = {**kwargs, "pin_memory": False}
        if func in (torch.Tensor.to, torch.Tensor.type) and len(args) > 1 and _names_cuda(args[1]):
            args = (args[0], torch.device("cpu"), *args[2:])
        return func(*args, **kwargs)


def _names_cuda(device: Any) -> bool:
    if isinstance(device, str):
        return device.startswith("cuda")
    return isinstance(device, torch.device) and device.type == "cuda"


def install_cpu_stand_ins() -> None:
    """Point Megatron-Core's uses of CUDA at the CPU. Does nothing where CUDA is there, and nothing the second time."""
    global _installed, _mode
    if _installed or torch.cuda.is_available():
        return
    _installed = True
    import_megatron_core()
    _stand_in_for_device()
    _stand_in_for_random_state()
    _stand_in_for_tensor_methods()
    _mode = _CudaDeviceIsCpu()
    _mode.__enter__()


@contextlib.contextmanager
def device_names_as_given() -> Iterator[None]:
    """Torch calls without the rewriting of `device="cuda"`, for code that never asks for it, such as vLLM's CPU engine:
    the rewriting costs each call a few microseconds, which doubles the time of a small model's decoding step."""
    mode = _mode
    if mode is None:
        yield
        return
    mode.__exit__(None, None, None)
    try:
        yield
    finally:
        mode.__enter__()


def _stand_in_for_device() -> None:
    cuda: Any = torch.cuda
    cuda.current_device = lambda: torch.device("cpu")
    cuda.set_device = lambda device: None
    cuda.synchronize = lambda device=None: None
    cuda.empty_cache = lambda: None
    cuda.Stream = InertStream
    cuda.Event = InertEvent
    cuda.current_stream = lambda device=None: InertStream()
    cuda.default_stream = lambda device=None: InertStream()
    cuda.stream = lambda stream: contextlib.nullcontext()


def _stand_in_for_random_state() -> None:
    cuda: Any = torch.cuda
    cuda.get_rng_state = lambda device=None: torch.get_rng_state()
    cuda.set_rng_state = lambda state, device=None: torch.set_rng_state(state)
    cuda.manual_seed = lambda seed: torch.default_generator.manual_seed(seed)
    cuda.manual_seed_all = cuda.manual_seed

    from megatron.core.tensor_parallel import random

    def get_state(device: Any = "cuda", clone: bool = False, graph_safe: bool = False) -> torch.Tensor:
        return torch.get_rng_state()

    def set_state(state: torch.Tensor, device: int = -1, graph_safe: bool = False) -> None:
        torch.set_rng_state(state)

    megatron_random: Any = random
    megatron_random._get_cuda_rng_state = get_state
    megatron_random._set_cuda_rng_state = set_state


def stand_in_for_token_dispatch() -> None:
    """Numbers of tokens as an all-to-all wants them: Megatron-Core brings them there from CUDA tensors alone; and
    collectives of unequal parts, which gloo lacks. To be called once Megatron's layers may be imported; does nothing
    where CUDA is there."""
    if torch.cuda.is_available():
        return
    from megatron.core.transformer.moe import token_dispatcher

    def moved(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    dispatcher: Any = token_dispatcher
    dispatcher.maybe_move_tensor_to_cpu = moved
    mappings: Any = importlib.import_module("megatron.core.tensor_parallel.mappings")
    if mappings._gather_along_first_dim.__module__ != __name__:
        mappings._gather_along_first_dim = _unequal(mappings._gather_along_first_dim, _gather_unequal)
        mappings._reduce_scatter_along_first_dim = _unequal(
            mappings._reduce_scatter_along_first_dim, _reduce_scatter_unequal
        )


def _unequal(equal: Callable, of_sizes: Callable) -> Callable:
    """Megatron-Core's collective along the first dimension, another in its place where sizes are given."""

    def call(value: torch.Tensor, group: Any, sizes: Any = None, use_global_buffer: bool = False) -> torch.Tensor:
        if sizes is None or group.size() == 1:
            return equal(value, group, sizes, use_global_buffer)
        return of_sizes(value, group, [int(size) for size in sizes])

    return call


def _gather_unequal(value: torch.Tensor, group: Any, sizes: list[int]) -> torch.Tensor:
    """[sizes of this rank, ...] of every rank -> [sum of sizes, ...]: padded to equal parts on the way."""
    padded = value.new_zeros(max(sizes), *value.shape[1:])
    padded[: value.shape[0]] = value
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded, group=group)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


def _reduce_scatter_unequal(value: torch.Tensor, group: Any, sizes: list[int]) -> torch.Tensor:
    """Sum over the ranks of [sum of sizes, ...], this rank's part."""
    whole = value.clone()
    dist.all_reduce(whole, group=group)
    return whole.split(sizes)[group.rank()].clone()


def _stand_in_for_tensor_methods() -> None:
    tensor: Any = torch.Tensor
    original_type = torch.Tensor.type

    def cuda(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self

    def type_name(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        # Megatron's optimizers sort parameters by this string and know only the CUDA ones.
        # (torch looks the method up again under a function mode, hence the second look at the answer.)
        if dtype is None:
            name = original_type(self)
            return name if name.startswith("torch.cuda.") else name.replace("torch.", "torch.cuda.", 1)
        return original_type(self, dtype, *args, **kwargs)

    tensor.cuda = cuda
    tensor.type = type_name
