"""What the trainer does where a rollout server fails, against small HTTP servers that fail on command. Real servers:
tests/end_to_end/test_grpo_servers.py."""

import base64
import io
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from megatron_lora.config.schema import PolicyConfig
from megatron_lora.errors import UserError
from megatron_lora.lora.peft_format import PREFIX
from megatron_lora.policy.interface import AdapterTensors
from megatron_lora.rollout.generator import RolloutError, SamplingOptions
from megatron_lora.rollout.server_checks import Needs, check_server, check_servers
from megatron_lora.rollout.server_client import ServerClient, ServerFailed
from megatron_lora.rollout.servers import ServerGenerator, Shards
from megatron_lora.runtime.world import World
from tests.support.http_server import JsonServer
from tests.support.live_memory import LiveFloats

LINEAR = "model.layers.0.self_attn.q_proj"
OPTIONS = SamplingOptions(max_new_tokens=4, seed=1)


class Server(JsonServer):
    """Answers each prompt with its first token, `n` times, while its gate is open. behaviour: ok, error, hang, other
    (other weights), by another (answers of another adapter) or garbage. models: that were asked, in order. experts:
    reported of every answer."""

    def __init__(self, port: int = 0):
        self.behaviour, self.adapters, self.models = "ok", {}, []
        self.facts: tuple[int, Any] = (404, {"detail": "Not Found"})
        self.experts: str | None = None
        self.gate = threading.Event()
        self.gate.set()
        super().__init__(port)

    def get(self, path: str) -> Any:
        models = [{"id": "base", "parent": None, "max_model_len": 64}]
        models += [{"id": name, "parent": "base"} for name in self.adapters]
        return {"data": models} if path == "/v1/models" else {}

    def post(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        if path == "/v1/load_lora_adapter":
            self.adapters[body["lora_name"]] = body["lora_path"]
        if path == "/v1/unload_lora_adapter":
            del self.adapters[body["lora_name"]]
        if path == "/collective_rpc" and body["method"] == "engine_facts":
            return self.facts
        if path == "/collective_rpc":
            return (200, {"results": ["False"]}) if body["method"] == "restore_base" else self.rpc()
        if path != "/v1/completions":
            return 200, {}
        self.models.append(body["model"])
        self.gate.wait(30.0)
        if self.behaviour == "error":
            return 500, {"error": "engine dead"}
        if self.behaviour == "hang":
            threading.Event().wait(3.0)
        choice = {"token_ids": body["prompt"][:1], "logprobs": {"token_logprobs": [-0.5]}, "finish_reason": "stop"}
        if self.experts is not None:
            choice["routed_experts"] = self.experts
        if self.behaviour == "garbage":
            return 200, {"choices": [{"text": "x"}]}
        model = "version-0" if self.behaviour == "by another" else body["model"]
        return 200, {"model": model, "choices": [choice | {"index": number} for number in range(body["n"])]}

    @property
    def asked(self) -> int:
        return len(self.models)

    def rpc(self) -> tuple[int, Any]:
        """As `server_worker.ServerWorker.held_numbers`, from the file that it was given."""
        from megatron_lora.policy.checksums import checksum

        folder = next(iter(self.adapters.values()))
        tensors = load_file(Path(folder) / "adapter_model.safetensors")
        wrong = 1 if self.behaviour == "other" else 0
        return 200, {"results": [[[name, 0, 0, int(checksum(t)) + wrong] for name, t in tensors.items()]]}

    def stop(self) -> None:
        self.http.shutdown()
        self.http.server_close()


@pytest.fixture
def two() -> Iterator[list[Server]]:
    servers = [Server(), Server()]
    yield servers
    for server in servers:
        server.stop()


def adapter() -> AdapterTensors:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"{PREFIX}{LINEAR}.lora_A.weight": torch.randn(2, 8, generator=generator),
        f"{PREFIX}{LINEAR}.lora_B.weight": torch.randn(8, 2, generator=generator),
    }
    return AdapterTensors({"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}, tensors)


def policy_of(servers: list[Server], length: int = 64, **options: float) -> PolicyConfig:
    return PolicyConfig.model_validate(
        {
            "model_name": "base",
            "precision": "float32",
            "max_total_sequence_length": length,
            "generation": {
                "colocated": {"enabled": False},
                "servers": {"urls": [server.url for server in servers], **options},
            },
        }
    )


def build(servers: list[Server], tmp_path: Path, say: Callable[[str], None] = print, **options: Any) -> ServerGenerator:
    return ServerGenerator(policy_of(servers, **options), World.alone(), None, tmp_path, say)


def start(
    servers: list[Server], tmp_path: Path, timeout: float = 30.0, **options: float
) -> tuple[ServerGenerator, list[str]]:
    said: list[str] = []
    generator = build(servers, tmp_path, said.append, timeout_seconds=timeout, **options)
    assert generator.wait_until_ready(lambda: False)
    generator.start()
    generator.load_adapter(adapter(), 3)
    return generator, said


def answers(generator: ServerGenerator) -> list[tuple[int, list[int], int]]:
    samples = generator.generate([[10 + i, 1] for i in range(8)], 2, OPTIONS)
    return [(sample.prompt_index, sample.completion_ids, sample.adapter_version) for sample in samples]


WANTED = [(i, [10 + i], 3) for i in range(8) for _ in range(2)]


def test_prompts_are_shared_out_and_come_back_in_order(two: list[Server], tmp_path: Path) -> None:
    generator, said = start(two, tmp_path)
    assert answers(generator) == WANTED and not said
    assert [server.asked for server in two] == [4, 4]
    assert generator.held_fingerprint() == generator.handover.fingerprint


def test_an_old_version_is_unloaded_and_its_file_removed(two: list[Server], tmp_path: Path) -> None:
    generator, _ = start(two, tmp_path)
    generator.load_adapter(adapter(), 4)
    [name] = two[0].adapters
    assert name.startswith("version-4-") and list(two[1].adapters) == [name]
    assert [path.name for path in (tmp_path / "rollout-weights").iterdir()] == [name]
    generator.close()
    assert not (tmp_path / "rollout-weights").exists()


@pytest.mark.parametrize("behaviour", ["error", "hang", "garbage", "by another"])
def test_a_server_that_fails_is_left_out_and_its_prompts_asked_elsewhere(
    two: list[Server], tmp_path: Path, behaviour: str
) -> None:
    generator, said = start(two, tmp_path, timeout=1.0)
    two[0].behaviour = behaviour
    assert answers(generator) == WANTED
    assert len(said) == 1 and said[0].startswith("rollout server left out") and two[0].url in said[0]
    assert two[1].asked == 8
    two[0].behaviour = "ok"
    assert answers(generator) == WANTED
    assert "taken back" in said[1] and two[0].asked > 1


def test_a_dead_server_is_taken_back_with_the_present_version(two: list[Server], tmp_path: Path) -> None:
    generator, said = start(two, tmp_path)
    two[0].stop()
    assert answers(generator) == WANTED
    generator.load_adapter(adapter(), 4)
    two[0] = Server(two[0].port)
    samples = generator.generate([[5], [6]], 1, OPTIONS)
    assert {sample.adapter_version for sample in samples} == {4}
    assert list(two[0].adapters) == list(two[1].adapters) and two[0].asked == 1
    assert "taken back" in said[-1]


def test_a_server_with_other_weights_is_not_used(two: list[Server], tmp_path: Path) -> None:
    generator, said = start(two, tmp_path)
    two[1].behaviour = "other"
    generator.load_adapter(adapter(), 4)
    assert "holds adapter:" in said[0] and two[1].url in said[0]
    two[1].models = []
    generator.generate([[5], [6]], 1, OPTIONS)
    assert two[1].asked == 0


def test_merged_weights_are_written_without_ever_holding_more_than_a_layer(tmp_path: Path) -> None:
    size = 64 << 10
    names = ["model.embed_tokens.weight"]
    names += [f"model.layers.{layer}.mlp.{name}_proj.weight" for layer in range(6) for name in ("gate", "up", "down")]
    names += ["model.norm.weight", "lm_head.weight"]

    def weights() -> Iterator[tuple[str, torch.Tensor]]:
        for number, name in enumerate(names):
            yield name, torch.full((128, size // 512), float(number))

    with LiveFloats() as live:
        shards = Shards(tmp_path / "weights", torch.float32)
        for name, tensor in weights():
            shards.add(name, tensor)
            del tensor
        handover = shards.close()
    assert handover.num_bytes == len(names) * size
    # A layer's three, the next layer's first, and columns that are read back.
    assert 3 * size < live.peak < 4.5 * size
    files = sorted((tmp_path / "weights").iterdir())
    stored = [load_file(path) for path in files]
    assert [len(tensors) for tensors in stored] == [1, 3, 3, 3, 3, 3, 3, 2]
    found = {name: tensor for tensors in stored for name, tensor in tensors.items()}
    assert set(found) == set(names) and all(bool((found[name] == n).all()) for n, name in enumerate(names))


def test_without_any_server_the_run_ends_with_the_reasons(two: list[Server], tmp_path: Path) -> None:
    generator, _ = start(two, tmp_path)
    for server in two:
        server.behaviour = "error"
    with pytest.raises(RolloutError, match="no rollout server is left.*engine dead.*engine dead"):
        answers(generator)


def test_the_same_version_of_another_run_has_another_name(two: list[Server], tmp_path: Path) -> None:
    """A server keeps what it computed for a name's prompts."""
    start(two, tmp_path)
    [before] = two[0].adapters
    start(two, tmp_path)
    [after] = two[0].adapters
    assert before != after and before.startswith("version-3-") and after.startswith("version-3-")


def test_a_server_that_is_not_there_is_refused_at_start(two: list[Server], tmp_path: Path) -> None:
    two[1].stop()
    with pytest.raises(UserError, match=r"servers\.urls.*refused.*megatron-lora serve"):
        start(two, tmp_path)


def test_a_server_that_is_still_loading_is_waited_for(two: list[Server], tmp_path: Path) -> None:
    port = two[1].port
    two[1].stop()

    def come() -> None:
        two[1] = Server(port)

    loading = threading.Timer(0.7, come)
    loading.start()
    generator, _ = start(list(two), tmp_path, start_timeout_seconds=20.0)
    loading.join()
    assert len(answers(generator)) == 16 and two[1].models


def test_a_signal_ends_the_wait_for_a_server(two: list[Server], tmp_path: Path) -> None:
    two[1].stop()
    asked = iter([False, True])
    began = time.monotonic()
    generator = build(two, tmp_path, start_timeout_seconds=60.0)
    assert not generator.wait_until_ready(lambda: next(asked)) and time.monotonic() - began < 10
    assert build(two[:1], tmp_path, start_timeout_seconds=60.0).wait_until_ready(lambda: True)


NEEDS = Needs(length=64, base=("base", "1234"), adapter_rank=16)


@pytest.mark.parametrize(
    ("needs", "facts", "said"),
    [
        ({"length": 65}, ["1234", 16], "up to 64 tokens, the run needs 65.*--max-model-len 65"),
        ({}, ["abcd", 16], "fingerprint abcd, and those of policy.model_name=base have 1234.*megatron-lora serve"),
        ({}, ["1234", 8], "rank is 16, and http.* takes adapters up to rank 8.*refit=merge"),
        ({}, ["1234", 0], "takes no adapters"),
    ],
)
def test_a_server_that_is_not_what_the_run_needs_is_refused(
    two: list[Server], needs: dict[str, Any], facts: list[Any], said: str
) -> None:
    two[0].facts = 200, {"results": [facts]}
    with pytest.raises(UserError, match=said):
        check_server(ServerClient(two[0].url, 5.0), replace(NEEDS, **needs))


def test_a_server_that_is_what_the_run_needs_or_cannot_say(two: list[Server]) -> None:
    """A hub name's files may not be here; merged weights need no slots; a plain `vllm serve` has no workers of ours."""
    check_server(ServerClient(two[0].url, 5.0), NEEDS)
    two[0].facts = 200, {"results": [["1234", 16]]}
    for needs in (NEEDS, replace(NEEDS, base=("hub/name", None)), replace(NEEDS, adapter_rank=None)):
        check_server(ServerClient(two[0].url, 5.0), needs)
    two[0].facts = 200, {"results": [["", 16]]}
    check_server(ServerClient(two[0].url, 5.0), NEEDS)


def test_before_weights_load_only_servers_that_are_waited_for_may_be_silent(two: list[Server]) -> None:
    two[1].stop()
    with pytest.raises(UserError, match=r"servers\.urls.*refused"):
        check_servers(policy_of(two), World.alone())
    check_servers(policy_of(two, start_timeout_seconds=5.0), World.alone())
    two[0].facts = 200, {"results": [["", 0]]}
    with pytest.raises(UserError, match="up to 64 tokens"):
        check_servers(policy_of(two[:1], start_timeout_seconds=5.0, length=128), World.alone())


def test_a_server_without_workers_of_ours_has_no_fingerprint(two: list[Server]) -> None:
    client = ServerClient(two[0].url, 5.0)
    two[0].rpc = lambda: (404, {"detail": "Not Found"})
    assert client.fingerprint("adapter") is None
    two[0].rpc = lambda: (500, {})
    with pytest.raises(ServerFailed):
        client.fingerprint("adapter")


def test_reported_experts_come_with_the_answers(two: list[Server], tmp_path: Path) -> None:
    """Two tokens of a prompt and one drawn, which the model has not read; three layers, two experts a token."""
    generator, _ = start(two, tmp_path)
    generator.policy.router_replay.enabled = True
    array = np.arange(2 * 3 * 2, dtype=np.uint8).reshape(2, 3, 2)
    file = io.BytesIO()
    np.save(file, array)
    for server in two:
        server.experts = base64.b64encode(file.getvalue()).decode()
    for sample in generator.generate([[10, 1], [11, 1]], 2, OPTIONS):
        assert sample.routed_experts is not None and sample.routed_experts.shape == (3, 3, 2)
        assert torch.equal(sample.routed_experts[:2], torch.from_numpy(array.astype(np.int16)))
    for server in two:
        server.experts = None
    with pytest.raises(RolloutError, match="did not report the experts.*--enable-return-routed-experts"):
        generator.generate([[10, 1]], 1, OPTIONS)
