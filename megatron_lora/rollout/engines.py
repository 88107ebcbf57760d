"""The rollout engines that there are: what each refuses, how it is built, what it must be given after a step.

What the rest of a recipe must know of them is `config/rollout_engines.py`'s, under the same names.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_lora.config.rollout_engines import BACKENDS
from megatron_lora.config.schema import PolicyConfig
from megatron_lora.config.schema_generation import GenerationConfig
from megatron_lora.errors import UserError
from megatron_lora.policy.adapter_start import planned_adapter
from megatron_lora.policy.interface import Policy
from megatron_lora.policy.weights_check import read_base
from megatron_lora.rollout import vllm_engine
from megatron_lora.rollout.generator import Generator
from megatron_lora.rollout.server_checks import Needs, check_server, check_servers
from megatron_lora.rollout.server_client import ServerClient
from megatron_lora.runtime.world import World


@dataclass(frozen=True)
class Trainer:
    """Whom an engine answers for. folder: the run's. say: told what the user should know."""

    policy: Policy
    config: PolicyConfig
    world: World
    tokenizer: Any
    folder: Path
    say: Callable[[str], None] = print


class Engine(ABC):
    """refits: whether it holds weights of its own, which a step leaves behind."""

    refits: bool = True

    def check_keys(self, generation: GenerationConfig) -> None:  # noqa: B027
        """Raise UserError for keys of `policy.generation` that contradict each other."""

    @abstractmethod
    def check(self, policy: PolicyConfig, world: World) -> None:
        """Raise UserError for what it could not serve, before weights load."""

    def not_ready(self, policy: PolicyConfig, world: World) -> list[str]:
        """What has to be there when a run begins, and is not yet."""
        return []

    def check_outside(self, policy: PolicyConfig, world: World) -> None:  # noqa: B027
        """Raise UserError for what is not as a run that begins now needs it, outside its own processes."""

    @abstractmethod
    def build(self, trainer: Trainer) -> Generator:
        """The generator, not yet started. Collective."""

    def merge_only_reason(self, policy: PolicyConfig, world: World) -> str | None:
        """Why it can be given merged weights only; None where it can be given the adapter."""
        return None


class ColocatedVllm(Engine):
    """vLLM in the trainer's processes."""

    def check(self, policy: PolicyConfig, world: World) -> None:
        _check_length(policy)
        _check_model(policy)
        _check_adapter(policy)
        vllm_engine.check_installed(world.device)
        rank, _ = vllm_engine.planned_slots(policy, world)
        model = vllm_engine.base_config(policy)
        vllm_engine.check_request(policy, world, model, rank)
        vllm_engine.check_with_vllm(policy, world, model)

    def not_ready(self, policy: PolicyConfig, world: World) -> list[str]:
        reason = None if torch.cuda.is_available() else vllm_engine.needs_gpu_reason(policy)
        return [] if reason is None else [f"not ready yet: {reason}"]

    def check_outside(self, policy: PolicyConfig, world: World) -> None:
        """That there is a GPU where it needs one; --dry-run, which may be made elsewhere, tells it in `not_ready`."""
        reason = None if world.device.type == "cuda" else vllm_engine.needs_gpu_reason(policy)
        if reason is not None:
            raise UserError(reason)

    def build(self, trainer: Trainer) -> Generator:
        from megatron_lora.rollout.vllm import VllmGenerator

        hands_over = vllm_engine.hands_over_adapter(trainer.config, trainer.world)
        adapter = trainer.policy.adapter() if hands_over else None
        return VllmGenerator(trainer.config, trainer.world, trainer.tokenizer, adapter)

    def merge_only_reason(self, policy: PolicyConfig, world: World) -> str | None:
        return vllm_engine.merge_only_reason(policy, world)


