"""One rollout server: vLLM's own HTTP interface, with a limit on every wait."""

import base64
import io
import json
import urllib.error
import urllib.request
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_lora.policy.checksums import DifferentCopies, digest, join_ranks
from megatron_lora.rollout.generator import SamplingOptions

# Seconds for an answer that takes no generation; for loading weights.
SHORT, LOADING = 10.0, 300.0


class ServerFailed(RuntimeError):
    """The server does not answer, or answers with an error. permanent: it will again (a request it cannot take)."""

    def __init__(self, reason: str, *, permanent: bool = False):
        super().__init__(reason)
        self.permanent = permanent


@dataclass
class Drawn:
    """One answer of a server. logprobs: of each token, nats. routed_experts: [tokens, layers, k], of the prompt's and
    the answer's tokens, where the server was started to report them."""

    token_ids: list[int]
    logprobs: list[float]
    finish_reason: str
    routed_experts: Any = None


def _array(text: str | None) -> Any:
    """The array of a `.npy` file in base64, as vLLM sends arrays. Raises ValueError for another text."""
    return None if text is None else np.load(io.BytesIO(base64.b64decode(text)), allow_pickle=False)


@dataclass(frozen=True)
class EngineFacts:
    """base: fingerprint of the model that a server has read; "": not known. adapter_rank: the largest that its slots
    hold; 0: it takes no adapters."""

    base: str
    adapter_rank: int


