"""From what is computed of targets, spread over data-parallel ranks, to one tensor a row on every rank."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_lora.data.packing import row_places
from megatron_lora.policy.batching import Groups, Share


def collect_rows(passes: Sequence[Sequence[Tensor]], share: Share, groups: Groups, group: Any) -> list[list[Tensor]]:
    """Each pass's values by row: [S, ...] fp32 on the CPU, in the order of `groups`' rows, [0] is 0. Collective.

    passes: [N, ...] of the targets of each of this rank's micro-batches, one list a pass over `share.batches`.
    group: the data-parallel process group. One gather and one copy from the device for all of them.
    """
    lengths = [[len(row) for row in rows] for rows in groups]
    sizes = [sum(sum(lengths[p]) for members in rank for p in members) for rank in share.plan]
    sources, destinations = _places(share)
    device = passes[0][0].device
    flat = torch.zeros(len(passes), max(sizes), *passes[0][0].shape[1:], device=device)
    values = torch.stack([torch.cat(list(pieces)) for pieces in passes])
    flat[:, destinations.to(device)] = values[:, sources.to(device)].float()
    everyone = flat.flatten()
    if len(share.plan) > 1:
        everyone = flat.new_empty(len(share.plan) * flat.numel())
        dist.all_gather_into_tensor(everyone, flat.flatten(), group=group)
    host = everyone.cpu().view(len(share.plan), *flat.shape)

    first = torch.tensor([0, *(len(rows) for rows in groups)]).cumsum(0).tolist()
    found: list[list[Tensor]] = [[torch.empty(0)] * first[-1] for _ in passes]
    for rank, micro_batches in enumerate(share.plan):
        numbers = [first[p] + n for members in micro_batches for p in members for n in range(len(groups[p]))]
        rows = [length for members in micro_batches for p in members for length in lengths[p]]
        bounds = torch.tensor([0, *rows]).cumsum(0).tolist()
        for number, (start, stop) in zip(numbers, pairwise(bounds), strict=True):
            for which, rows_found in enumerate(found):
                rows_found[number] = host[rank, which, start:stop]
    return found


def _places(share: Share) -> tuple[Tensor, Tensor]:
    """`row_places` of all of a rank's micro-batches laid end to end."""
    sources, destinations = [], []
    targets = tokens = 0
    for batch in share.batches:
        source, destination = row_places(batch)
        sources.append(source + targets)
        destinations.append(destination + tokens)
        targets += batch.targets.numel()
        tokens += sum(batch.row_lengths)
    return torch.cat(sources), torch.cat(destinations)
