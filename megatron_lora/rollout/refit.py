"""Bringing the trainer's weights to the rollout engine, and proving after each time that they arrived.

Two proofs, both before any sample is drawn. The fingerprint: checksums of what was handed over against what is read
back from the engine. The probe: a fixed prompt, longer than a block of the engine's cache, that the engine continues
and the trainer scores; a skipped refit, a stale cache, wrong names, scales or shards show there as a difference.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_lora.data.batch import Row
from megatron_lora.policy.interface import Policy
from megatron_lora.rollout.generator import Generator, Handover, RolloutError, Sample, SamplingOptions

RefitMode = Literal["adapter", "merge"]
PROBE_CONTINUATION = 8
# `auto` times the generation of this many answers an engine, of this many tokens each.
TRIAL_ANSWERS, TRIAL_TOKENS = 16, 64


@dataclass(frozen=True)
class RefitReport:
    """One refit. seconds: handing over, without the proof. bytes: handed to each rank's engine. probe_error: mean
    |trainer - engine| over the probe's tokens, nats, the worst replica's. proof_seconds: fingerprint and probe."""

    seconds: float
    bytes: int
    version: int
    probe_error: float
    mode: RefitMode
    proof_seconds: float
    fingerprint: str


@dataclass(frozen=True)
class Trial:
    """What `auto` measured of one mode. tokens_per_second: all engines together."""

    report: RefitReport
    tokens_per_second: float

    def step_seconds(self, tokens_per_step: int) -> float:
        return self.report.seconds + tokens_per_step / self.tokens_per_second

    def describe(self, tokens_per_step: int) -> str:
        return (
            f"{self.report.mode}: refit {self.report.seconds:.3f} s of {self.report.bytes / 1e6:.2f} MB, "
            f"{self.tokens_per_second:.0f} tokens/s, {self.step_seconds(tokens_per_step):.2f} s a step, "
            f"log-probability error {self.report.probe_error:.1e}"
        )


class Refitter:
    """Refits `generator` from `policy` in one mode, and proves each time that it holds the trainer's weights.

    vocab_size: the model's, for the probe's tokens. max_length: the engine's longest sequence.
    """

    def __init__(self, policy: Policy, generator: Generator, mode: RefitMode, *, vocab_size: int, max_length: int):
        self.policy, self.generator = policy, generator
        self.mode: RefitMode = mode
        self.probe = probe_prompt(vocab_size, generator.block_size, max_length)
        self.reports: list[RefitReport] = []

    def refit(self, version: int) -> RefitReport:
        """Hand the trainer's present weights over as `version`. Collective; the engine is awake.

        Raises RolloutError, naming the numbers, where the engine then does not hold them.
        """
        start = time.perf_counter()
        handover = self._hand_over(version)
        seconds = _slowest(time.perf_counter() - start)
        return self._prove(version, handover, seconds)

    def _hand_over(self, version: int) -> Handover:
        if self.mode == "adapter":
            return self.generator.load_adapter(self.policy.adapter(), version)
        return self.generator.load_weights(self.policy.hf_weights(), version)

    def _prove(self, version: int, handover: Handover, seconds: float) -> RefitReport:
        start = time.perf_counter()
        held = self.generator.held_fingerprint()
        if held != handover.fingerprint:
            raise RolloutError(
                f"refit {version} ({self.mode}) did not arrive: the trainer handed over {handover.fingerprint}, the "
                f"rollout engine holds {held}"
            )
        error = self.check(version)
        report = RefitReport(
            seconds=seconds,
            bytes=handover.num_bytes,
            version=version,
            probe_error=error,
            mode=self.mode,
            proof_seconds=_slowest(time.perf_counter() - start),
            fingerprint=held,
        )
        self.reports.append(report)
        return report

    def check(self, version: int) -> float:
        """The probe alone: mean |trainer - engine| in nats. Raises RolloutError where the engine holds other weights.

        Also for the steps between refits: a refit that was left out is found here.
        """
        if self.generator.version != version:
            raise RolloutError(
                f"the rollout engine holds version {self.generator.version} of the weights, the trainer is at {version}"
            )
        error = self._probe_error()
        tolerance = self.generator.logprob_tolerance
        if not error <= tolerance:
            raise RolloutError(
                f"after refit {version} ({self.mode}) the rollout engine's log-probabilities of the probe prompt are "
                f"{error:.3e} nats from the trainer's on average, tolerance {tolerance:.0e}: it does not hold the "
                "trainer's weights, so the run stops"
            )
        return error

    def _probe_error(self) -> float:
        """The worst replica's. The continuation reads the prompt's keys and values from the engine's cache where it
        has kept any; the prompt's own score does not."""
        options = SamplingOptions(max_new_tokens=PROBE_CONTINUATION, temperature=0.0)
        samples = self.generator.generate([self.probe] * self.generator.num_replicas, 1, options)
        trainer = self.policy.score([_as_row(sample) for sample in samples])
        prompt_scores = self.generator.score_prompt(self.probe)
        worst = 0.0
        for sample, scores in zip(samples, trainer, strict=True):
            size = len(sample.completion_ids)
            worst = max(worst, _mean_difference(scores[-size:], sample.logprobs))
        prompt_length = len(self.probe)
        prompt_error = _mean_difference(trainer[0][1:prompt_length], prompt_scores[1:prompt_length])
        return _slowest(max(worst, prompt_error))