class ServerClient:
    """A server at `url`. adapter: the name of the adapter that answers; None: the base. version: of the weights that
    answer; -1: the model folder's."""

    def __init__(self, url: str, timeout: float):
        self.url, self.timeout = url.rstrip("/"), timeout
        self.base = ""
        self.max_length = 0
        self.adapter: str | None = None
        self.version = -1
        self._loaded: list[str] = []

    @property
    def loaded(self) -> list[str]:
        """The adapters that it had when it was last asked."""
        return self._loaded

    @property
    def model(self) -> str:
        """The name under which what answers now is asked."""
        return self.adapter or self.base

    def describe(self) -> None:
        """Ask which model it serves. Raises ServerFailed."""
        models = self._get("/v1/models")["data"]
        base = next((model for model in models if model.get("parent") is None), None)
        if base is None:
            raise ServerFailed(f"{self.url} serves no base model", permanent=True)
        self.base, self.max_length = base["id"], int(base.get("max_model_len") or 0)
        self._loaded = [model["id"] for model in models if model.get("parent") is not None]

    def engine_facts(self) -> EngineFacts | None:
        """None where it cannot be asked (not started by `megatron-lora serve`). Raises ServerFailed."""
        try:
            base, adapter_rank = self._rpc("engine_facts", [], LOADING)[0]
        except ServerFailed as error:
            if error.permanent:
                return None
            raise
        return EngineFacts(base, adapter_rank)

    def restore_base(self) -> None:
        """Answer with the base of its model folder, whatever weights a run before has left in it."""
        self.adapter, self.version = None, -1
        try:
            replaced = self._rpc("restore_base", [], LOADING)
        except ServerFailed as error:
            if error.permanent:  # its weights cannot be replaced either
                return
            raise
        if "True" in replaced:
            self._post("/reset_prefix_cache", {}, SHORT)

    def load_adapter(self, name: str, folder: str, version: int, keep: Collection[str] = ()) -> None:
        """Answer with this adapter on the base. Others are unloaded, of which it may have kept some of a run before;
        keep: those that still answer requests."""
        self.restore_base()
        self.describe()
        if name in self._loaded:
            self._post("/v1/unload_lora_adapter", {"lora_name": name}, SHORT)
        self._post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": folder}, LOADING)
        for other in self._loaded:
            if other != name and other not in keep:
                self._post("/v1/unload_lora_adapter", {"lora_name": other}, SHORT)
        self.adapter, self.version = name, version

    def load_weights(self, folder: str, version: int) -> None:
        """Replace the base's weights by those in a folder, and answer without an adapter."""
        self._rpc("reload_from", [folder], LOADING)
        self._post("/reset_prefix_cache", {}, SHORT)
        self.adapter, self.version = None, version

    def fingerprint(self, kind: str) -> str | None:
        """Of what it holds; None where it cannot be asked (not started by `megatron-lora serve`)."""
        try:
            ranks = self._rpc("held_numbers", [kind], LOADING)
        except ServerFailed as error:
            if error.permanent:
                return None
            raise
        parts = [{(name, row, column): value for name, row, column, value in rank} for rank in ranks]
        try:
            return digest(kind, join_ranks(parts))
        except DifferentCopies as error:
            raise ServerFailed(f"{self.url}: {error}") from error

    def complete(
        self, prompt: Sequence[int], n: int, options: SamplingOptions, seed: int, *, model: str
    ) -> list[Drawn]:
        """n answers to a prompt of token ids, by the model or adapter of that name. Raises ServerFailed."""
        greedy = options.temperature == 0
        body: dict[str, Any] = {
            "model": model,
            "prompt": list(prompt),
            "n": 1 if greedy else n,
            "max_tokens": min(options.max_new_tokens, self.max_length - len(prompt)),
            "temperature": options.temperature,
            "top_p": 1.0 if greedy else options.top_p,
            "top_k": -1 if greedy else options.top_k,
            "stop": list(options.stop_strings),
            "stop_token_ids": list(options.stop_token_ids),
            "ignore_eos": True,
            "logprobs": 0,
            "return_token_ids": True,
            "add_special_tokens": False,
        }
        if not greedy:
            body["seed"] = seed
        answer = self._post("/v1/completions", body, self.timeout)
        try:
            drawn = [
                Drawn(
                    choice["token_ids"],
                    choice["logprobs"]["token_logprobs"],
                    choice["finish_reason"],
                    _array(choice.get("routed_experts")),
                )
                for choice in sorted(answer["choices"], key=lambda choice: choice["index"])
            ]
            by = answer.get("model", model)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ServerFailed(f"{self.url} answers in another form than vLLM's: {error!r}") from error
        if by != model:
            raise ServerFailed(f"{self.url} answered with {by}, was asked for {model}")
        if any(one.finish_reason not in ("stop", "length") for one in drawn):
            raise ServerFailed(f"{self.url} broke off an answer ({', '.join(str(o.finish_reason) for o in drawn)})")
        return drawn * (n if greedy else 1)

    def tokenize(self, model: str, text: str) -> list[int]:
        """What the server's tokenizer makes of a text, without special tokens. Raises ServerFailed."""
        body = {"model": model, "prompt": text, "add_special_tokens": False}
        answer = self._post("/tokenize", body, SHORT)
        return self._field(answer, "tokens")

    def score(self, ids: Sequence[int], model: str) -> list[float]:
        """Log-probability of each token after those before it, nats, at temperature 1; 0 for the first. Raises
        ServerFailed."""
        found = self.most_likely(ids, model, 0)
        return [0.0, *(one[token] for one, token in zip(found, ids[1:], strict=True))]

    def most_likely(self, ids: Sequence[int], model: str, k: int) -> list[dict[int, float]]:
        """Of each token but the first: id -> log-probability, nats, of the token itself and of the k most likely ones
        in its place, at temperature 1. Raises ServerFailed."""
        body = {
            "model": model,
            "prompt": list(ids),
            "max_tokens": 1,
            "temperature": 0.0,
            "prompt_logprobs": k,
            "add_special_tokens": False,
        }
        answer = self._post("/v1/completions", body, self.timeout)
        found = self._field(answer["choices"][0] if self._field(answer, "choices") else {}, "prompt_logprobs")
        try:
            scores = [{int(token): float(of["logprob"]) for token, of in one.items()} for one in found[1:]]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ServerFailed(f"{self.url} scores tokens in another form than vLLM's: {error!r}") from error
        wanted = zip(scores, ids[1:], strict=False)
        if len(scores) != len(ids) - 1 or any(token not in one or len(one) < k for one, token in wanted):
            raise ServerFailed(f"{self.url} scores tokens in another form than vLLM's: not each token with {k} others")
        return scores

    def _field(self, answer: Any, name: str) -> Any:
        if not isinstance(answer, dict) or answer.get(name) is None:
            raise ServerFailed(f"{self.url} answers in another form than vLLM's: no {name!r}")
        return answer[name]

    def answers(self) -> bool:
        try:
            self._request("/health", None, SHORT)
        except ServerFailed:
            return False
        return True

    def _rpc(self, method: str, arguments: list[str], timeout: float) -> list[Any]:
        return self._post("/collective_rpc", {"method": method, "args": arguments, "timeout": timeout}, timeout)[
            "results"
        ]

    def _get(self, path: str) -> Any:
        return json.loads(self._request(path, None, SHORT))

    def _post(self, path: str, body: dict[str, Any], timeout: float) -> Any:
        text = self._request(path, body, timeout)
        return json.loads(text) if text[:1] in (b"{", b"[") else None

    def _request(self, path: str, body: dict[str, Any] | None, timeout: float) -> bytes:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=timeout) as answer:
                return answer.read()
        except urllib.error.HTTPError as error:
            reason = error.read()[:500].decode(errors="replace")
            permanent = error.code in (400, 404, 405, 422)
            raise ServerFailed(f"{self.url}{path}: status {error.code}: {reason}", permanent=permanent) from error
        except (OSError, ValueError) as error:  # refused, reset, timed out, no JSON
            raise ServerFailed(f"{self.url}{path}: {error or type(error).__name__}") from error
