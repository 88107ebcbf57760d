"""`megatron-lora serve RECIPE.yaml --port 8000`: a rollout server for a run of the same recipe, one line a node."""

import json
import os
import shlex
import sys
from collections.abc import Sequence

from megatron_lora.config.command_line import build_parser, integer, load_or_print, parse_run
from megatron_lora.config.schema import PolicyConfig
from megatron_lora.errors import UserError

# Adapters can be loaded while it runs; its workers answer what they hold. Both are for a network of one's own.
ENVIRONMENT = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "VLLM_SERVER_DEV_MODE": "1"}


def serve(arguments: Sequence[str]) -> int:
    """Check the recipe and become `vllm serve`."""
    parser = build_parser("megatron-lora serve", "Serve rollouts for runs of this recipe (vLLM, on this machine).")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    parser.add_argument("--port", type=integer(0, 65535), default=8000, help="port to listen on (default 8000)")
    options, found = parse_run(parser, arguments)
    loaded = load_or_print(options)
    if loaded is None:
        return 0
    if not loaded.recipe.draws_answers:
        raise UserError(f"{options.recipe} is a recipe of {loaded.recipe.algorithm}, which draws no answers")
    policy = loaded.recipe.policy
    if policy.preload_to_shm and not options.dry_run:
        from megatron_lora.policy.preload import base_folder

        policy = policy.model_copy(update={"model_name": str(base_folder(policy, for_a_child=True))})
    command, environment = server_command(policy, num_versions=loaded.recipe.rollouts.num_versions)
    command += ["--host", found.host, "--port", str(found.port)]
    if options.dry_run:
        print(" ".join([*(f"{k}={v}" for k, v in environment.items()), shlex.join(command)]), flush=True)
        return 0
    os.environ.update({name: value for name, value in environment.items() if name not in os.environ})
    sys.stdout.flush()
    os.execv(command[0], command)


def server_command(policy: PolicyConfig, num_versions: int = 1) -> tuple[list[str], dict[str, str]]:
    """(command line of vLLM's server, environment) for a recipe's policy; `vllm_kwargs` come last and win.

    num_versions: of the adapter that answer at a time."""
    import torch

    from megatron_lora.rollout import vllm_engine
    from megatron_lora.runtime.world import World

    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    vllm_engine.check_installed(device)
    size = policy.generation.vllm_cfg.tensor_parallel_size or 1
    world = World(rank=0, size=size, local_rank=0, device=device)
    vllm_engine.check_servers(policy)
    adapter_rank, adapted = vllm_engine.planned_slots(policy, world)
    model = vllm_engine.base_config(policy)
    vllm_engine.check_request(policy, world, model, adapter_rank)
    values = vllm_engine.engine_arguments(policy, world, adapter_rank, adapted, model)
    for name in ("distributed_executor_backend", "use_tqdm_on_load", "enable_sleep_mode"):
        values.pop(name, None)
    values.pop("worker_cls", None)
    if device.type == "cpu" and policy.router_replay.enabled:
        values["worker_cls"] = vllm_engine.SERVER_CPU_WORKER
    values.pop("skip_tokenizer_init", None)
    # A new version is loaded beside the one that still answers.
    if adapter_rank is not None:
        for name, number in (("max_loras", num_versions), ("max_cpu_loras", num_versions + 1)):
            if name not in policy.generation.vllm_kwargs:
                values[name] = number
    values["worker_extension_cls"] = "megatron_lora.rollout.server_worker.ServerWorker"
    # Not `vllm serve`: its CPU build has no package metadata under that name.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *_flags(values)]
    environment = vllm_engine.ENVIRONMENT | ENVIRONMENT
    environment.pop("VLLM_ENABLE_V1_MULTIPROCESSING")
    if device.type == "cpu":
        environment |= vllm_engine.CPU_ENVIRONMENT
    return command, environment


def _flags(values: dict[str, object]) -> list[str]:
    flags = []
    for name, value in values.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is not None:
            values_of_list = map(str, value) if isinstance(value, list) else None
            text = json.dumps(value) if isinstance(value, dict) else str(value)
            flags += [f"--{flag}", *(values_of_list or [text])]
    return flags
