"""Answers in the making: rows take slots of a lane, advance a token at a time, and make room for the next."""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from numpy.random import Generator as RandomStream
from torch import Tensor

from megatron_lora.rollout.generator import RolloutError, SamplingOptions
from megatron_lora.rollout.native_cache import LaneStep, whole_reads
from megatron_lora.rollout.native_forward import LaneRunner
from megatron_lora.rollout.sampling import StopRule, draw, processed_logprobs

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


def complete(
    runner: LaneRunner,
    answers: Sequence[Answer],
    options: SamplingOptions,
    rule: StopRule,
    on_done: Callable[[int], None],
) -> None:
    """Fill in every answer. All ranks of a model copy call this with the same answers and get the same ones.

    on_done: told how many more are done.
    """
    waiting = deque(answers)
    # A lane's slots are filled from the first on, without gaps: a row's slot is its place in the list.
    lanes: list[list[Answer]] = [[] for _ in range(runner.num_lanes)]
    while waiting or any(lanes):
        new = _admit(lanes, waiting, runner.session.num_slots)
        if any(new):
            first_slots = [len(lane) for lane in lanes]
            rows = new
            tokens = [[answer.prompt for answer in lane] for lane in new]
            for lane, more in zip(lanes, new, strict=True):
                lane.extend(more)
        else:
            first_slots = [0] * len(lanes)
            rows = [list(lane) for lane in lanes]
            tokens = [[answer.ids[-1:] for answer in lane] for lane in lanes]
        steps = _lane_steps(runner, rows, tokens, first_slots)
        _sample(runner, steps, rows, options, rule)
        on_done(_release(runner, lanes))


def prompt_step(runner: LaneRunner, ids: list[int]) -> LaneStep:
    """A whole prompt in the first slot of each lane."""
    return _flat_step(runner, 0, [ids], [0], 0, runner.padded(len(ids)), decoding=False)


def _admit(lanes: list[list[Answer]], waiting: deque[Answer], num_slots: int) -> list[list[Answer]]:
    """Take waiting answers into free slots, the emptiest lane first."""
    new: list[list[Answer]] = [[] for _ in lanes]
    tokens = [0] * len(lanes)
    while waiting:
        sizes = [len(lane) + len(more) for lane, more in zip(lanes, new, strict=True)]
        chosen = sizes.index(min(sizes))
        size = len(waiting[0].prompt)
        if sizes[chosen] == num_slots or (new[chosen] and tokens[chosen] + size > PREFILL_TOKENS):
            break
        new[chosen].append(waiting.popleft())
        tokens[chosen] += size
    return new


def _lane_steps(
    runner: LaneRunner, rows: list[list[Answer]], tokens: list[list[list[int]]], first_slots: list[int]
) -> list[LaneStep]:
    total = runner.padded(max(sum(len(part) for part in lane) for lane in tokens))
    return [
        _flat_step(
            runner,
            lane,
            tokens[lane],
            [_position(answer) for answer in rows[lane]],
            first_slots[lane],
            total,
            decoding=any(answer.ids for answer in rows[lane]),
        )
        for lane in range(len(rows))
    ]


def _position(answer: Answer) -> int:
    """Where a row's next new token stands: behind the prompt and all but the newest sampled token."""
    return len(answer.prompt) + len(answer.ids) - 1 if answer.ids else 0


def _flat_step(
    runner: LaneRunner,
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
    device = runner.engine.world.device
    return LaneStep(
        lane=lane,
        tokens=torch.tensor(flat + padding, dtype=torch.int64, device=device),
        positions=torch.tensor(positions + padding, dtype=torch.int64, device=device),
        first_slot=first_slot,
        lengths=[len(part) for part in tokens],
        longest=whole_reads(max(positions, default=-1) + 1),
        decoding=decoding,
    )


def _sample(
    runner: LaneRunner, steps: list[LaneStep], rows: list[list[Answer]], options: SamplingOptions, rule: StopRule
) -> None:
    """One more token for each row: drawn on the last stage, told to all."""
    logits = runner.next_token_logits(steps)
    flat = [answer for lane in rows for answer in lane]
    uniforms = torch.tensor([answer.stream.random() for answer in flat], dtype=torch.float64)
    drawn = _draw(torch.cat(logits), uniforms, options) if logits else None
    tokens, logprobs = runner.from_last_stage(drawn, (2, len(flat)), torch.float64).tolist()
    for answer, token, logprob in zip(flat, tokens, logprobs, strict=True):
        if not logprob > float("-inf"):
            raise RolloutError(
                f"the model's probabilities behind prompt {answer.prompt_index} and {len(answer.ids)} answer tokens "
                f"are not numbers (log-probability {logprob}); training has diverged: lower the learning rate and "
                "resume from an earlier checkpoint"
            )
        answer.ids.append(int(token))
        answer.logprobs.append(logprob)
        if rule.met(answer.ids):
            answer.reason = "stop"
        elif len(answer.ids) == answer.limit:
            answer.reason = "length"


def _draw(logits: Tensor, uniforms: Tensor, options: SamplingOptions) -> Tensor:
    """[2, n] fp64: tokens (exact in fp64) and their log-probabilities, so that one broadcast carries both."""
    logprobs = processed_logprobs(logits, options)
    if options.temperature == 0:
        tokens = logprobs.argmax(-1)
    else:
        tokens = draw(logprobs, uniforms.to(logits.device))
    chosen = logprobs.gather(1, tokens[:, None]).squeeze(1)
    return torch.stack([tokens.double(), chosen.double()])


def _release(runner: LaneRunner, lanes: list[list[Answer]]) -> int:
    """Free the slots of finished rows; the lane's last row moves into the gap. Returns how many were finished."""
    finished = 0
    for number, lane in enumerate(lanes):
        for slot in range(len(lane) - 1, -1, -1):
            if lane[slot].reason:
                finished += 1
                last = lane.pop()
                if slot < len(lane):
                    lane[slot] = last
                    runner.session.move(number, len(lane), slot)
    return finished
