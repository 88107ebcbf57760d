"""The training model as one that answers: what a backend gives a generator that lives in it.

Answers take slots of lanes (the rows of a lane pass the pipeline together) and advance a token at a time, behind what
caches keep of them.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from megatron_lora.data.batch import SharedKeys
from megatron_lora.lora.layout import ModelSpec
from megatron_lora.policy.backend import BackendPolicy

# Tokens of the cache are read in multiples of this (what lies behind a row's newest token is masked): attention kernels
# want aligned masks, and see few different shapes.
READ_TOKENS = 64


def whole_reads(num_tokens: int) -> int:
    return -(-num_tokens // READ_TOKENS) * READ_TOKENS


@dataclass(frozen=True)
class LaneStep:
    """New tokens of one lane (the rows that pass the pipeline together).

    tokens, positions: [T] int64, padded at the end. lengths: new tokens of each row; the rows are the lane's slots
    first_slot, first_slot + 1, ... longest: tokens of the longest row, cached and new, rounded up to what the cache is
    read in. decoding: one token a row, behind what is cached; else whole prompts.
    """

    lane: int
    tokens: Tensor
    positions: Tensor
    first_slot: int
    lengths: list[int]
    longest: int
    decoding: bool

    @property
    def ends(self) -> list[int]:
        """Where each row's tokens end in the flat sequence."""
        return list(accumulate(self.lengths))

    @property
    def span(self) -> slice:
        """The rows' slots."""
        return slice(self.first_slot, self.first_slot + len(self.lengths))

    @cached_property
    def slots(self) -> Tensor:
        """The rows' slots: [rows] int64. Computed once for all layers, as `distance`."""
        return torch.arange(self.span.start, self.span.stop, device=self.tokens.device)

    @cached_property
    def slot_of_token(self) -> Tensor:
        """Each token's slot, padding left out: [sum of lengths] int64."""
        lengths = torch.tensor(self.lengths, device=self.tokens.device)
        return torch.repeat_interleave(self.slots, lengths, output_size=self.ends[-1])

    @cached_property
    def prompts(self) -> SharedKeys:
        """For attention within whole prompts: each token's keys are those of its row."""
        bounds, device = [0, *self.ends], self.tokens.device
        cumulative = torch.tensor(bounds, dtype=torch.int32, device=device)
        longest = max(self.lengths)
        return SharedKeys(
            index=torch.arange(self.ends[-1], device=device),
            query_bounds=bounds,
            key_bounds=bounds,
            cu_queries=cumulative,
            cu_keys=cumulative,
            max_queries=longest,
            max_keys=longest,
        )

    @cached_property
    def distance(self) -> Tensor:
        """Decoding: how far back each cached position lies from the row's new token: [rows, longest] int64."""
        new = self.positions[: len(self.lengths), None]
        return new - torch.arange(self.longest, device=self.tokens.device)


class Lanes(ABC):
    """The model with caches around its attention, while `LanePolicy.lanes` is open.

    num_lanes: one a pipeline stage, so that stages work on different rows at the same time. num_slots: rows a lane.
    capacity: tokens a row.
    """

    num_lanes: int
    num_slots: int
    capacity: int
    device: torch.device

    @abstractmethod
    def next_token_logits(self, steps: Sequence[LaneStep]) -> list[Tensor]:
        """Logits [rows, vocabulary] fp32 behind each row's newest token, lane by lane; [] but on the last stage."""

    @abstractmethod
    def decoded_logits(self, step: LaneStep) -> Tensor:
        """Logits [rows, vocabulary] fp32 of a step of one token a row, where this rank holds the whole model: no
        schedule around the forward pass, nothing that waits for the host, so that a CUDA graph can hold it."""

    @abstractmethod
    def from_last_stage(self, value: Tensor | None, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """What the last stage's first tensor-parallel rank holds, on every rank of this model copy."""

    @abstractmethod
    def padded(self, num_tokens: int) -> int:
        """The length a step of so many tokens is padded to."""

    @abstractmethod
    def copy(self, lane: int, sources: list[int], targets: list[int], length: int) -> None:
        """Put the first `length` keys and values of the source slots into the target slots."""


class LanePolicy(BackendPolicy):
    """A backend whose model answers.

    shapes: of the model. num_lanes: see `Lanes`. replica_group: ranks that can answer other prompts. model_group: ranks
    that answer together.
    """

    shapes: ModelSpec
    num_lanes: int
    replica_group: Any
    model_group: Any

    @abstractmethod
    def lanes(self, num_slots: int, capacity: int) -> AbstractContextManager[Lanes]:
        """Within it the model reads and keeps caches of `num_slots` rows a lane of up to `capacity` tokens; without
        gradients or dropout. The model is as before, and the caches gone, afterwards."""

    @abstractmethod
    def row_bytes(self, capacity: int) -> int:
        """What one row of up to `capacity` tokens keeps on this rank."""
