"""Answers in the making: rows take slots of a lane, advance a token at a time, and make room for the next."""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.random import Generator as RandomStream

from megatron_lora.policy.lanes import Lanes, LaneStep, whole_reads
from megatron_lora.rollout.generator import RolloutError, SamplingOptions
from megatron_lora.rollout.native_bursts import Bursts
from megatron_lora.rollout.sampling import StopRule, draw_with_logprobs

# Prompt tokens a lane takes in at once (at least one prompt): bounds the memory of a step, not its result.
PREFILL_TOKENS = 8192


@dataclass
class Answer:
    """One answer. limit: its longest length. reason: "stop" or "length" once it is done."""

    prompt_index: int
    prompt: list[int]
    limit: int
    stream: RandomStream
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    reason: str = ""


@dataclass(frozen=True)
class _Part:
    """A lane's part of a step.

    rows: answers that get a token, in slots first_slot, first_slot + 1, ... sources: for each the row whose tokens it
    stands behind; only these go through the model, and they come first.
    """

    rows: list[Answer]
    sources: list[int]
    first_slot: int

    @property
    def read(self) -> list[Answer]:
        return self.rows[: max(self.sources, default=-1) + 1]

    @property
    def followers(self) -> range:
        """The rows behind another row's tokens."""
        return range(len(self.read), len(self.rows))


def complete(
    model: Lanes,
    answers: Sequence[Answer],
    options: SamplingOptions,
    rule: StopRule,
    on_done: Callable[[int], None],
    bursts: Bursts | None = None,
) -> None:
    """Fill in every answer. All ranks of a model copy call this with the same answers and get the same ones.

    on_done: told how many more are done. bursts: draws several tokens at once (one lane only); the same answers.
    """
    waiting = deque(answers)
    # A lane's slots are filled from the first on, without gaps: a row's slot is its place in the list.
    lanes: list[list[Answer]] = [[] for _ in range(model.num_lanes)]
    while waiting or any(lanes):
        new = _admit(lanes, waiting, model.num_slots)
        decoding = not any(new)
        if decoding and bursts is not None:
            _burst(bursts, lanes[0], rule)
            on_done(_release(model, lanes))
            continue
        if decoding:
            parts = [_Part(list(lane), list(range(len(lane))), first_slot=0) for lane in lanes]
        else:
            parts = [_by_prompt(more, first_slot=len(lane)) for more, lane in zip(new, lanes, strict=True)]
            for lane, part in zip(lanes, parts, strict=True):
                lane.extend(part.rows)
        steps = _lane_steps(model, parts, decoding)
        _sample(model, steps, parts, options, rule)
        on_done(_release(model, lanes))


def _admit(lanes: list[list[Answer]], waiting: deque[Answer], num_slots: int) -> list[list[Answer]]:
    """Take waiting answers into free slots, the emptiest lane first."""
    new: list[list[Answer]] = [[] for _ in lanes]
    tokens = [0] * len(lanes)
    while waiting:
        sizes = [len(lane) + len(more) for lane, more in zip(lanes, new, strict=True)]
        chosen = sizes.index(min(sizes))
        answer, beside = waiting[0], new[chosen]
        # Answers to one prompt wait one behind the other.
        size = 0 if beside and beside[-1].prompt_index == answer.prompt_index else len(answer.prompt)
        if sizes[chosen] == num_slots or (beside and tokens[chosen] + size > PREFILL_TOKENS):
            break
        beside.append(waiting.popleft())
        tokens[chosen] += size
    return new


def _by_prompt(answers: list[Answer], first_slot: int) -> _Part:
    """New answers, of which one a prompt has its tokens read."""
    firsts: dict[int, Answer] = {}
    followers = [answer for answer in answers if firsts.setdefault(answer.prompt_index, answer) is not answer]
    rows = [*firsts.values(), *followers]
    place = {prompt_index: number for number, prompt_index in enumerate(firsts)}
    return _Part(rows, [place[answer.prompt_index] for answer in rows], first_slot)


def _lane_steps(model: Lanes, parts: list[_Part], decoding: bool) -> list[LaneStep]:
    tokens = [[answer.ids[-1:] if decoding else answer.prompt for answer in part.read] for part in parts]
    total = model.padded(max(sum(len(row) for row in lane) for lane in tokens))
    return [
        _flat_step(
            model,
            lane,
            tokens[lane],
            [_position(answer) for answer in part.read],
            part.first_slot,
            total,
            decoding=decoding,
        )
        for lane, part in enumerate(parts)
    ]


