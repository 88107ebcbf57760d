"""One message in place of CUDA's: in which phase memory ran out, who held it, which keys to lower and to what."""

import re

import psutil
import torch

from megatron_lora.config.schema import PolicyConfig, Recipe
from megatron_lora.runtime import activity

GIB = 2**30
_SAYS_SO = re.compile(
    r"out of memory|_STATUS_ALLOC_FAILED|less than desired GPU memory utilization",
    re.IGNORECASE,
)


def is_out_of_memory(error: BaseException) -> bool:
    """Of a GPU or of the machine: the error, or one that caused it, as a rollout engine's failure has one."""
    return _source(error) is not None


def describe_out_of_memory(error: Exception, recipe: Recipe, rank: int) -> str:
    """Phase, tokens, what was held, and what to do; several lines. error: one that `is_out_of_memory`."""
    source = _source(error)
    assert source is not None
    what = "the machine's memory" if _of_the_machine(source) else "GPU memory"
    in_engine = source is not error
    lines = [
        f"out of {what} on rank {rank} while {activity.current().what}{_wanted(source)}",
        *([f"  {_first_line(error)}"] if in_engine else []),
        *([] if in_engine else [f"  micro-batch: at most {micro_batch_tokens(recipe):,} tokens"]),
        *(f"  held: {line}" for line in (_held_by_machine() if _of_the_machine(source) else _held())),
        "  to lower it, most effective first:",
        *(f"    {line}" for line in remedies(recipe, in_engine=in_engine)),
        "  the last complete checkpoint is as it was",
    ]
    return "\n".join(lines)


def _source(error: BaseException) -> BaseException | None:
    """The error of a chain of causes that says that memory ran out."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, torch.OutOfMemoryError) or _of_the_machine(seen):
            return seen
        # vLLM's allocator, cuBLAS and NCCL have no class for it.
        if isinstance(seen, RuntimeError | ValueError) and seen.__cause__ is None and _SAYS_SO.search(str(seen)):
            return seen
        seen = seen.__cause__
    return None


def _of_the_machine(error: BaseException) -> bool:
    """torch's allocator for CPU tensors has no error of its own."""
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error))


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0]


def _wanted(error: BaseException) -> str:
    found = re.search(r"Tried to allocate ([\d.]+ [KMG]iB)", str(error))
    if found:
        return f" ({found[1]} more were wanted)"
    found = re.search(r"tried to allocate (\d+) bytes", str(error))
    return f" ({int(found[1]) / GIB:,.2f} GiB more were wanted)" if found else ""


def _held_by_machine() -> list[str]:
    memory, mine = psutil.virtual_memory(), psutil.Process().memory_info().rss
    others = max(0, memory.total - memory.available - mine)
    return [
        f"this rank {mine / GIB:.2f} GiB, other processes {others / GIB:.2f} GiB; {memory.available / GIB:.2f} of "
        f"{memory.total / GIB:.2f} GiB were free when it failed"
    ]


def _held() -> list[str]:
    known = activity.held()
    lines = [f"{name} {size / GIB:.2f} GiB" for name, size in known.items()]
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        allocated, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
        activations = max(0, allocated - sum(known.values()))
        others = max(0, total - free - reserved)
        lines += [
            f"activations, logits and the rest of this step {activations / GIB:.2f} GiB",
            f"kept by torch and not in use {(reserved - allocated) / GIB:.2f} GiB",
            f"outside torch's pool (rollout engine, NCCL, other processes) {others / GIB:.2f} of {total / GIB:.2f} GiB",
        ]
    return lines


def micro_batch_tokens(recipe: Recipe) -> int:
    """Tokens of the longest micro-batch in training."""
    policy = recipe.policy
    for packing in (policy.sequence_packing, policy.dynamic_batching):
        if packing.enabled and packing.train_mb_tokens is not None:
            return packing.train_mb_tokens
    return policy.train_micro_batch_size * policy.max_total_sequence_length


def remedies(recipe: Recipe, *, in_engine: bool = False) -> list[str]:
    """`key=value  (what it is now)` of the keys that this recipe still can turn. in_engine: it is the rollout engine
    that had not enough, while nothing of a micro-batch was held."""
    policy = recipe.policy
    backend = "policy.megatron_cfg" if policy.backend == "megatron" else "policy.dtensor_cfg"
    section = policy.megatron_cfg if policy.backend == "megatron" else policy.dtensor_cfg
    found = [] if in_engine else _of_a_micro_batch(policy, backend)
    if recipe.draws_answers and policy.generation.engine.wants_memory:
        part = policy.generation.vllm_cfg.gpu_memory_utilization
        less = max(0.1, part - 0.1)
        found.append(f"policy.generation.vllm_cfg.gpu_memory_utilization={less:.2g} (now {part:g})")
    if not in_engine:
        half_length = max(1, policy.max_total_sequence_length // 2)
        found.append(f"policy.max_total_sequence_length={half_length} (now {policy.max_total_sequence_length})")
    size_name = "tensor_model_parallel_size" if policy.backend == "megatron" else "tensor_parallel_size"
    size = getattr(section, size_name)
    found.append(f"{backend}.{size_name}={2 * size} (now {size}), with as many GPUs")
    return found


def _of_a_micro_batch(policy: PolicyConfig, backend: str) -> list[str]:
    """What makes the passes of a micro-batch need less."""
    found = []
    for name in ("sequence_packing", "dynamic_batching"):
        packing = getattr(policy, name)
        if packing.enabled and packing.train_mb_tokens > policy.max_total_sequence_length:
            half = max(policy.max_total_sequence_length, packing.train_mb_tokens // 2)
            found.append(f"policy.{name}.train_mb_tokens={half} (now {packing.train_mb_tokens})")
    packed = policy.sequence_packing.enabled or policy.dynamic_batching.enabled
    if not packed and policy.train_micro_batch_size > 1:
        half = policy.train_micro_batch_size // 2
        found.append(f"policy.train_micro_batch_size={half} (now {policy.train_micro_batch_size})")
    if policy.backend == "megatron" and not policy.megatron_cfg.use_fused_linear_logprobs:
        found.append("policy.megatron_cfg.use_fused_linear_logprobs=true (now false)")
    section = policy.megatron_cfg if policy.backend == "megatron" else policy.dtensor_cfg
    if not section.activation_checkpointing:
        found.append(f"{backend}.activation_checkpointing=true (now false)")
    return found
