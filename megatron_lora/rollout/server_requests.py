"""Prompts on their way to rollout servers: dealt out in turn, asked elsewhere where a server fails, held back while new
weights are handed over. Every answer is noted with the version of the weights that the server was asked to use.

Requests run in threads; the methods are for one thread, the trainer's.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from megatron_lora.rollout.generator import RolloutError, SamplingOptions
from megatron_lora.rollout.server_client import Drawn, ServerClient
from megatron_lora.rollout.vllm import SEED_STRIDE


@dataclass(frozen=True)
class Answers:
    """To one prompt. version: of the weights that drew every token of them."""

    drawn: list[Drawn]
    version: int


@dataclass(eq=False)
class Batch:
    """Prompts asked together, and their answers as they come. urgent: goes before others, also while those are held
    back. started, ended: when the first was sent and the last came, by `time.perf_counter`; 0: not yet."""

    prompts: Sequence[Sequence[int]]
    num_samples: int
    options: SamplingOptions
    urgent: bool
    answers: list[Answers | None]
    num_left: int
    error: RolloutError | None = None
    started: float = 0.0
    ended: float = 0.0

    def found(self) -> list[Answers]:
        """All answers, in the prompts' order."""
        return [answers for answers in self.answers if answers is not None]


@dataclass(eq=False)
class _Request:
    """One prompt at one server. period: how often the server had been left out when it was sent."""

    batch: Batch
    index: int
    client: ServerClient
    model: str
    version: int
    period: int


@dataclass
class _Queue:
    """A server's prompts: (batch, number of the prompt)."""

    urgent: deque[tuple[Batch, int]] = field(default_factory=deque)
    others: deque[tuple[Batch, int]] = field(default_factory=deque)


class ServerRequests:
    """at_once: requests that a server has at a time, and as many urgent ones. out: servers left out, with the reason.
    news: lines on servers left out, for whoever tells them."""

    def __init__(self, clients: Sequence[ServerClient], at_once: int):
        self.clients, self.at_once = clients, at_once
        self.out: dict[str, str] = {}
        self.news: list[str] = []
        self._changed = threading.Condition()  # and the lock of all that follows
        self._queues = {client.url: _Queue() for client in clients}
        self._open: list[_Request] = []
        self._periods = dict.fromkeys(self._queues, 0)
        self._held_back = False

    def ask(
        self, prompts: Sequence[Sequence[int]], num_samples: int, options: SamplingOptions, *, urgent: bool
    ) -> Batch:
        """Send prompts on their way, by number: each of n servers gets every n-th. Raises RolloutError where none is
        left."""
        batch = Batch(prompts, num_samples, options, urgent, [None] * len(prompts), len(prompts))
        with self._changed:
            self.some_left()
            for index in range(len(prompts)):
                self._queue(batch, index)
            self._deal()
        return batch

    def wait(self, batch: Batch, on_answers: Callable[[int], None]) -> None:
        """Until all its answers are in; told of each few. Raises RolloutError where no server is left to ask."""
        told = 0
        while True:
            with self._changed:
                while batch.error is None and len(batch.prompts) - batch.num_left == told < len(batch.prompts):
                    self._changed.wait()
                count, error = len(batch.prompts) - batch.num_left, batch.error
            if error is not None:
                raise error
            if count > told:
                on_answers((count - told) * batch.num_samples)
                told = count
            if count == len(batch.prompts):
                return

    def hold_back(self, *, until_answered: bool) -> None:
        """Send no more prompts but urgent ones; until_answered: wait for the answers to those that were sent."""
        with self._changed:
            self._held_back = True
            if until_answered:
                self._changed.wait_for(lambda: all(request.batch.urgent for request in self._open))

    def go_on(self) -> None:
        with self._changed:
            self._held_back = False
            self._deal()

    def models_in_use(self, client: ServerClient) -> set[str]:
        """What the server still answers with."""
        with self._changed:
            return {request.model for request in self._open if request.client is client}

    def leave_out(self, client: ServerClient, reason: str) -> None:
        """Ask this server no more; its prompts are asked elsewhere."""
        with self._changed:
            self._leave_out(client, reason)
            self._deal()
            self._changed.notify_all()

    def take_in(self, client: ServerClient) -> None:
        """Ask this server again, or still."""
        with self._changed:
            self.out.pop(client.url, None)
            self._deal()

    def alive(self) -> list[ServerClient]:
        return [client for client in self.clients if client.url not in self.out]

    def some_left(self) -> list[ServerClient]:
        """Raises RolloutError where no server is."""
        alive = self.alive()
        if not alive:
            raise RolloutError(f"no rollout server is left: {'; '.join(self.out.values())}")
        return alive

    def drop(self) -> None:
        """Forget prompts that were not sent. Those that were end with the process."""
        with self._changed:
            self._queues = {url: _Queue() for url in self._queues}

    def _queue(self, batch: Batch, index: int) -> None:
        try:
            alive = self.some_left()
        except RolloutError as error:
            batch.error = error
            return
        client = self.clients[index % len(self.clients)]
        if client.url in self.out:
            client = alive[index // len(self.clients) % len(alive)]
        queue = self._queues[client.url]
        (queue.urgent if batch.urgent else queue.others).append((batch, index))

    def _leave_out(self, client: ServerClient, reason: str) -> None:
        if client.url not in self.out:
            self.news.append(f"rollout server left out: {reason}")
        self.out[client.url] = reason
        self._periods[client.url] += 1
        queue, self._queues[client.url] = self._queues[client.url], _Queue()
        for batch, index in (*queue.urgent, *queue.others):
            self._queue(batch, index)

    def _deal(self) -> None:
        for client in self.alive():
            queue = self._queues[client.url]
            while queue.urgent and self._has_place(client, urgent=True):
                self._send(client, *queue.urgent.popleft())
            while queue.others and not queue.urgent and not self._held_back and self._has_place(client, urgent=False):
                self._send(client, *queue.others.popleft())

    def _has_place(self, client: ServerClient, *, urgent: bool) -> bool:
        """Urgent prompts have places of their own: a proof would else wait for whole answers that were asked ahead."""
        mine = (request for request in self._open if request.client is client)
        return sum(request.batch.urgent == urgent for request in mine) < self.at_once

    def _send(self, client: ServerClient, batch: Batch, index: int) -> None:
        batch.started = batch.started or time.perf_counter()
        request = _Request(batch, index, client, client.model, client.version, self._periods[client.url])
        self._open.append(request)
        # A daemon: a run that ends does not wait for answers that it will not use.
        threading.Thread(target=self._answer, args=(request,), daemon=True).start()

    def _answer(self, request: _Request) -> None:
        batch, index = request.batch, request.index
        seed = (batch.options.seed * SEED_STRIDE + index * batch.num_samples) % (1 << 62)
        drawn, failure = None, ""
        try:
            drawn = request.client.complete(
                batch.prompts[index], batch.num_samples, batch.options, seed, model=request.model
            )
        except Exception as error:  # in a thread nobody else would see it; with no server left the run ends with it
            failure = str(error) or repr(error)
        with self._changed:
            self._open.remove(request)
            if drawn is not None:
                batch.answers[index] = Answers(drawn, request.version)
                batch.num_left -= 1
                batch.ended = time.perf_counter()
            else:
                # A server that was taken back meanwhile does not answer for what it did before.
                if request.period == self._periods[request.client.url]:
                    self._leave_out(request.client, failure)
                self._queue(batch, index)
            self._deal()
            self._changed.notify_all()