def _position(answer: Answer) -> int:
    """Where a row's next new token stands: behind the prompt and all but the newest sampled token."""
    return len(answer.prompt) + len(answer.ids) - 1 if answer.ids else 0


def _flat_step(
    model: Lanes,
    lane: int,
    tokens: list[list[int]],
    starts: list[int],
    first_slot: int,
    total: int,
    *,
    decoding: bool,
) -> LaneStep:
    flat = [token for part in tokens for token in part]
    positions = [start + place for part, start in zip(tokens, starts, strict=True) for place in range(len(part))]
    padding = [0] * (total - len(flat))
    device = model.device
    return LaneStep(
        lane=lane,
        tokens=torch.tensor(flat + padding, dtype=torch.int64, device=device),
        positions=torch.tensor(positions + padding, dtype=torch.int64, device=device),
        first_slot=first_slot,
        lengths=[len(part) for part in tokens],
        longest=whole_reads(max(positions, default=-1) + 1),
        decoding=decoding,
    )


def _sample(model: Lanes, steps: list[LaneStep], parts: list[_Part], options: SamplingOptions, rule: StopRule) -> None:
    """One more token for each row: drawn on the last stage, told to all."""
    logits = model.next_token_logits(steps)
    for step, part in zip(steps, parts, strict=True):
        if part.followers:
            slots = range(part.first_slot, part.first_slot + len(part.rows))
            sources = [slots[part.sources[row]] for row in part.followers]
            model.copy(step.lane, sources, [slots[row] for row in part.followers], step.longest)
    if logits:  # there are none on stages before the last
        logits = [found[part.sources] if part.followers else found for found, part in zip(logits, parts, strict=True)]
    flat = [answer for part in parts for answer in part.rows]
    uniforms = torch.tensor([answer.stream.random() for answer in flat], dtype=torch.float64)
    drawn = draw_with_logprobs(torch.cat(logits), uniforms, options) if logits else None
    tokens, logprobs = model.from_last_stage(drawn, (2, len(flat)), torch.float64).tolist()
    for answer, token, logprob in zip(flat, tokens, logprobs, strict=True):
        _extend(answer, [int(token)], [logprob], rule)


def _burst(bursts: Bursts, rows: list[Answer], rule: StopRule) -> None:
    """Some more tokens for each row, up to its end: what was drawn behind it is dropped."""
    uniforms = torch.tensor(np.stack([answer.stream.random(bursts.size) for answer in rows], axis=1))
    drawn = bursts.run([answer.ids[-1] for answer in rows], [_position(answer) for answer in rows], uniforms)
    by_row = drawn.permute(1, 2, 0)
    for answer, tokens, logprobs in zip(rows, by_row[0].long().tolist(), by_row[1].tolist(), strict=True):
        _extend(answer, tokens, logprobs, rule)


def _extend(answer: Answer, tokens: list[int], logprobs: list[float], rule: StopRule) -> None:
    """Put new tokens behind the answer's, up to its end."""
    room = answer.limit - len(answer.ids)
    end = rule.first_end(answer.ids, tokens[:room])
    count = min(room, len(tokens)) if end is None else end + 1
    if not all(map(float("-inf").__lt__, logprobs[:count])):
        raise RolloutError(
            f"the model's probabilities behind prompt {answer.prompt_index} and {len(answer.ids)} answer tokens "
            f"are not numbers (log-probabilities {logprobs[:count]}); training has diverged: lower the learning rate "
            "and resume from an earlier checkpoint"
        )
    answer.ids += tokens[:count]
    answer.logprobs += logprobs[:count]
    if end is not None:
        answer.reason = "stop"
    elif count == room:
        answer.reason = "length"


def _release(model: Lanes, lanes: list[list[Answer]]) -> int:
    """Free the slots of finished rows; the lane's last rows move into the gaps. Returns how many were finished."""
    finished = 0
    for number, lane in enumerate(lanes):
        before = len(lane)
        origins = list(range(before))
        for slot in range(before - 1, -1, -1):
            if lane[slot].reason:
                last, origin = lane.pop(), origins.pop()
                if slot < len(lane):
                    lane[slot], origins[slot] = last, origin
        finished += before - len(lane)
        moved = [slot for slot, origin in enumerate(origins) if origin != slot]
        if moved:
            # At once: a copy for each finished row is what a small model's step would wait for.
            model.copy(number, [origins[slot] for slot in moved], moved, model.capacity)
    return finished
