"""Context parallelism of layers that carry a state along a row: for such a layer each rank gives away most heads of its
tokens, and gets the tokens of all for some heads (as DeepSpeed-Ulysses, Jacobs et al. 2023, does for attention)."""

from typing import Any

import torch
from megatron.core.tensor_parallel.mappings import all_to_all
from torch import Tensor

from megatron_lora.runtime.context_parallel import local_token_indices


class HeadExchange:
    """Of one packed micro-batch. group: the context-parallel ranks, or None. cu_seqlens: of the whole micro-batch, as
    for `local_token_indices`."""

    def __init__(self, group: Any, cu_seqlens: Tensor):
        self.group = group
        self.size = group.size() if group is not None else 1
        if self.size > 1:
            # Of the tokens as ranks have them, one rank's after the other's: each one's place in the rows.
            places = [local_token_indices(cu_seqlens, self.size, rank) for rank in range(self.size)]
            self.places = torch.cat(places)
            self.order = torch.argsort(self.places)

    def groups(self, number: int) -> slice:
        """Which of a layer's groups of heads this rank computes."""
        if self.size == 1:
            return slice(None)
        own, rank = number // self.size, self.group.rank()
        return slice(rank * own, (rank + 1) * own)

    def to_heads(self, x: Tensor) -> Tensor:
        """[this rank's tokens, groups, features] -> [all tokens in their order, this rank's groups, features]."""
        if self.size == 1:
            return x
        given = x.unflatten(1, (self.size, -1)).transpose(0, 1)
        return all_to_all(self.group, given.contiguous()).flatten(0, 1)[self.order]

    def to_tokens(self, x: Tensor) -> Tensor:
        """The inverse of `to_heads`."""
        if self.size == 1:
            return x
        given = x[self.places].unflatten(0, (self.size, -1))
        return all_to_all(self.group, given.contiguous()).transpose(0, 1).flatten(1, 2)
