"""A micro-batch's forward pass, and its backward pass, each as one CUDA graph.

A layer with adapters is some sixty kernels and as many Python calls; where the kernels are short, the host is what a
step waits for. A graph is recorded for each shape (`data.fixed_shape`) when it is met for the second time: the first
time the micro-batch runs as it would without, which compiles and sizes what graphs may not. Losses stay outside, since
objectives differ, and so do reductions over ranks and the optimizer.

Recorded are addresses: those of the weights, of the factors and of their gradient buffers, all of which stay where they
are and change in place.
"""

import logging
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from megatron_lora.data.batch import MicroBatch
from megatron_lora.data.fixed_shape import FixedShape, fixed_shape, stretched
from megatron_lora.lora.inject import Adapted
from megatron_lora.policy.frozen_head import HeadOptions
from megatron_lora.policy.megatron.packed import RotaryPositions
from megatron_lora.runtime.memory import hold_graph_pool

logger = logging.getLogger(__name__)

# Beyond so many, further shapes run without: each graph keeps some megabytes for its thousands of kernels.
MOST_GRAPHS = 32
# (shape, head, whether gradients are wanted, whether adapters are on)
_Key = tuple[FixedShape, HeadOptions, bool, bool]
Forward = Callable[[Any, MicroBatch], Tensor]


class GraphedPasses:
    """Log-probabilities of micro-batches, differentiable, by graphs where they can be.

    forward: (model, micro-batch on the device) -> log-probabilities of its targets. linears: the adapted ones, whose
    factors are all that trains. insists: a micro-batch that cannot be recorded is an error; else the run goes on
    without graphs.
    """

    def __init__(
        self,
        chunk: GPTModel,
        forward: Forward,
        linears: Sequence[Adapted],
        rotary: RotaryPositions,
        pad_token_id: int,
        *,
        insists: bool,
    ):
        self.chunk, self.forward, self.linears, self.rotary = chunk, forward, linears, rotary
        self.pad_token_id, self.insists = pad_token_id, insists
        self._given_up = False
        names = {parameter: name for name, parameter in chunk.named_parameters()}
        factors = dict.fromkeys(held.parameter for linear in linears for held in linear.held_factors)
        self.factors = {names[parameter]: parameter for parameter in factors}
        self._met: Counter[_Key] = Counter()
        self._graphs: dict[_Key, _Graph] = {}
        self._pool = torch.cuda.graph_pool_handle()
        # What makes the output of a replay depend on something that wants a gradient.
        self._anchor = torch.zeros((), device=next(chunk.parameters()).device, requires_grad=True)
        leave_random_states(chunk)

    def logps(self, batch: MicroBatch, head: HeadOptions) -> Tensor:
        """Those of the micro-batch's targets [N], fp32. A graph's backward pass has to come before its next forward
        pass: it reads what that one kept."""
        enabled = {linear.enabled for linear in self.linears}
        if len(enabled) > 1 or self._given_up:
            return self.forward(self.chunk, batch)
        key = (fixed_shape(batch), head, torch.is_grad_enabled(), enabled == {True})
        batch, num_targets = stretched(batch, key[0], self.pad_token_id), batch.targets.numel()
        self._met[key] += 1
        if key not in self._graphs:
            if self._met[key] == 1 or len(self._graphs) == MOST_GRAPHS:
                return self.forward(self.chunk, batch)[:num_targets]
            graph = self._record(batch, wants_gradient=key[2])
            if graph is None:
                return self.forward(self.chunk, batch)[:num_targets]
            self._graphs[key] = graph
        return _Replay.apply(self._anchor, self._graphs[key], batch, num_targets)  # type: ignore[return-value]

    def _record(self, batch: MicroBatch, *, wants_gradient: bool) -> "_Graph | None":
        """None, from then on always, where the model does something that no graph can hold or memory is short."""
        torch.cuda.empty_cache()
        before, stream = torch.cuda.memory_reserved(), torch.cuda.current_stream()
        try:
            graph = _Graph(self, batch, wants_gradient=wants_gradient)
        except RuntimeError as error:
            if self.insists:
                raise
            # A recording that fails does not always go back to the stream it left.
            torch.cuda.set_stream(stream)
            reason = str(error).strip().splitlines()[0]
            logger.warning("no CUDA graphs from here on (policy.megatron_cfg.cuda_graph_impl=none): %s", reason)
            self._given_up = True
            self._graphs.clear()
            return None
        torch.cuda.empty_cache()
        held = torch.cuda.memory_reserved() - before
        hold_graph_pool(held)
        weakref.finalize(graph, hold_graph_pool, -held)
        return graph


class _Graph:
    """Of one shape. batch: its inputs, which every replay reads. logps: where it puts its output. gradient: where the
    backward pass finds the gradient of that."""

    def __init__(self, passes: GraphedPasses, batch: MicroBatch, *, wants_gradient: bool):
        self.batch = batch
        self.forward, self.backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        # Aliases without a history: what accumulates gradients for the parameters themselves belongs to another stream.
        aliases = {name: p.detach().requires_grad_(wants_gradient) for name, p in passes.factors.items()}

        def model(**inputs: Any) -> Tensor:
            return torch.func.functional_call(passes.chunk, aliases, (), inputs)

        with passes.rotary.keeping() as self.kept, self._recording(self.forward, passes):
            logps = passes.forward(model, batch)
        self.logps = logps.detach()
        if not wants_gradient:
            return
        self.gradient = torch.zeros_like(self.logps)
        with self._recording(self.backward, passes):
            gradients = torch.autograd.grad(logps, list(aliases.values()), self.gradient)
            for parameter, gradient in zip(passes.factors.values(), gradients, strict=True):
                parameter.main_grad.add_(gradient)  # type: ignore[attr-defined]

    @staticmethod
    def _recording(graph: torch.cuda.CUDAGraph, passes: GraphedPasses) -> Any:
        # Other threads (NCCL's watchdog) may ask the device meanwhile.
        return torch.cuda.graph(graph, pool=passes._pool, capture_error_mode="thread_local")

    def fill(self, batch: MicroBatch) -> None:
        """Give the next replay this micro-batch, which has the graph's shape."""
        for name in ("tokens", "positions", "targets", "cu_seqlens", "sources"):
            _copy(getattr(self.batch, name), getattr(batch, name))
        mine, given = self.batch.shared_keys, batch.shared_keys
        if mine is not None:
            for name in ("index", "cu_queries", "cu_keys"):
                _copy(getattr(mine, name), getattr(given, name))


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, graph: _Graph, batch: MicroBatch, num_targets: int) -> Tensor:  # type: ignore[override]
        ctx.graph, ctx.num_targets = graph, num_targets
        graph.fill(batch)
        graph.forward.replay()
        return graph.logps[:num_targets].clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, ...]:  # type: ignore[override]
        graph: _Graph = ctx.graph
        graph.gradient[: ctx.num_targets].copy_(gradient)
        graph.gradient[ctx.num_targets :].zero_()
        graph.backward.replay()
        return None, None, None, None


def leave_random_states(chunk: GPTModel) -> None:
    """Attention without dropout draws nothing; Transformer Engine's would switch generators all the same, which costs
    the host time and which graphs do not allow."""
    for module in chunk.modules():
        if hasattr(module, "attention_dropout_ctx"):
            module.attention_dropout_ctx = nullcontext  # type: ignore[assignment]


def _copy(mine: Tensor | None, given: Tensor | None) -> None:
    if mine is not None and given is not None and mine is not given:
        mine.copy_(given, non_blocking=True)