class VllmServers(Engine):
    """vLLM's servers, on machines of their own."""

    def check_keys(self, generation: GenerationConfig) -> None:
        urls = generation.servers.urls
        if not urls:
            raise UserError(
                "policy.generation.colocated.enabled=false needs policy.generation.servers.urls, such as "
                '["http://node1:8000"]; start a server with `megatron-lora serve RECIPE.yaml --host 0.0.0.0 --port '
                "8000`, or set enabled to true"
            )
        wrong = [url for url in urls if not url.startswith(("http://", "https://"))]
        if wrong or len(set(urls)) < len(urls):
            raise UserError(f"policy.generation.servers.urls={urls}: wanted each server once, as http://host:port")

    def check(self, policy: PolicyConfig, world: World) -> None:
        _check_length(policy)
        _check_model(policy)
        _check_adapter(policy)
        vllm_engine.check_servers(policy)
        rank, _ = vllm_engine.planned_slots(policy, world)
        vllm_engine.check_rank(policy, rank)

    def not_ready(self, policy: PolicyConfig, world: World) -> list[str]:
        found, needs = [], Needs.of(policy, world)
        for url in policy.generation.servers.urls:
            try:
                check_server(ServerClient(url, policy.generation.servers.timeout_seconds), needs)
            except UserError as error:
                found.append(f"not ready yet: {error}")
        return found

    def check_outside(self, policy: PolicyConfig, world: World) -> None:
        check_servers(policy, world)

    def build(self, trainer: Trainer) -> Generator:
        from megatron_lora.rollout.servers import ServerGenerator

        return ServerGenerator(trainer.config, trainer.world, trainer.tokenizer, trainer.folder, trainer.say)

    def merge_only_reason(self, policy: PolicyConfig, world: World) -> str | None:
        return vllm_engine.merge_only_reason(policy, world)


class TrainingModel(Engine):
    """The Megatron model that trains."""

    refits = False

    def check(self, policy: PolicyConfig, world: World) -> None:
        if not policy.megatron_cfg.enabled:
            raise UserError(
                "policy.generation.backend=megatron generates with the Megatron model, but policy.megatron_cfg.enabled "
                "is false; set policy.generation.backend=vllm or policy.megatron_cfg.enabled=true"
            )
        experts = policy.megatron_cfg.expert_model_parallel_size
        if experts > 1:
            raise UserError(
                "policy.generation.backend=megatron has no expert parallelism, but policy.megatron_cfg."
                f"expert_model_parallel_size={experts}; set policy.generation.backend=vllm or the size to 1"
            )

    def build(self, trainer: Trainer) -> Generator:
        from megatron_lora.rollout.native import NativeGenerator

        return NativeGenerator(trainer.policy, trainer.tokenizer)


ENGINES: dict[str, Engine] = {
    "vllm": ColocatedVllm(),
    "servers": VllmServers(),
    "megatron": TrainingModel(),
}


def engine_of(generation: GenerationConfig) -> Engine:
    """The one that answers."""
    return ENGINES[generation.engine.name]


def check_place(generation: GenerationConfig) -> None:
    """Who answers where: in the trainer's processes, or servers. Raises UserError where keys contradict each other."""
    urls = generation.servers.urls
    if generation.colocated.enabled and urls:
        raise UserError(
            f"policy.generation.servers.urls names {len(urls)} servers, but policy.generation.colocated.enabled is "
            "true; set it to false, or urls to []"
        )
    if not generation.colocated.enabled and not generation.engine.outside:
        others = " or ".join(name for name, (_, outside) in BACKENDS.items() if outside is not None)
        raise UserError(
            f"policy.generation.colocated.enabled=false, but backend={generation.backend} generates with the training "
            f"model itself; set backend to {others} or enabled to true"
        )
    engine_of(generation).check_keys(generation)


def _check_model(policy: PolicyConfig) -> None:
    model = read_base(policy)
    if model.tower:
        raise UserError(
            f"policy.model_name={policy.model_name!r} is a vision-language model, and vLLM, which serves it, holds its "
            "language model under names that are not read back here; set policy.generation.backend=megatron"
        )


def _check_adapter(policy: PolicyConfig) -> None:
    """What is merged into a tensor of all experts could not be shown to be the trainer's (`merged_columns.py`)."""
    planned = planned_adapter(policy)
    if planned is not None and any(planned.spec.shapes.linear(module.kind).packed for module in planned.spec.modules):
        raise UserError(
            f"adapters on the experts of a {planned.spec.shapes.model_type} model, which are one tensor a layer: what "
            "vLLM is given of them cannot be checked against the trainer's here; set policy.generation.backend="
            "megatron, or leave the experts out of target_modules"
        )


def _check_length(policy: PolicyConfig) -> None:
    longest = policy.generation.vllm_cfg.max_model_len
    if longest is not None and longest > policy.max_total_sequence_length:
        raise UserError(
            f"policy.generation.vllm_cfg.max_model_len={longest} is above policy.max_total_sequence_length="
            f"{policy.max_total_sequence_length}, so answers could be longer than what can be trained on; lower it"
        )
