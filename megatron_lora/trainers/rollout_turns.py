"""Answers of several turns: what the model wrote, what the environment answered, what the model wrote then.

The tokens that were drawn are never tokenized again: an environment's text is tokenized by itself and stands behind
them, and the next turn is drawn behind that. Only what the model wrote carries loss.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from megatron_lora.config.schema import Recipe
from megatron_lora.data.dataset import Prompt
from megatron_lora.errors import UserError
from megatron_lora.rollout.environments import Environments, EnvironmentSpec, Played, Result
from megatron_lora.rollout.generator import Sample, SamplingOptions
from megatron_lora.runtime.agreement import from_first_rank
from megatron_lora.runtime.world import World

logger = logging.getLogger(__name__)
# Batches on all of whose answers the environment failed, before the run ends.
PATIENCE = 3
TURN_STRIDE = 7_368_787

Draw = Callable[[Sequence[Sequence[int]], SamplingOptions], list[Sample]]


@dataclass
class _Game:
    """An answer being written. goes_on: whether something may follow it."""

    answer: Sample
    played: Played
    goes_on: bool

    @property
    def context(self) -> list[int]:
        return self.answer.prompt_ids + self.answer.completion_ids


class Turns:
    """Plays the turns after the first. Every rank has the same samples; the first one steps the environments.

    encode: a text's token ids, without special tokens of its own. max_length: of prompt and answer, in tokens. warn:
    tells the user of the environment's first failure; all are logged.
    """

    def __init__(
        self,
        recipe: Recipe,
        world: World,
        encode: Callable[[str], list[int]],
        max_length: int,
        warn: Callable[[str], None],
    ):
        self.spec = environment_spec(recipe)
        self.environments = Environments(self.spec, recipe.env.math.num_workers)
        self.world, self.encode, self.max_length = world, encode, max_length
        self.max_turns = recipe.rollouts.max_rollout_turns
        self.warn = warn
        self._has_failed = False
        self._failed_batches = 0

    def play(
        self, prompts: Sequence[Prompt], samples: Sequence[Sample], draw: Draw, options: SamplingOptions
    ) -> list[Sample]:
        """The samples with all their turns. prompts: by `Sample.prompt_index`. draw: one answer to each of some
        contexts, as a generator does. Collective.

        Raises UserError where the environment has failed on every answer of PATIENCE batches in a row.
        """
        games = [_begin(prompts[sample.prompt_index], sample) for sample in samples]
        steps: list[Result] = []
        for turn in range(1, self.max_turns):
            going = [game for game in games if game.goes_on]
            results = self._step(going)
            steps += results
            for game, result in zip(going, results, strict=True):
                self._take_result(game, result)
            going = [game for game in going if game.goes_on]
            if not going:
                break
            # Another stream for each turn; within it each context has its own.
            seed = (options.seed + turn * TURN_STRIDE) % (1 << 31)
            drawn = draw([game.context for game in going], replace(options, seed=seed))
            for game, sample in zip(going, drawn, strict=True):
                _take_turn(game, sample)
        self._watch(steps)
        return [game.answer for game in games]

    def close(self) -> None:
        self.environments.close()

    def _step(self, games: Sequence[_Game]) -> list[Result]:
        if not games:
            return []
        played, texts = [game.played for game in games], [game.answer.final_turn for game in games]
        return from_first_rank(self.world, lambda: self.environments.step(played, texts))

    def _take_result(self, game: _Game, result: Result) -> None:
        """The environment's text behind the answer, as far as there is room for it and a token of the next turn."""
        if result.text is None:
            game.goes_on = False
            game.answer = replace(game.answer, environment_error=result.error)
            return
        ids = self.encode(result.text)[: self.spec.max_result_tokens]
        room = self.max_length - len(game.context) - 1
        if len(ids) > room:
            game.goes_on = False
            game.answer = replace(game.answer, finish_reason="length")
            return
        answer = game.answer
        assert answer.sampled is not None
        game.answer = replace(
            answer,
            completion_ids=answer.completion_ids + ids,
            logprobs=torch.cat([answer.logprobs, torch.zeros(len(ids))]),
            sampled=answer.sampled + [False] * len(ids),
            text=answer.text + result.text,
            routed_experts=_with_unknown(answer.routed_experts, len(ids)),
        )

    def _watch(self, steps: Sequence[Result]) -> None:
        errors = [step.error for step in steps if step.error]
        if errors:
            what = f"the environment failed on {len(errors)} of {len(steps)} turns: {errors[0]}"
            logger.warning(what)
            if not self._has_failed:
                self.warn(f"{what}; further failures are counted as environment_errors and told in log.txt")
            self._has_failed = True
        if steps:
            self._failed_batches = self._failed_batches + 1 if len(errors) == len(steps) else 0
        if self._failed_batches >= PATIENCE:
            raise UserError(
                f"the environment {self.spec.path!r} failed on every answer of {PATIENCE} batches in a row: "
                f"{errors[0]}; mend it, or raise env.environment.timeout_seconds where that ran out"
            )


def environment_spec(recipe: Recipe) -> EnvironmentSpec:
    config = recipe.env.environment
    assert config is not None
    return EnvironmentSpec(config.path, dict(config.kwargs), config.timeout_seconds, config.max_result_tokens)


def _begin(prompt: Prompt, sample: Sample) -> _Game:
    answer = replace(sample, sampled=[True] * len(sample.completion_ids), final_turn=sample.text)
    # An answer that was cut off has no end that anything could follow.
    return _Game(answer, Played((prompt.text, prompt.answer, dict(prompt.extra))), sample.finish_reason == "stop")


def _take_turn(game: _Game, sample: Sample) -> None:
    answer = game.answer
    assert answer.sampled is not None
    game.goes_on = sample.finish_reason == "stop"
    game.answer = replace(
        answer,
        completion_ids=answer.completion_ids + sample.completion_ids,
        logprobs=torch.cat([answer.logprobs, sample.logprobs]),
        sampled=answer.sampled + [True] * len(sample.completion_ids),
        finish_reason=sample.finish_reason,
        text=answer.text + sample.text,
        final_turn=sample.text,
        num_turns=answer.num_turns + 1,
        adapter_version=min(answer.adapter_version, sample.adapter_version),
        routed_experts=_joined_experts(answer, sample),
    )


def _with_unknown(experts: torch.Tensor | None, count: int) -> torch.Tensor | None:
    """With so many tokens more, which were sent to no experts yet."""
    return experts if experts is None else torch.cat([experts, experts.new_full((count, *experts.shape[1:]), -1)])


def _joined_experts(answer: Sample, turn: Sample) -> torch.Tensor | None:
    """Of an answer with one turn more. What stood before was sent to experts when it was drawn; the last token drawn,
    and what the environment answered, when the next turn was."""
    before, whole = answer.routed_experts, turn.routed_experts
    if before is None or whole is None:
        return None
    known = (before >= 0).all((1, 2)).nonzero()
    drawn = int(known[-1]) + 1 if known.numel() else 0
    return torch.cat([before[:drawn], whole[drawn:]])
