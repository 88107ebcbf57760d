"""Several tokens an answer without asking the host in between; on a GPU each token is one replay of a CUDA graph.

A small model's forward pass is a thousand kernel launches, which take the host many times longer than the GPU. Shapes
are fixed while a graph lives, so rows and cache are read in few sizes; rows beyond the answers compute what nobody
reads. An answer that ends inside a burst goes on to the burst's end: the host cuts it there (`native_answers`).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_lora.policy.lanes import Lanes, LaneStep, whole_reads
from megatron_lora.rollout.generator import SamplingOptions
from megatron_lora.rollout.sampling import draw_with_logprobs

# With graphs: rows are those of the session divided by a power of this, cached tokens a multiple of that.
ROWS_FACTOR = 4
LENGTH_MULTIPLE = 256


class Bursts:
    """Bursts of `size` tokens for the rows of the model's first lane, one model copy on one rank.

    graphs: replay CUDA graphs. They hold the addresses of caches and weights, so they live no longer than the session.
    """

    def __init__(self, model: Lanes, options: SamplingOptions, size: int, *, graphs: bool):
        self.model, self.options, self.size = model, options, size
        self._pool = torch.cuda.graph_pool_handle() if graphs else None
        self._loops: dict[tuple[int, int], _Loop] = {}

    def run(self, tokens: Sequence[int], positions: Sequence[int], uniforms: Tensor) -> Tensor:
        """The next tokens and their log-probabilities [size, 2, rows], fp64 on the host.

        tokens: each row's newest one. positions: where they stand. uniforms [size, rows]: what draws are made from.
        """
        loop = self._loop(len(tokens), max(positions) + self.size)
        return loop.run(tokens, positions, uniforms)[:, :, : len(tokens)].cpu()

    def _loop(self, rows: int, length: int) -> "_Loop":
        key = (rows, whole_reads(length))
        if self._pool is not None:
            size = self.model.num_slots
            while size > ROWS_FACTOR and -(-size // ROWS_FACTOR) >= rows:
                size = -(-size // ROWS_FACTOR)
            key = (size, -(-length // LENGTH_MULTIPLE) * LENGTH_MULTIPLE)
        key = (key[0], min(key[1], self.model.capacity))
        if key not in self._loops:
            self._loops[key] = _Loop(self, *key)
        return self._loops[key]


class _Loop:
    """A step of fixed shape that feeds its own result back: rows [n], cache read up to `length` tokens."""

    def __init__(self, bursts: Bursts, rows: int, length: int):
        self.model, self.options, self.pool = bursts.model, bursts.options, bursts._pool
        self.length = length
        device = bursts.model.device
        self.tokens = torch.zeros(rows, dtype=torch.int64, device=device)
        self.positions = torch.zeros(rows, dtype=torch.int64, device=device)
        self.uniforms = torch.zeros(bursts.size, rows, dtype=torch.float64, device=device)
        self.drawn = torch.zeros(bursts.size, 2, rows, dtype=torch.float64, device=device)
        self.number = torch.zeros(1, dtype=torch.int64, device=device)
        self._graph: torch.cuda.CUDAGraph | None = None

    def run(self, tokens: Sequence[int], positions: Sequence[int], uniforms: Tensor) -> Tensor:
        rows = len(tokens)
        self.tokens[:rows] = torch.tensor(tokens).to(self.tokens.device)
        self.positions[:rows] = torch.tensor(positions).to(self.positions.device)
        # Rows beyond these read one token of whatever their slot holds.
        self.positions[rows:] = 0
        self.uniforms[:, :rows] = uniforms.to(self.uniforms.device)
        self.number.zero_()
        for _ in range(self.uniforms.shape[0]):
            self._step()
        return self.drawn

    def _step(self) -> None:
        if self._graph is not None:
            self._graph.replay()
            return
        self._advance()
        if self.pool is not None:
            # After the first step, which took workspaces and plans; another thread's allocations do no harm.
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
                self._advance()
            self._graph = graph

    def _advance(self) -> None:
        step = LaneStep(
            lane=0,
            tokens=self.tokens,
            positions=self.positions,
            first_slot=0,
            lengths=[1] * len(self.tokens),
            longest=self.length,
            decoding=True,
        )
        uniforms = self.uniforms.index_select(0, self.number).squeeze(0)
        drawn = draw_with_logprobs(self.model.decoded_logits(step), uniforms, self.options)
        self.drawn.index_copy_(0, self.number, drawn.unsqueeze(0))
        self.number += 1
        self.tokens.copy_(drawn[0])
        # Only rows that have all their tokens come to the cache's end.
        self.positions.add_(1).clamp_(max=self.length - 1)
