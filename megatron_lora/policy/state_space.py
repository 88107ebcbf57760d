"""The recurrence of a state space model, a chunk of tokens at a time (Dao and Gu 2024, arXiv 2405.21060, section 6)."""

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 64


def mamba2(
    convolved: Tensor, steps: Tensor, a_log: Tensor, d: Tensor, *, groups: int, state: int, start: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """What Mamba-2's heads give: the recurrence of the discretized system and the residual D x.

    convolved [rows, tokens, x of all heads then B and C of all groups] fp32; steps [rows, tokens, heads] fp32; a_log, d
    [heads]; state: features of a group's state; start: as `scan`'s -> ([rows, tokens, groups, heads, features], the
    last state).
    """
    states = groups * state
    x, b, c = convolved.split([convolved.shape[-1] - 2 * states, states, states], -1)
    heads = steps.shape[-1] // groups
    x = x.unflatten(-1, (groups, heads, -1))
    b, c = (part.unflatten(-1, (groups, state)) for part in (b, c))
    steps = steps.unflatten(-1, (groups, heads))
    decay = -a_log.float().exp().view(groups, heads)
    out, last = scan(x * steps[..., None], steps * decay, b, c, start)
    return out + d.float().view(groups, heads, 1) * x, last


def scan(
    x: Tensor, log_decay: Tensor, b: Tensor, c: Tensor, start: Tensor | None = None, chunk: int = CHUNK
) -> tuple[Tensor, Tensor]:
    """(y, the last state): y_t = S_t c_t of the states S_t = exp(log_decay_t) S_{t-1} + x_t b_t^T.

    x [rows, tokens, groups, heads, features], log_decay [rows, tokens, groups, heads], b and c [rows, tokens, groups,
    state]; start: the state before the first token, None for an empty one -> y like x, the state [rows, groups, heads,
    features, state]. Within a chunk by products of matrices, from chunk to chunk by its state.
    """
    tokens = x.shape[1]
    chunk = min(chunk, tokens)
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
    state, before = torch.zeros_like(added[:, 0]) if start is None else start, []
    for number in range(added.shape[1]):
        before.append(state)
        state = state * whole[:, number] + added[:, number]
    carried = torch.einsum("rkign,rkghpn->rkighp", c, torch.stack(before, 1))
    y = y + carried * torch.exp(since_start)[..., None]
    return y.flatten(1, 2)[:, :tokens], state


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
