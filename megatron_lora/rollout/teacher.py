"""A teacher that vLLM servers serve: log-probabilities of given tokens, over their own HTTP interface."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megatron_lora.errors import UserError
from megatron_lora.rollout.generator import RolloutError
from megatron_lora.rollout.server_client import ServerClient, ServerFailed


@dataclass
class TeacherServers:
    """Servers of one teacher. model_name: of the teacher on them; None: what each serves first. max_length: of the
    longest row, in tokens. num_candidates: most likely tokens that are asked for besides. failures: of servers that are
    left out, with the reason."""

    urls: Sequence[str]
    model_name: str | None
    timeout: float
    at_once: int
    max_length: int
    num_candidates: int = 0
    failures: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.clients = [ServerClient(url, self.timeout) for url in self.urls]

    def start(self, tokenizer: Any, texts: Sequence[str]) -> None:
        """Ask each what it serves. texts: of the run's data. Raises UserError where one does not answer, serves
        sequences that are too short, has no model of that name, or makes other tokens of a text."""
        self.check()
        for client in self.clients:
            for text in texts:
                with _as_mistake():
                    theirs = client.tokenize(self.model_name or client.base, text)
                ours = tokenizer.encode(text, add_special_tokens=False)
                if theirs != ours:
                    raise UserError(
                        f"the teacher at {client.url} makes other tokens of {text[:60]!r} than the policy's "
                        f"tokenizer ({theirs[:8]}, {ours[:8]}): it has to have the same"
                    )

    def check(self) -> None:
        """As `start`, but for the tokens."""
        for client in self.clients:
            self._check(client)

    def not_ready(self) -> list[str]:
        """What keeps a run from starting now, for --dry-run."""
        found = []
        for client in self.clients:
            try:
                self._check(client)
            except UserError as error:
                found.append(f"not ready yet: {error}")
        return found

    def _check(self, client: ServerClient) -> None:
        with _as_mistake():
            client.describe()
        served = [client.base, *client.loaded]
        name = self.model_name or client.base
        if name not in served:
            raise UserError(f"teacher.model_name={name}: {client.url} serves {', '.join(served)}")
        if client.max_length <= self.max_length:
            raise UserError(
                f"{client.url} serves sequences of up to {client.max_length} tokens, and to score one of "
                f"policy.max_total_sequence_length={self.max_length} takes {self.max_length + 1}: start it with "
                f"--max-model-len {self.max_length + 1} or more"
            )
        if self.num_candidates:
            try:
                client.most_likely([0, 0], name, self.num_candidates)
            except ServerFailed as error:
                raise UserError(
                    f"the teacher at {client.url} does not give its {self.num_candidates} most likely tokens "
                    f"(distillation.topk_logits_k): {error}; start it with --max-logprobs {self.num_candidates} or more"
                ) from error

    def score(self, rows: Sequence[Sequence[int]]) -> list[Tensor]:
        """Each row's token log-probabilities [S] fp32, nats, at temperature 1; [0] is 0. With candidates [S, 1 + 2 k],
        as `policy.heads.MostLikely` gives them. A server that fails is left out, and its rows are asked elsewhere;
        RolloutError where none is left."""
        with ThreadPoolExecutor(self.at_once * len(self.clients)) as pool:
            return list(pool.map(self._score, range(len(rows)), rows))

    def _score(self, number: int, ids: Sequence[int]) -> Tensor:
        for turn in range(len(self.clients)):
            client = self.clients[(number + turn) % len(self.clients)]
            if client.url in self.failures:
                continue
            try:
                return self._ask(client, ids)
            except ServerFailed as error:
                self.failures[client.url] = str(error)
        raise RolloutError(f"no server of the teacher is left: {'; '.join(self.failures.values())}")

    def _ask(self, client: ServerClient, ids: Sequence[int]) -> Tensor:
        k, name = self.num_candidates, self.model_name or client.base
        if not k:
            return torch.tensor(client.score(ids, name), dtype=torch.float32)
        found = torch.zeros(len(ids), 1 + 2 * k)
        for place, (of, token) in enumerate(zip(client.most_likely(ids, name, k), ids[1:], strict=True), start=1):
            best = sorted(of, key=lambda other: of[other], reverse=True)[:k]
            found[place] = torch.tensor([of[token], *(of[other] for other in best), *map(float, best)])
        return found


@contextmanager
def _as_mistake() -> Iterator[None]:
    try:
        yield
    except ServerFailed as error:
        raise UserError(f"teacher.urls: {error}; start it with vLLM's server of the teacher's model") from error
