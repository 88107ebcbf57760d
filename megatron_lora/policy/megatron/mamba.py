"""Mamba-2 (Dao and Gu 2024, arXiv 2405.21060): the mixer of Nemotron-H.

Megatron-Core's own module cannot be built without the packages mamba-ssm and causal-conv1d, which are for GPUs alone.
This one is plain PyTorch: the paper's chunked form of the recurrence (section 6), in fp32.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_lora.lora.model_spec import ModelSizes
from megatron_lora.policy.megatron.recurrent_mixer import RecurrentMixer, Weight

CHUNK = 64


class MambaAttention(RecurrentMixer):
    """The mixer of one layer. in_proj's rows lie group by group: gates of the output (z), x, B, C, and a step size for
    each of the group's heads."""

    def __init__(
        self, config: Any, submodules: Any, layer_number: int, sizes: ModelSizes, pg_collection: Any, **_: Any
    ):
        value = sizes.linear_value_heads * sizes.linear_value_dim
        mixed = 2 * sizes.linear_key_heads * sizes.linear_key_dim + value
        super().__init__(
            config,
            submodules,
            layer_number,
            sizes,
            pg_collection.tp,
            rows=mixed + value + sizes.linear_value_heads,
            inner=value,
            channels=mixed,
            conv_bias=True,
        )
        self.state, self.features = sizes.linear_key_dim, sizes.linear_value_dim
        self.D = self.of_heads()
        self.out_norm = Weight(self.groups * self.heads * self.features, **self.of)

    def mix(self, mixed: Tensor, places: Tensor, back: Tensor) -> Tensor:
        values = self.heads * self.features
        gate, x, b, c, step = mixed.split([values, values, self.state, self.state, self.heads], -1)
        xbc = self.convolved(torch.cat([part.flatten(1) for part in (x, b, c)], -1)[places]).float()
        states = self.groups * self.state
        x, b, c = xbc.split([xbc.shape[-1] - 2 * states, states, states], -1)
        x = x.unflatten(-1, (self.groups, self.heads, self.features))
        b, c = (part.unflatten(-1, (self.groups, self.state)) for part in (b, c))
        steps = F.softplus(step.flatten(1).float() + self.dt_bias)[places].unflatten(-1, (self.groups, self.heads))
        decay = -self.A_log.exp().view(self.groups, self.heads)
        out = scan(x * steps[..., None], steps * decay, b, c) + self.D.view(self.groups, self.heads, 1) * x
        return self._normed(out.flatten(0, 1)[back].flatten(2), gate).to(mixed.dtype)

    def _normed(self, x: Tensor, gate: Tensor) -> Tensor:
        """RMSNorm of each group's features after the gate's SiLU. x fp32, gate [tokens, groups, features]."""
        gated = x * F.silu(gate.float())
        normed = F.rms_norm(gated, gated.shape[-1:], eps=self.config.layernorm_epsilon).to(gate.dtype)
        return self.out_norm.weight.view(self.groups, -1) * normed


def scan(x: Tensor, log_decay: Tensor, b: Tensor, c: Tensor, chunk: int = CHUNK) -> Tensor:
    """y_t = S_t c_t of the states S_t = exp(log_decay_t) S_{t-1} + x_t b_t^T, which begin empty.

    x [rows, tokens, groups, heads, features], log_decay [rows, tokens, groups, heads], b and c [rows, tokens, groups,
    state] -> like x. Within a chunk by products of matrices, from chunk to chunk by its state.
    """
    tokens = x.shape[1]
    x, log_decay, b, c = (_in_chunks(part, chunk) for part in (x, log_decay, b, c))
    # [rows, chunks, groups, heads, to, from]: the decay on the way from one token of the chunk to a later one.
    within = torch.exp(_sums_between(log_decay.movedim(2, -1)))
    scores = torch.einsum("rkign,rkjgn->rkgij", c, b)
    y = torch.einsum("rkghij,rkjghp->rkighp", scores[:, :, :, None] * within, x)
    # Every chunk's own addition to the state at its end, and the states at the chunks' beginnings.
    since_start = log_decay.cumsum(2)
    to_end = torch.exp(since_start[:, :, -1:] - since_start)
    added = torch.einsum("rkjgn,rkjghp->rkghpn", b, x * to_end[..., None])
    whole = torch.exp(since_start[:, :, -1])[..., None, None]
    state, before = torch.zeros_like(added[:, 0]), []
    for number in range(added.shape[1]):
        before.append(state)
        state = state * whole[:, number] + added[:, number]
    carried = torch.einsum("rkign,rkghpn->rkighp", c, torch.stack(before, 1))
    y = y + carried * torch.exp(since_start)[..., None]
    return y.flatten(1, 2)[:, :tokens]


def _in_chunks(x: Tensor, chunk: int) -> Tensor:
    """[rows, tokens, ...] -> [rows, chunks, chunk, ...]; what fills the last one up adds nothing and does not decay."""
    missing = -x.shape[1] % chunk
    return F.pad(x, (0, 0) * (x.dim() - 2) + (0, missing)).unflatten(1, (-1, chunk))


def _sums_between(x: Tensor) -> Tensor:
    """[..., n] -> [..., i, j]: x[j + 1] + ... + x[i], and -inf where j is after i. Sums of what is between alone:
    differences of sums from the beginning would lose digits."""
    size = x.shape[-1]
    rows = x[..., None].expand(*x.shape, size)
    ones = torch.ones(size, size, dtype=torch.bool, device=x.device)
    return rows.masked_fill(~ones.tril(-1), 0.0).cumsum(-2).masked_fill(~ones.tril(), -torch.inf)