def probe_prompt(vocab_size: int, block_size: int, max_length: int) -> list[int]:
    """A fixed prompt of a quarter more than one cache block, shorter only where max_length leaves no room."""
    length = max(1, min(block_size + max(2, block_size // 4), max_length - PROBE_CONTINUATION))
    draw = torch.Generator().manual_seed(20)
    return torch.randint(0, vocab_size, (length,), generator=draw).tolist()


def choose_refitter(
    policy: Policy,
    generator: Generator,
    requested: Literal["adapter", "merge", "auto"],
    *,
    vocab_size: int,
    max_length: int,
    tokens_per_step: int,
    merge_only: str | None = None,
    version: int = 0,
    say: Callable[[str], None] = print,
) -> Refitter:
    """The refitter of `policy.generation.refit`, after its first refit, which is `version`.

    auto: refits and generates both ways and takes the one with fewer seconds a step of tokens_per_step tokens; one
    whose probe fails is out. merge_only: why merging is the only way, where it is. say: told the choice and why, on
    every rank (give a no-op where it is not to speak).
    """
    mode: RefitMode = "merge" if requested == "merge" or merge_only else "adapter"
    refitter = Refitter(policy, generator, mode, vocab_size=vocab_size, max_length=max_length)
    if requested != "auto" or merge_only:
        say(f"refit by {mode}" + (f": {merge_only}" if merge_only else ", as asked"))
        refitter.refit(version)
        return refitter
    trials: dict[RefitMode, Trial] = {}
    failures: dict[RefitMode, str] = {}
    candidates: tuple[RefitMode, ...] = ("adapter", "merge")
    for candidate in candidates:
        refitter.mode = candidate
        try:
            trials[candidate] = _try(refitter, version)
        except RolloutError as error:
            failures[candidate] = str(error)
    if not trials:
        raise RolloutError("neither way of refitting works: " + "; ".join(failures.values()))
    refitter.mode = min(trials, key=lambda name: trials[name].step_seconds(tokens_per_step))
    say(_why(refitter.mode, trials, failures, tokens_per_step))
    if refitter.reports[-1].mode != refitter.mode:
        refitter.refit(version)
    return refitter


def _try(refitter: Refitter, version: int) -> Trial:
    # The first refit of a kind pays for memory that later ones find.
    refitter.refit(version)
    report = refitter.refit(version)
    count = TRIAL_ANSWERS * refitter.generator.num_replicas
    options = SamplingOptions(max_new_tokens=TRIAL_TOKENS, temperature=1.0, seed=0)
    prompts = [refitter.probe[: max(1, len(refitter.probe) // 2)]] * count
    warm_up = replace(options, max_new_tokens=2)
    refitter.generator.generate(prompts, 1, warm_up)
    start = time.perf_counter()
    samples = refitter.generator.generate(prompts, 1, options)
    seconds = _slowest(time.perf_counter() - start)
    return Trial(report, sum(len(sample.completion_ids) for sample in samples) / seconds)


def _why(mode: RefitMode, trials: dict[RefitMode, Trial], failures: dict[RefitMode, str], tokens_per_step: int) -> str:
    lines = [trial.describe(tokens_per_step) for trial in trials.values()]
    lines += [f"{name}: does not work here: {reason}" for name, reason in failures.items()]
    reason = "the faster step" if len(trials) > 1 else "the only one that works"
    return f"refit by {mode} ({reason} of {tokens_per_step} generated tokens); " + "; ".join(lines)


def _as_row(sample: Sample) -> Row:
    ids = torch.tensor(sample.prompt_ids + sample.completion_ids)
    return Row(input_ids=ids, target_mask=torch.arange(ids.numel()) > 0)


def _mean_difference(left: Tensor, right: Tensor) -> float:
    if left.numel() == 0:
        return 0.0
    return float((left.double() - right.double()).abs().mean())


def _slowest(value: float) -> float:
    """The largest of the ranks' values, so that all ranks decide alike. NaN stays NaN."""
    values: list[float | None] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    numbers = [float(one) for one in values if one is not None]
    return float("nan") if any(one != one for one in numbers) else max(numbers)
