"""Starting vLLM inside a trainer's process: what it is asked for, what is refused, what stays as it was."""

import copy
import gc
import importlib.util
import os
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_lora.config.schema import PolicyConfig
from megatron_lora.errors import UserError
from megatron_lora.lora.families import FILE_NAMES
from megatron_lora.lora.methods import method_of
from megatron_lora.lora.packed_experts import adapts_parameters
from megatron_lora.lora.peft_format import hf_linears
from megatron_lora.policy.adapter_start import planned_adapter
from megatron_lora.policy.weights_check import overridden_fields, read_base
from megatron_lora.rollout.vllm_arguments import check_arguments
from megatron_lora.rollout.vllm_worker import ADAPTER_ID
from megatron_lora.runtime.world import World

# What vLLM's LoRAConfig takes as max_lora_rank, and what its CPU attention takes as head_dim (vLLM 0.26).
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
CPU_HEAD_DIMS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
CPU_WORKER = "megatron_lora.rollout.vllm_cpu_worker.RolloutCPUWorker"
# Of servers, each of which is a program of its own.
SERVER_CPU_WORKER = "megatron_lora.rollout.vllm_cpu_worker.ReportingCPUWorker"
# Of the memory that vLLM may take; the rest is the KV cache's.
WEIGHTS_SHARE = 0.6
# On a CPU: a cache for this many full-length answers at once, between these bounds.
CPU_ANSWERS_AT_ONCE = 32
CPU_CACHE_BYTES = (64 << 20, 2 << 30)
# vLLM reads these when it is imported or started; a value that the user has set stays.
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    # Its warnings are about settings that are made here on purpose, from every rank.
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    # Triton's own default for float32 is TF32: 1e-3 nats of the trainer's float32. Other dtypes do not use it.
    "TRITON_F32_DEFAULT": "ieee",
}
CPU_ENVIRONMENT = {"TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "1"}
# vLLM overwrites these; child processes of the trainer (rewards) are to see them as they were.
RESTORED = ("LOCAL_WORLD_SIZE", "LD_PRELOAD", "TORCHDYNAMO_DISABLE")
SHM_PREFIX = "megatron-lora-"
SHM_IDENTIFIER = "MEGATRON_LORA_SHM_IDENTIFIER"


def check_installed(device: torch.device) -> None:
    """Raise UserError with the command that installs vLLM where it is not there."""
    if importlib.util.find_spec("vllm") is None:
        extra = "rollout-gpu" if device.type == "cuda" else "rollout-cpu"
        raise UserError(
            "policy.generation.backend=vllm, but vLLM is not installed; install it with "
            f"`make install EXTRAS={extra}`, or set policy.generation.backend=megatron"
        )


def check_request(policy: PolicyConfig, world: World, model: Any, adapter_rank: int | None) -> None:
    """Raise UserError for what vLLM could not serve. model: the base's HF config. adapter_rank: None: no adapter."""
    size = engine_size(policy, world, model)
    key = f"policy.generation.vllm_cfg.tensor_parallel_size={size}"
    if world.size % size:
        fits = [n for n in range(1, world.size + 1) if world.size % n == 0]
        raise UserError(f"{key} does not divide the {world.size} processes; use one of {fits}")
    if model.num_attention_heads % size:
        raise UserError(f"{key} does not divide the model's {model.num_attention_heads} attention heads")
    check_rank(policy, adapter_rank)
    head_dim = getattr(model, "head_dim", None) or model.hidden_size // model.num_attention_heads
    if world.device.type == "cpu" and head_dim not in CPU_HEAD_DIMS:
        raise UserError(
            f"vLLM's CPU attention cannot run {policy.model_name}: its head_dim is {head_dim}, wanted one of "
            f"{list(CPU_HEAD_DIMS)}; set policy.generation.backend=megatron"
        )
    shapes = read_base(policy).shapes
    delta = bool(shapes.linear_layers) and not shapes.mixers
    if delta and world.device.type == "cpu" and engine_dtype(policy) != "bfloat16":
        raise UserError(
            f"vLLM computes {shapes.recurrence} ({policy.model_name}) on a CPU in bfloat16 alone, and its precision is "
            f"{engine_dtype(policy)}; set policy.generation.backend=megatron or vllm_cfg.precision=bfloat16"
        )


def check_with_vllm(policy: PolicyConfig, world: World, model: Any) -> None:
    """Raise UserError for what only vLLM knows to be wrong. On the first rank alone: it takes some 10 seconds, where
    the recipe has something of the kind."""
    positions = getattr(model, "max_position_embeddings", None)
    longest = policy.generation.vllm_cfg.max_model_len or policy.max_total_sequence_length
    if world.is_main and (policy.generation.vllm_kwargs or (positions is not None and longest > positions)):
        rank, adapted = planned_slots(policy, world)
        stored = read_base(policy).stored_four_bit
        arguments = engine_arguments(policy, world, rank, adapted, model, stored_four_bit=stored)
        check_arguments(arguments, policy.generation.vllm_kwargs, positions)


def engine_size(policy: PolicyConfig, world: World, model: Any) -> int:
    """Ranks of one engine: the recipe's, or as few as the model fits on, since engines of their own scale better than
    ranks that share matrices. It fits where its weights take no more than `WEIGHTS_SHARE` of what vLLM may use."""
    given = policy.generation.vllm_cfg.tensor_parallel_size
    if given is not None:
        return given
    if world.device.type != "cuda":
        return 1
    memory = torch.cuda.get_device_properties(world.device).total_memory
    room = WEIGHTS_SHARE * policy.generation.vllm_cfg.gpu_memory_utilization * memory
    width = 4 if engine_dtype(policy) == "float32" else 2
    fits = [n for n in range(1, world.size + 1) if world.size % n == 0 and model.num_attention_heads % n == 0]
    return next((n for n in fits if width * num_weights(model) / n <= room), fits[-1])


def num_weights(model: Any) -> int:
    """Weights of a decoder's matrices. model: its HF config."""
    heads, hidden = model.num_attention_heads, model.hidden_size
    groups = getattr(model, "num_key_value_heads", None) or heads
    head_dim = getattr(model, "head_dim", None) or hidden // heads
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    experts = next((found for name in names if (found := getattr(model, name, None))), 1)
    width = getattr(model, "moe_intermediate_size", None) or model.intermediate_size
    layer = hidden * head_dim * 2 * (heads + groups) + 3 * hidden * width * experts
    embeddings = 1 if getattr(model, "tie_word_embeddings", False) else 2
    return model.num_hidden_layers * layer + embeddings * hidden * model.vocab_size


def merge_only_reason(policy: PolicyConfig, world: World) -> str | None:
    """Why the engine can be given merged weights only; None where it can be given the adapter."""
    if not policy.adapter.enabled:
        return "full fine-tuning (peft.enabled=false) has no adapter"
    if not method_of(policy.adapter.type).adds_only:
        return f"vLLM serves no adapters of type {policy.adapter.type!r}"
    if policy.adapter.modules_to_save:
        return "vLLM serves no modules_to_save with an adapter"
    if world.device.type == "cuda" and engine_dtype(policy) == "float32":
        return "on a GPU vLLM's adapter kernels take bfloat16 and float16, not float32"
    shapes = read_base(policy).shapes
    if shapes.linear_layers:
        return f"vLLM was not seen to apply an adapter to a model with {shapes.recurrence}"
    if shapes.model_type in FILE_NAMES:
        return f"vLLM was not seen to apply an adapter to a {shapes.model_type} model"
    planned = planned_adapter(policy)
    if planned is not None and adapts_parameters(planned.spec):
        known = (
            "vLLM's product of experts on a CPU takes none"
            if world.device.type == "cpu"
            else "vLLM takes an adapter an expert, which refits do not make yet"
        )
        return f"adapters on experts and routers are handed over merged ({known})"
    return None


def needs_gpu_reason(policy: PolicyConfig) -> str | None:
    """Why vLLM does not run the model on a CPU; None where it does."""
    shapes = read_base(policy).shapes
    if not shapes.mixers:
        return None
    return (
        f"vLLM's kernels for {shapes.recurrence} ({policy.model_name}) run on a GPU alone, and there is none here; set "
        "policy.generation.backend=megatron"
    )


def hands_over_adapter(policy: PolicyConfig, world: World) -> bool:
    """Whether the engine may be given the adapter. Raises UserError where the recipe wants it and it cannot be."""
    reason = merge_only_reason(policy, world)
    if reason and policy.generation.refit == "adapter":
        raise UserError(f"policy.generation.refit=adapter, but {reason}; set it to merge")
    return reason is None and policy.generation.refit != "merge"


def planned_slots(policy: PolicyConfig, world: World) -> tuple[int | None, list[str]]:
    """What an engine's adapter slots must hold of the recipe's adapter: the largest rank, and the last names of the
    linears (`q_proj`, ...); (None, []) where it is given merged weights. Raises UserError as `hands_over_adapter`."""
    if not hands_over_adapter(policy, world):
        return None, []
    planned = planned_adapter(policy)
    assert planned is not None
    modules = planned.spec.modules
    kinds = {(module.kind, segment) for module in modules for block in module.blocks for segment in block.segments}
    linears = hf_linears(planned.spec.shapes).values()
    names = sorted({linear.name.split(".")[-1] for linear in linears if (linear.kind, linear.segment) in kinds})
    return max(block.rank for module in modules for block in module.blocks), names


def check_servers(policy: PolicyConfig) -> None:
    """Raise UserError for a base that rollout servers would not serve as the trainer has it: they read its folder."""
    base = read_base(policy)
    what = None
    if base.stored_four_bit or policy.adapter.quantization is not None:
        what = "a base in 4 bits"
    elif overridden_fields(policy, base.config):
        what = "policy.hf_config_overrides"
    if what:
        raise UserError(
            f"rollout servers do not take {what}; set policy.generation.colocated.enabled=true and servers.urls=[]"
        )


def engine_dtype(policy: PolicyConfig) -> str:
    return policy.generation.vllm_cfg.precision or policy.precision


def max_lora_rank(policy: PolicyConfig, adapter_rank: int) -> int:
    """The rank of vLLM's adapter slots: the one given, or the smallest of vLLM's that holds the adapter."""
    given = policy.generation.vllm_kwargs.get("max_lora_rank")
    if given is not None:
        return int(given)
    return next((rank for rank in LORA_RANKS if rank >= adapter_rank), LORA_RANKS[-1])


def check_rank(policy: PolicyConfig, rank: int | None) -> None:
    """Raise UserError for an adapter whose rank vLLM's slots do not hold. rank: None: no adapter."""
    largest = 0 if rank is None else max_lora_rank(policy, rank)
    if rank is not None and rank > largest:
        raise UserError(
            f"the adapter's rank {rank} is above vLLM's max_lora_rank {largest}; "
            + (
                "raise policy.generation.vllm_kwargs.max_lora_rank"
                if rank <= LORA_RANKS[-1]
                else f"vLLM serves adapters up to rank {LORA_RANKS[-1]}: set policy.generation.refit=merge"
            )
        )


def base_config(policy: PolicyConfig) -> Any:
    """The base model's HF config (its text part). Raises UserError where there is none."""
    return read_base(policy).config


def engine_arguments(
    policy: PolicyConfig,
    world: World,
    adapter_rank: int | None,
    adapted: list[str],
    model: Any,
    *,
    stored_four_bit: bool = False,
) -> dict[str, Any]:
    """Arguments of `vllm.LLM`; `policy.generation.vllm_kwargs` comes last and wins.

    adapted: the last name of each adapted linear (`q_proj`, ...): vLLM wraps only those. stored_four_bit: the folder
    holds 4-bit linears; the engine computes with dense weights, which the trainer hands over before the first answer.
    """
    generation = policy.generation
    on_gpu = world.device.type == "cuda"
    dtype = engine_dtype(policy)
    max_model_len = generation.vllm_cfg.max_model_len or policy.max_total_sequence_length
    arguments: dict[str, Any] = {
        "model": policy.model_name,
        "dtype": dtype,
        "tensor_parallel_size": engine_size(policy, world, model),
        "distributed_executor_backend": "external_launcher",
        "max_model_len": max_model_len,
        "enforce_eager": generation.vllm_cfg.enforce_eager or not on_gpu,
        "logprobs_mode": "processed_logprobs",
        # What a recurrent layer carries is no part of a prefix's keys and values.
        "enable_prefix_caching": not read_base(policy).shapes.linear_layers,
        "use_tqdm_on_load": False,
        # Sampling parameters are the recipe's, never the model folder's generation_config.json.
        "generation_config": "vllm",
        "seed": 0,
    }
    if generation.stop_strings:
        arguments["tokenizer"] = policy.tokenizer.name
    else:
        arguments["skip_tokenizer_init"] = True
    if on_gpu:
        arguments["gpu_memory_utilization"] = generation.vllm_cfg.gpu_memory_utilization
        arguments["enable_sleep_mode"] = True
    else:
        arguments["kv_cache_memory_bytes"] = _cpu_cache_bytes(model, max_model_len, dtype)
        arguments["worker_cls"] = CPU_WORKER
        # A prompt read in pieces takes back its answer's random draw, which vLLM cannot do on a CPU.
        arguments["enable_chunked_prefill"] = False
    if policy.router_replay.enabled:
        arguments["enable_return_routed_experts"] = True
    fields = overridden_fields(policy, model)
    if stored_four_bit:
        arguments["load_format"] = "dummy"
    if fields or stored_four_bit:
        arguments["hf_overrides"] = partial(_with_fields, fields)
    if adapter_rank is not None:
        arguments |= {
            "enable_lora": True,
            "max_loras": 1,
            "max_cpu_loras": 1,
            "max_lora_rank": max_lora_rank(policy, adapter_rank),
            "lora_target_modules": adapted,
        }
    return arguments | generation.vllm_kwargs


def _with_fields(fields: Mapping[str, Any], config: Any) -> Any:
    """The config with other fields, of dense weights."""
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    for name, value in fields.items():
        setattr(config, name, copy.deepcopy(value))  # vLLM writes into what it is given
    return config


def _cpu_cache_bytes(model: Any, max_model_len: int, dtype: str) -> int:
    head_dim = getattr(model, "head_dim", None) or model.hidden_size // model.num_attention_heads
    width = 4 if dtype == "float32" else 2
    a_token = 2 * model.num_hidden_layers * model.num_key_value_heads * head_dim * width
    smallest, largest = CPU_CACHE_BYTES
    return min(largest, max(smallest, a_token * max_model_len * CPU_ANSWERS_AT_ONCE))


def build_engine(arguments: dict[str, Any], world: World) -> Any:
    """A `vllm.LLM` over torchrun's processes; random states, thread count and environment as before afterwards."""
    _prepare_environment(world)
    before = {name: os.environ.get(name) for name in RESTORED}
    set_num_threads = torch.set_num_threads
    with own_random_state(world.device):
        try:
            if world.device.type == "cpu":
                os.environ.update(CPU_ENVIRONMENT)
            from vllm import LLM

            return LLM(**arguments)
        finally:
            torch.set_num_threads = set_num_threads
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value


def _remove_leftovers() -> None:
    """Shared memory of killed runs: its name says which process made it."""
    for path in Path("/dev/shm").glob(f"{SHM_PREFIX}*-cpushm*"):
        process = path.name.removeprefix(SHM_PREFIX).split("-")[0]
        if process.isdigit() and not Path("/proc", process).exists():
            path.unlink(missing_ok=True)


def _prepare_environment(world: World) -> None:
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # external_launcher reads torchrun's variables also where there is one process and no torchrun.
    for name, value in (("RANK", world.rank), ("LOCAL_RANK", world.local_rank), ("WORLD_SIZE", world.size)):
        os.environ.setdefault(name, str(value))
    # A name of this run for the CPU engine's shared memory: leftovers of a killed run and neighbours do no harm.
    if world.local_rank == 0:
        _remove_leftovers()
    box = [f"{SHM_PREFIX}{os.getpid()}-{random.SystemRandom().getrandbits(32):x}"]
    dist.broadcast_object_list(box, src=0, device=world.device if world.device.type == "cuda" else None)
    os.environ[SHM_IDENTIFIER] = str(box[0])


@contextmanager
def own_random_state(device: torch.device, seed: int | None = None) -> Iterator[None]:
    """Whatever the engine draws or seeds in here, the trainer's random states are as before afterwards.

    seed: where every generator starts in here, the same on all ranks of one engine: vLLM's GPU runner draws a seed for
    an answer that has none from NumPy's, on each rank by itself.
    """
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    try:
        if seed is not None:
            random.seed(seed)
            np.random.seed(seed % (1 << 32))
            torch.manual_seed(seed)
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda, device)


def free_engine(llm: Any) -> None:
    """End the engine and vLLM's process groups. torch.distributed stays as it is, which vLLM's own shutdown would end
    with the trainer still in it."""
    from vllm.distributed import parallel_state

    core = llm.llm_engine.engine_core.engine_core
    core.structured_output_manager.clear_backend()
    core.model_executor.shutdown()
    core.scheduler.shutdown()
    gc.unfreeze()
    parallel_state.destroy_model_parallel()
    state: Any = parallel_state
    if state._WORLD is not None:
        state._WORLD.destroy()
        state._WORLD = None
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def adapter_request(version: int) -> Any:
    """Names the adapter that the worker holds. Its version is in the name, which is part of the prefix cache's key."""
    from vllm.lora.request import LoRARequest

    return LoRARequest(f"version-{version}", ADAPTER_ID, "held-in-memory")
