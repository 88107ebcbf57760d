"""Whether rollout servers are what a run needs: asked before weights load, and again where they came later."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from megatron_lora.config.schema import PolicyConfig
from megatron_lora.errors import UserError
from megatron_lora.policy.weights_check import known_fingerprint
from megatron_lora.rollout.server_client import ServerClient, ServerFailed
from megatron_lora.rollout.vllm_engine import planned_slots
from megatron_lora.runtime.world import World


@dataclass(frozen=True)
class Needs:
    """What a run needs of a server. length: tokens of the longest answer with its prompt. base: the model's name and
    fingerprint (None: not known). adapter_rank: None: it is given merged weights."""

    length: int
    base: tuple[str, str | None]
    adapter_rank: int | None

    @classmethod
    def of(cls, policy: PolicyConfig, world: World) -> "Needs":
        rank, _ = planned_slots(policy, world)
        return cls(needed_length(policy), (policy.model_name, known_fingerprint(policy.model_name)), rank)


def needed_length(policy: PolicyConfig) -> int:
    """Tokens of the longest answer with its prompt that a server is asked for."""
    return policy.generation.vllm_cfg.max_model_len or policy.max_total_sequence_length


def check_server(client: ServerClient, needs: Needs) -> None:
    """Raise UserError for a server that does not answer, or that is not what the run needs, as far as it can be
    asked."""
    with as_mistake():
        client.describe()
        facts = client.engine_facts()
    if client.max_length < needs.length:
        raise UserError(
            f"{client.url} serves sequences of up to {client.max_length} tokens, the run needs {needs.length}: "
            f"start it with --max-model-len {needs.length} or more"
        )
    if facts is None:
        return
    name, ours = needs.base
    if facts.base and ours is not None and facts.base != ours:
        raise UserError(
            f"{client.url} serves {client.base}, whose weights have the fingerprint {facts.base}, and those of "
            f"policy.model_name={name} have {ours}: start it anew with `megatron-lora serve` and this recipe"
        )
    rank = needs.adapter_rank
    if rank is not None and facts.adapter_rank < rank:
        takes = f"adapters up to rank {facts.adapter_rank}" if facts.adapter_rank else "no adapters"
        raise UserError(
            f"the adapter's rank is {rank}, and {client.url} takes {takes}: start it anew with `megatron-lora serve` "
            "and this recipe, or set policy.generation.refit=merge"
        )


def check_servers(policy: PolicyConfig, world: World) -> None:
    """Raise UserError as `check_server` for any of the run's; those that do not answer yet pass where it waits for
    them (`servers.start_timeout_seconds`)."""
    servers, needs = policy.generation.servers, Needs.of(policy, world)
    for url in servers.urls:
        client = ServerClient(url, servers.timeout_seconds)
        if not servers.start_timeout_seconds or client.answers():
            check_server(client, needs)


@contextmanager
def as_mistake() -> Iterator[None]:
    try:
        yield
    except ServerFailed as error:
        raise UserError(
            f"policy.generation.servers.urls: {error}; start it with `megatron-lora serve RECIPE --port PORT`"
        ) from error
