"""Rollouts by servers: `vllm serve` on other GPUs or hosts, spoken to over HTTP by the run's first rank.

A refit writes the adapter (or merged weights) once to a folder that trainer and servers share, and each server loads it
under a name with its version. A server that fails is left out and its prompts are asked again elsewhere; it is taken
back when it answers and holds the present version.
"""

import json
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from megatron_lora.config.schema import PolicyConfig
from megatron_lora.errors import UserError
from megatron_lora.lora.peft_format import PREFIX
from megatron_lora.policy.interface import AdapterTensors
from megatron_lora.rollout.adapter_factors import factors_fingerprint, scaled_factors
from megatron_lora.rollout.generator import (
    AheadGenerator,
    Collected,
    Decoder,
    Handover,
    RolloutError,
    Sample,
    SamplingOptions,
    check_lengths,
)
from megatron_lora.rollout.routing import reported_experts
from megatron_lora.rollout.sent_weights import SentWeights
from megatron_lora.rollout.server_checks import Needs, as_mistake, check_server, needed_length
from megatron_lora.rollout.server_client import Drawn, ServerClient, ServerFailed
from megatron_lora.rollout.server_requests import Batch, ServerRequests
from megatron_lora.runtime.activity import tick
from megatron_lora.runtime.world import World

# A file of merged weights has a layer's, and no more bytes than this.
SHARD_BYTES = 2 << 30
# The longest block of a server's cache (vLLM on a CPU: 128), for the probe's contexts.
BLOCK = 128
# Between two looks at servers that are still loading.
LOOK_SECONDS = 0.5


