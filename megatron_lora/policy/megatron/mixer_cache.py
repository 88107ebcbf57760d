"""What a recurrent mixer's rows carry while the training model answers, in the place of keys and values."""

from typing import Any

import torch
from torch import Tensor

from megatron_lora.policy.lanes import LaneStep
from megatron_lora.policy.megatron.recurrent_mixer import Carried, RecurrentMixer
from megatron_lora.policy.row_grid import RowGrid, packed_grid


class CachedMixer:
    """Of one layer. lanes: lane number -> (tails, states) of its slots, see `Carried`."""

    def __init__(self, session: Any):
        self.session = session
        self.lanes: dict[int, tuple[Tensor, Tensor]] = {}

    def advance(self, mixer: RecurrentMixer, mixed: Tensor) -> Tensor:
        """mixed [T, groups, rows of a group] of the session's step -> [T, ...] for the mixer's out_proj."""
        step: LaneStep = self.session.step
        if not step.lengths:
            return mixed.new_zeros(len(mixed), mixer.inner)
        total = step.ends[-1]
        tails, states = self._lane(step.lane, mixer, mixed)
        before = Carried(tails[step.span], states[step.span]) if step.decoding else None
        grid = _one_token_each(len(step.lengths), mixed) if step.decoding else _prompts(step)
        out, after = mixer.mix(mixed[:total], grid, before, keeps=True)
        assert after is not None
        tails[step.span], states[step.span] = after.tail, after.state
        padding = out.new_zeros(len(mixed) - total, *out.shape[1:])
        return torch.cat([out, padding]).reshape(len(mixed), -1)

    def copy(self, lane: int, read: Tensor, written: Tensor, length: int) -> None:
        """Put what the slots `read` carry into the slots `written`, whatever their number of tokens."""
        for tensor in self.lanes[lane]:
            tensor.index_copy_(0, written, tensor.index_select(0, read))

    def _lane(self, lane: int, mixer: RecurrentMixer, like: Tensor) -> tuple[Tensor, Tensor]:
        if lane not in self.lanes:
            slots = self.session.num_slots
            self.lanes[lane] = (
                like.new_zeros(slots, mixer.kernel - 1, mixer.channels),
                like.new_zeros(slots, *mixer.state_shape(), dtype=torch.float32),
            )
        return self.lanes[lane]


def _one_token_each(rows: int, like: Tensor) -> RowGrid:
    numbers = torch.arange(rows, device=like.device)
    return RowGrid(numbers[:, None], numbers, torch.ones_like(numbers))


def _prompts(step: LaneStep) -> RowGrid:
    bounds = torch.tensor([0, *step.ends], device=step.tokens.device)
    return packed_grid(bounds, step.ends[-1])
