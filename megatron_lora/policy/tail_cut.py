"""Top-k and top-p: which tokens of a vocabulary are left out, for whoever draws from it and for whoever trains on what
was drawn. One rule for both, because a probability after the cut is larger than before it."""

import torch
from torch import Tensor

from megatron_lora.lora.arithmetic import TensorParallel

# Rows sorted at once: a sort of a whole vocabulary takes several times its logits' memory.
SORT_ROWS = 256


def tail_cut(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """[n, vocabulary] bool: True where a token is never drawn.

    First all but the top_k most likely (0 or less, or the vocabulary's size: all stay; ties with the last stay), then
    all but the smallest set of the rest with probability top_p (Holtzman et al. 2019, section 3.1; 1: all stay).
    logits: [n, vocabulary] fp32, divided by the temperature. Step by step as vLLM's sampler, so that equal logits give
    equal sets, ties at the border included.
    """
    keeps_all = not 0 < top_k < logits.shape[-1]
    if top_p >= 1.0:
        if keeps_all:
            return torch.zeros_like(logits, dtype=torch.bool)
        return logits < logits.topk(top_k, dim=-1).values[:, -1:]
    ordered, order = logits.sort(dim=-1, descending=False)
    if not keeps_all:
        ordered = ordered.masked_fill(ordered < ordered[:, -top_k][:, None], float("-inf"))
    below = ordered.softmax(-1).cumsum(-1)
    # Filled on the device: a copy from the host cannot be part of a CUDA graph.
    out = below <= 1 - torch.full((), top_p, dtype=torch.float32, device=logits.device)
    out |= ordered == float("-inf")
    out[:, -1] = False
    return torch.zeros_like(out).scatter_(1, order, out)


def cut_around_targets(
    logits: Tensor, targets: Tensor, tp: TensorParallel | None, *, vocab_size: int, top_k: int, top_p: float
) -> Tensor:
    """[n, columns] bool: what `tail_cut` leaves out of the vocabulary, but never a row's target.

    A target was drawn, so the engine kept it; where rounding moves it out of the trainer's own set, it counts as the
    last token inside: its log-probability stays finite and has a gradient.

    logits: [n, columns] fp32, divided by the temperature: the whole vocabulary (tp None), or this rank's columns, the
    same number on each rank, padding behind the vocabulary at the end. targets: [n] global. Collective over TP.
    """
    columns = logits.shape[1]
    start = tp.rank * columns if tp is not None else 0
    cut = torch.ones_like(logits, dtype=torch.bool)
    for part, piece in zip(cut.split(SORT_ROWS), logits.split(SORT_ROWS), strict=True):
        whole = gathered_columns(piece, tp)[:, :vocab_size] if tp is not None and tp.size > 1 else piece[:, :vocab_size]
        mine = tail_cut(whole, top_k, top_p)[:, start : start + columns]
        part[:, : mine.shape[1]] = mine
    local = targets - start
    inside = (local >= 0) & (local < columns)
    rows = inside.nonzero().squeeze(1)
    cut[rows, local[rows]] = False
    return cut


def gathered_columns(piece: Tensor, tp: TensorParallel) -> Tensor:
    """[n, columns] of each rank -> [n, columns * size]."""
    parts = tp.all_gather(piece.contiguous())
    return parts.view(tp.size, *piece.shape).transpose(0, 1).reshape(piece.shape[0], -1)