class ServerGenerator(AheadGenerator):
    """The servers of `policy.generation.servers.urls`. Each answers whole prompts, dealt out in turn.

    say: told when a server is left out or taken back. Raises UserError where none answers, or one serves sequences that
    are too short.
    """

    def __init__(
        self,
        policy: PolicyConfig,
        world: World,
        tokenizer: Decoder | None,
        run_folder: Path,
        say: Callable[[str], None] = print,
    ):
        servers = policy.generation.servers
        self.policy, self.world, self.tokenizer, self.say = policy, world, tokenizer, say
        self.folder = Path(servers.shared_folder or run_folder / "rollout-weights").expanduser().absolute()
        self.clients = [ServerClient(url, servers.timeout_seconds) for url in servers.urls]
        self.requests = ServerRequests(self.clients, servers.requests_at_once)
        self.dtype = getattr(torch, policy.generation.vllm_cfg.precision or policy.precision)
        self.block_size = BLOCK
        self.max_length = needed_length(policy)
        self.num_replicas = len(self.clients)
        self._ahead: dict[int, Batch] = {}
        self._kind = "base"
        self._run = secrets.token_hex(4)

    def wait_until_ready(self, stopping: Callable[[], bool]) -> bool:
        until = time.monotonic() + self.policy.generation.servers.start_timeout_seconds
        while not self._on_first(lambda: time.monotonic() >= until or all(c.answers() for c in self.clients)):
            if stopping():
                return False
            tick()
            time.sleep(LOOK_SECONDS)
        return True

    def start(self) -> None:
        self._on_first(self._look)

    def _look(self) -> None:
        needs = Needs.of(self.policy, self.world)
        for client in self.clients:
            check_server(client, needs)
            with as_mistake():
                client.restore_base()
        if self.folder.exists():
            shutil.rmtree(self.folder)
        self.folder.mkdir(parents=True)

    def wake(self) -> None:
        """Servers have GPUs of their own."""

    def sleep(self) -> None:
        """Servers have GPUs of their own."""

    def load_adapter(self, adapter: AdapterTensors, version: int) -> Handover:
        factors = scaled_factors(adapter, self.dtype, torch.device("cpu"))
        num_bytes = sum(tensor.numel() * tensor.element_size() for pair in factors.values() for tensor in pair)
        handover = Handover(num_bytes, factors_fingerprint(factors))

        def hand_over() -> None:
            folder = _fresh(self.folder / self._name(version))
            tensors = {}
            for name, (a, b) in factors.items():
                tensors[f"{PREFIX}{name}.lora_A.weight"] = a.contiguous()
                tensors[f"{PREFIX}{name}.lora_B.weight"] = b.contiguous()
            save_file(tensors, folder / "adapter_model.safetensors")
            # The scale is in B, each linear's own.
            largest = max(a.shape[0] for a, _ in factors.values())
            config = {
                "peft_type": "LORA",
                "task_type": "CAUSAL_LM",
                "r": largest,
                "lora_alpha": largest,
                "bias": "none",
                "target_modules": sorted({name.split(".")[-1] for name in factors}),
            }
            (folder / "adapter_config.json").write_text(json.dumps(config))
            self._hold(folder, handover)

        return self._handed_over("adapter", version, handover, hand_over)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> Handover:
        # Every rank takes part in gathering; the first one writes.
        folder = self.folder / self._name(version)
        writer = Shards(folder, self.dtype) if self.world.rank == 0 else None
        for name, tensor in weights:
            if writer is not None:
                writer.add(name, tensor)
        handover = writer.close() if writer is not None else Handover(0, "")

        return self._handed_over("merge", version, handover, lambda: self._hold(folder, handover))

    def _handed_over(self, kind: str, version: int, handover: Handover, action: Callable[[], None]) -> Handover:
        self._kind, self.version = kind, version

        def act() -> Handover:
            action()
            used = {name for client in self.clients for name in self.requests.models_in_use(client)}
            for old in self.folder.iterdir():
                if old.name != self._name(version) and old.name not in used:
                    shutil.rmtree(old, ignore_errors=True)
            return handover

        self.handover = self._on_first(act)
        return self.handover

    def _name(self, version: int) -> str:
        """Of weights of this run: servers know an adapter, and what they keep of its prompts, by this name."""
        return f"version-{version}-{self._run}"

    def _hold(self, folder: Path, handover: Handover) -> None:
        """Let every server load what is in the folder; those that cannot are left out."""
        self._present = (folder, handover)
        for client in self.clients:
            try:
                self._give(client)
                self.requests.take_in(client)
            except ServerFailed as error:
                self.requests.leave_out(client, str(error))
        self._tell()
        self.requests.some_left()

    def _give(self, client: ServerClient) -> None:
        folder, handover = self._present
        if self._kind == "adapter":
            client.load_adapter(folder.name, str(folder), self.version, self.requests.models_in_use(client))
        else:
            client.load_weights(str(folder), self.version)
        held = client.fingerprint(self._kind)
        if held is not None and held != handover.fingerprint:
            raise ServerFailed(f"{client.url} holds {held} after it was handed {handover.fingerprint}")

    def held_fingerprint(self) -> str:
        def ask() -> str:
            found = {client.url: client.fingerprint(self._kind) for client in self.requests.alive()}
            # A server that cannot be asked is proven by the probe alone.
            known = {value for value in found.values() if value is not None} or {self.handover.fingerprint}
            if len(known) > 1:
                raise RolloutError(f"the rollout servers hold different weights: {found}")
            return known.pop()

        return self._on_first(ask)

    def generate(self, prompts: Sequence[Sequence[int]], num_samples: int, options: SamplingOptions) -> list[Sample]:
        check_lengths(prompts, self.max_length, "policy.generation.vllm_cfg.max_model_len")
        return self._on_first(lambda: self._generate(prompts, num_samples, options))

    def _generate(self, prompts: Sequence[Sequence[int]], num_samples: int, options: SamplingOptions) -> list[Sample]:
        self._take_back()
        batch = self.requests.ask(prompts, num_samples, options, urgent=True)
        self._wait(batch)
        return self._samples(batch)

    def ask_ahead(
        self, number: int, prompts: Sequence[Sequence[int]], num_samples: int, options: SamplingOptions
    ) -> None:
        check_lengths(prompts, self.max_length, "policy.generation.vllm_cfg.max_model_len")

        def ask() -> None:
            self._take_back()
            self._ahead[number] = self.requests.ask(prompts, num_samples, options, urgent=False)

        self._on_first(ask)

    def collect(self, number: int, oldest: int) -> Collected:
        return self._on_first(lambda: self._collect(number, oldest))

    def _collect(self, number: int, oldest: int) -> Collected:
        batch = self._ahead.pop(number)
        self._wait(batch)
        old = [index for index, answers in enumerate(batch.found()) if answers.version < oldest]
        seconds = batch.ended - batch.started
        if old:
            again = self.requests.ask([batch.prompts[i] for i in old], batch.num_samples, batch.options, urgent=True)
            self._wait(again)
            for index, answers in zip(old, again.found(), strict=True):
                batch.answers[index] = answers
            seconds += again.ended - again.started
        return Collected(self._samples(batch), seconds, len(old) * batch.num_samples)

    @contextmanager
    def new_weights(self, *, in_flight: bool) -> Iterator[None]:
        if self.world.rank == 0:
            self.requests.hold_back(until_answered=not in_flight)
        yield
        if self.world.rank == 0:
            self.requests.go_on()

    def _wait(self, batch: Batch) -> None:
        try:
            self.requests.wait(batch, self.on_answers)
        finally:
            self._tell()

    def _samples(self, batch: Batch) -> list[Sample]:
        return [
            self._sample(index, list(batch.prompts[index]), drawn, answers.version)
            for index, answers in enumerate(batch.found())
            for drawn in answers.drawn
        ]

    def _sample(self, index: int, prompt: list[int], drawn: Drawn, version: int) -> Sample:
        return Sample(
            prompt_index=index,
            prompt_ids=prompt,
            completion_ids=drawn.token_ids,
            logprobs=torch.tensor(drawn.logprobs, dtype=torch.float32),
            finish_reason=drawn.finish_reason,
            text=self.tokenizer.decode(drawn.token_ids, skip_special_tokens=True) if self.tokenizer else "",
            adapter_version=version,
            routed_experts=self._experts(drawn, len(prompt)) if self.policy.router_replay.enabled else None,
        )

    @staticmethod
    def _experts(drawn: Drawn, prompt_length: int) -> Tensor:
        if drawn.routed_experts is None:
            raise RolloutError(
                "a rollout server did not report the experts of an answer (policy.router_replay.enabled); start it "
                "with `megatron-lora serve` and the recipe of this run, or with vLLM's --enable-return-routed-experts"
            )
        return reported_experts(drawn.routed_experts, prompt_length + len(drawn.token_ids))

    def _take_back(self) -> None:
        for client in self.clients:
            if client.url not in self.requests.out or not client.answers():
                continue
            try:
                client.describe()
                client.restore_base()
                if self._kind != "base":
                    self._give(client)
            except ServerFailed as error:
                self.requests.leave_out(client, str(error))
                continue
            self.requests.take_in(client)
            self.say(f"rollout server {client.url} answers again and holds version {self.version}: taken back")

    def _tell(self) -> None:
        while self.requests.news:
            self.say(self.requests.news.pop(0))

    def close(self) -> None:
        """The servers go on; whoever started them ends them."""
        self.requests.drop()
        if self.world.rank == 0:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _on_first(self, action: Callable[[], Any]) -> Any:
        """What `action` gives on rank 0, or its error, on all ranks."""
        box: list[Any] = [None, None]
        if self.world.rank == 0:
            try:
                box[0] = action()
            except (UserError, RolloutError) as error:
                box[1] = error
            except ServerFailed as error:
                box[1] = RolloutError(str(error))
        if self.world.size > 1:
            device = self.world.device if self.world.device.type == "cuda" else None
            dist.broadcast_object_list(box, src=0, device=device)
        if box[1] is not None:
            raise box[1]
        return box[0]


class Shards:
    """Writes merged weights to files of a folder as they come, a layer at a time: no more is held."""

    def __init__(self, folder: Path, dtype: torch.dtype):
        self.folder = _fresh(folder)
        self.sent = SentWeights(dtype, torch.device("cpu"))
        self.shard: dict[str, Tensor] = {}
        self.layer = ""
        self.held = self.number = 0

    def add(self, name: str, tensor: Tensor) -> None:
        tensor = self.sent.note(name, tensor).contiguous()
        size = tensor.numel() * tensor.element_size()
        before, self.layer = self.layer, "".join(re.findall(r"\.layers\.\d+\.", name))
        if self.shard and (self.layer != before or self.held + size > SHARD_BYTES):
            self._write()
        self.shard[name] = tensor
        self.held += size

    def close(self) -> Handover:
        self._write()
        return self.sent.handover()

    def _write(self) -> None:
        save_file(self.shard, self.folder / f"weights-{self.number:05}.safetensors")
        self.shard, self.held, self.number = {}, 0, self.number + 1


def _fresh(folder: Path) -> Path:
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    return folder
