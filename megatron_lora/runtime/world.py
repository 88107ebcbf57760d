"""torchrun's environment and Megatron's process groups, as one frozen `World`."""

import math
import os
from dataclasses import dataclass, replace
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from megatron_lora.config.schema import PolicyConfig
from megatron_lora.errors import UserError
from megatron_lora.runtime.cpu import install_cpu_stand_ins, stand_in_for_token_dispatch
from megatron_lora.runtime.megatron_core import import_megatron_core
from megatron_lora.runtime.transformer_engine import prepare_transformer_engine

# torch gives a group that is made later its own default (10 minutes over NCCL), whatever the first one waits.
_timeout: timedelta | None = None

# Between the seeds of ranks that see different tokens; those of stages, TP ranks and experts lie closer together.
SEED_STRIDE = 1_000_003


@dataclass(frozen=True)
class World:
    """Who this process is. device: where its tensors live. tp, pp, cp, dp: sizes; *_rank: this process's place. ep,
    etp: ranks that share the experts, and each expert's matrices."""

    rank: int
    size: int
    local_rank: int
    device: torch.device
    tp: int = 1
    pp: int = 1
    cp: int = 1
    dp: int = 1
    tp_rank: int = 0
    pp_rank: int = 0
    cp_rank: int = 0
    dp_rank: int = 0
    ep: int = 1
    etp: int = 1
    ep_rank: int = 0
    etp_rank: int = 0

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @classmethod
    def alone(cls) -> "World":
        """A process that works without others, whoever started it."""
        return cls(rank=0, size=1, local_rank=0, device=torch.device("cpu"))


def environment_world() -> World:
    """torchrun's variables; a process started without torchrun is a world of one."""
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    return World(rank=rank, size=size, local_rank=local_rank, device=device)


def init_distributed(timeout_seconds: float | None = None) -> World:
    """Join torchrun's processes over NCCL on GPUs, gloo on CPUs. Safe to call again. timeout_seconds: how long a rank
    waits for another in a collective, such as for the one that computes rewards; None: torch's default."""
    global _timeout
    world = environment_world()
    if world.device.type == "cuda":
        if world.local_rank >= torch.cuda.device_count():
            raise UserError(
                f"--nproc-per-node asks for GPU {world.local_rank} of this machine, which has "
                f"{torch.cuda.device_count()}; start as many processes as there are GPUs"
            )
        torch.cuda.set_device(world.device)
    else:
        # Ranks share the machine's cores; more threads than cores slow every rank down.
        cores = len(os.sched_getaffinity(0))
        local_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        torch.set_num_threads(max(1, cores // local_size))
    if not dist.is_initialized():
        os.environ.setdefault("MASTER_ADDR", "localhost")
        os.environ.setdefault("MASTER_PORT", "0" if world.size == 1 else "29500")
        backend = "nccl" if world.device.type == "cuda" else "gloo"
        device_id = world.device if backend == "nccl" else None
        _timeout = timedelta(seconds=timeout_seconds) if timeout_seconds is not None else None
        if world.size == 1 and "RANK" not in os.environ:
            store = dist.HashStore()
            dist.init_process_group(backend, store=store, rank=0, world_size=1, device_id=device_id, timeout=_timeout)
        else:
            dist.init_process_group(
                backend, rank=world.rank, world_size=world.size, device_id=device_id, timeout=_timeout
            )
    return world


def make_mesh(world: World, **axes: int) -> DeviceMesh:
    """All ranks as a mesh of the named sizes, the last one fastest; groups wait as long as `init_distributed` says."""
    ranks = torch.arange(world.size).reshape(*axes.values())
    groups = []
    for axis in range(ranks.dim()):
        lines = ranks.movedim(axis, -1).reshape(-1, ranks.shape[axis]).tolist()
        groups.append(dist.new_subgroups_by_enumeration(lines, timeout=_timeout)[0])
    return DeviceMesh.from_group(groups, world.device.type, mesh=ranks, mesh_dim_names=tuple(axes))


def init_megatron_world(policy: PolicyConfig, seed: int) -> World:
    """Process groups of the recipe's layout, and Megatron's random states. The layout was checked before."""
    world = init_distributed()
    import_megatron_core()
    install_cpu_stand_ins()
    prepare_transformer_engine()
    if policy.megatron_cfg.expert_model_parallel_size * policy.megatron_cfg.expert_tensor_parallel_size > 1:
        stand_in_for_token_dispatch()
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    megatron = policy.megatron_cfg
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=megatron.tensor_model_parallel_size,
        pipeline_model_parallel_size=megatron.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=megatron.virtual_pipeline_model_parallel_size,
        context_parallel_size=megatron.context_parallel_size,
        expert_model_parallel_size=megatron.expert_model_parallel_size,
        expert_tensor_parallel_size=megatron.expert_tensor_parallel_size,
        distributed_timeout_minutes=30 if _timeout is None else math.ceil(_timeout.total_seconds() / 60),
        create_gloo_process_groups=False,
    )
    pp_rank, cp_rank = parallel_state.get_pipeline_model_parallel_rank(), parallel_state.get_context_parallel_rank()
    # Dropout: pipeline stages and ranks that see other tokens draw different numbers, tensor-parallel peers the same
    # where they hold the same. (Megatron's own rule gives data-parallel ranks one seed, and so one mask.)
    cp_size = parallel_state.get_context_parallel_world_size()
    tokens_rank = parallel_state.get_data_parallel_rank() * cp_size + cp_rank
    own_seed = seed + 100 * pp_rank + SEED_STRIDE * tokens_rank
    torch.manual_seed(own_seed)
    model_parallel_cuda_manual_seed(own_seed)
    return World(
        rank=world.rank,
        size=world.size,
        local_rank=world.local_rank,
        device=world.device,
        tp=parallel_state.get_tensor_model_parallel_world_size(),
        pp=parallel_state.get_pipeline_model_parallel_world_size(),
        cp=parallel_state.get_context_parallel_world_size(),
        dp=parallel_state.get_data_parallel_world_size(),
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        pp_rank=pp_rank,
        cp_rank=cp_rank,
        dp_rank=parallel_state.get_data_parallel_rank(),
        ep=parallel_state.get_expert_model_parallel_world_size(),
        etp=parallel_state.get_expert_tensor_parallel_world_size() or 1,
        ep_rank=parallel_state.get_expert_model_parallel_rank(),
        etp_rank=parallel_state.get_expert_tensor_parallel_rank() or 0,
    )


def init_dtensor_world(policy: PolicyConfig, seed: int) -> World:
    """The ranks of `policy.dtensor_cfg`'s layout: TP ranks next to each other, FSDP over the rest. Raises UserError."""
    world = init_distributed()
    tp = policy.dtensor_cfg.tensor_parallel_size
    if world.size % tp:
        raise UserError(
            f"policy.dtensor_cfg.tensor_parallel_size={tp} does not divide the {world.size} ranks; start a multiple of "
            f"{tp} ranks (--nproc; torchrun: --nproc-per-node) or lower it"
        )
    dp_rank = world.rank // tp
    # Dropout: tensor-parallel peers draw the same numbers, data-parallel ranks different ones.
    torch.manual_seed(seed + dp_rank)
    return replace(world, tp=tp, dp=world.size // tp, tp_rank=world.rank % tp, dp_rank=dp_rank)
