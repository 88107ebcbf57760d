"""Bringing the trainer's weights to the rollout engine, and proving after each time that they arrived.

Two proofs, both before any sample is drawn. The fingerprint: checksums of the trainer's own factors, of what was handed
over and of what is read back from the engine, which must be the same bit for bit; it does not depend on how much the
weights changed. The probe: the engine continues prompts of the run's data, longer than a block of its cache, and the
trainer scores what it drew; that the engine computes with what it holds, as the trainer does, shows there, up to
rounding (`agreement.py`). Merged weights are the trainer's own products, rounded on the way: of them a few columns of
every linear are held against the factors (`merged_columns.py`).
"""

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.distributed as dist

from megatron_lora.data.batch import Row
from megatron_lora.policy.interface import Policy
from megatron_lora.rollout.adapter_factors import trainer_fingerprint
from megatron_lora.rollout.agreement import Agreement, logit_distance
from megatron_lora.rollout.generator import Generator, Handover, RolloutError, Sample, SamplingOptions
from megatron_lora.rollout.merged_columns import MergedColumns, adds_to_the_base
from megatron_lora.runtime.spans import span

RefitMode = Literal["adapter", "merge"]
# The probe: so many prompts a replica, continued by so many tokens each, from contexts of at most so many tokens.
PROBE_PROMPTS, PROBE_CONTINUATION, PROBE_LONGEST = 16, 16, 128
PROBE = SamplingOptions(max_new_tokens=PROBE_CONTINUATION, temperature=1.0, seed=20)
# `auto` times the generation of this many answers an engine, of this many tokens each.
TRIAL_ANSWERS, TRIAL_TOKENS = 16, 64


@dataclass(frozen=True)
class RefitReport:
    """One refit. seconds: handing over, without the proof. bytes: handed to each rank's engine. probe_error: how far
    trainer and engine are apart on the probe, nats, the worst replica's (`agreement.logit_distance`). tolerance: how
    far they could have been. proof_seconds: fingerprint and probe."""

    seconds: float
    bytes: int
    version: int
    probe_error: float
    tolerance: float
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

    prompts: token ids of some of the run's prompts, for the probe. max_length: the engine's longest sequence.
    """

    def __init__(
        self, policy: Policy, generator: Generator, mode: RefitMode, *, prompts: Sequence[list[int]], max_length: int
    ):
        self.policy, self.generator = policy, generator
        self.mode: RefitMode = mode
        self.probe = probe_contexts(prompts, generator.block_size, max_length)
        self.agreement = Agreement(generator.dtype)
        if policy.base_is_rounded:
            generator.base_weights = lambda: policy.hf_weights(merged=False)
        self._merged: MergedColumns | None = None
        self.reports: list[RefitReport] = []

    def measure_base(self, *, has_adapter: bool) -> float:
        """The distance between the two while both are the base alone, which no refit can have spoiled: what rounding
        does in this run. Collective; before the first refit. has_adapter: False: the trainer's weights are the base's.

        A base that the trainer holds in 4 bits is handed over first, made dense. Raises RolloutError where it does not
        arrive, or the two are further apart than rounding can bring them.
        """
        if self.generator.base_weights is not None:
            handover = self.generator.load_weights(self.generator.base_weights(), self.generator.version)
            held = self.generator.held_fingerprint()
            if held != handover.fingerprint:
                raise RolloutError(
                    f"the base, which the trainer holds in 4 bits, did not arrive: it handed over "
                    f"{handover.fingerprint}, the rollout engine holds {held}"
                )
        with self.policy.adapters_disabled() if has_adapter else nullcontext():
            distance = self._distance()
        if not self.agreement.accepts(distance):
            raise RolloutError(
                f"before any refit the rollout engine's logits of the base model are {distance:.3e} nats from the "
                f"trainer's, {self.agreement.describe()}: the two do not compute the same model, so the run stops"
            )
        return distance

    def refit(self, version: int) -> RefitReport:
        """Hand the trainer's present weights over as `version`. Collective; the engine is awake.

        Raises RolloutError, naming the numbers, where the engine then does not hold them.
        """
        start = time.perf_counter()
        with span("refit"):
            handover = self._hand_over(version)
        seconds = _slowest(time.perf_counter() - start)
        with span("proof"):
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
        self._check_factors(version, held)
        tolerance = self.agreement.tolerance
        error = self._check_probe(version)
        report = RefitReport(
            seconds=seconds,
            bytes=handover.num_bytes,
            version=version,
            probe_error=error,
            tolerance=tolerance,
            mode=self.mode,
            proof_seconds=_slowest(time.perf_counter() - start),
            fingerprint=held,
        )
        self.reports.append(report)
        return report

    def check(self, version: int) -> float:
        """Whether the engine holds the trainer's present weights and computes with them; the probe's distance in nats.
        Raises RolloutError where it does not.

        Also for the steps between refits: a refit that was left out is found here.
        """
        if self.generator.version != version:
            raise RolloutError(
                f"the rollout engine holds version {self.generator.version} of the weights, the trainer is at {version}"
            )
        self._check_factors(version, self.generator.held_fingerprint())
        return self._check_probe(version)

    def _check_factors(self, version: int, held: str) -> None:
        """Bit for bit, or up to rounding of merged weights: an update too small for the probe counts as any other."""
        if self.mode == "merge":
            return self._check_merged(version, held)
        trains = trainer_fingerprint(self.policy, self.generator.dtype)
        if held != trains:
            raise RolloutError(
                f"after refit {version} (adapter) the rollout engine holds {held}, but the trainer computes with "
                f"{trains}: what was handed over are not the trainer's present factors, so the run stops"
            )

    def _check_merged(self, version: int, held: str) -> None:
        handover = self.generator.handover
        if not handover.columns or not adds_to_the_base(self.policy.spec):
            return
        if held != handover.fingerprint:
            raise RolloutError(
                f"after refit {version} (merge) the rollout engine holds {held}, but was handed {handover.fingerprint}"
            )
        self._merged = self._merged or MergedColumns(self.policy, handover.columns)
        if faults := self._merged.faults(handover.columns):
            raise RolloutError(
                f"after refit {version} (merge) what was handed over is not the trainer's base with its present "
                f"adapter, in {len(faults)} of {len(handover.columns)} linears: {', '.join(faults[:3])}"
                f"{', ...' if len(faults) > 3 else ''}; so the run stops"
            )

    def _check_probe(self, version: int) -> float:
        distance, tolerance = self._distance(), self.agreement.describe()
        if not self.agreement.accepts(distance):
            raise RolloutError(
                f"after refit {version} ({self.mode}) the rollout engine's logits are {distance:.3e} nats from the "
                f"trainer's on answers that it drew, {tolerance}: it does not compute with the trainer's weights, so "
                "the run stops"
            )
        return distance

    def _distance(self) -> float:
        """The worst replica's. Each continues the same contexts, and reads their keys and values from its cache where
        it has kept any."""
        replicas = self.generator.num_replicas
        samples = self.generator.generate([ids for ids in self.probe for _ in range(replicas)], 1, PROBE)
        scores = self.policy.score([_as_row(sample) for sample in samples])
        engine: list[list[torch.Tensor]] = [[] for _ in range(replicas)]
        trainer: list[list[torch.Tensor]] = [[] for _ in range(replicas)]
        for sample, score in zip(samples, scores, strict=True):
            replica = sample.prompt_index % replicas
            engine[replica].append(sample.logprobs)
            trainer[replica].append(score[-len(sample.completion_ids) :])
        pairs = zip(engine, trainer, strict=True)
        return _slowest(max(logit_distance(torch.cat(left), torch.cat(right)) for left, right in pairs))


def probe_contexts(prompts: Sequence[list[int]], block_size: int, max_length: int) -> list[list[int]]:
    """PROBE_PROMPTS contexts out of the run's prompts (again from the first where they are fewer), each longer than a
    block of the engine's cache, unless max_length leaves no room. A short prompt is followed by the next ones, of a
    long one the end is taken."""
    room = max(1, max_length - PROBE_CONTINUATION)
    shortest = min(block_size + max(2, block_size // 4), room)
    contexts = []
    for first in range(PROBE_PROMPTS):
        context: list[int] = []
        following = first
        while len(context) < shortest:
            context = context + list(prompts[following % len(prompts)])
            following += 1
        contexts.append(context[-min(room, max(shortest, PROBE_LONGEST)) :])
    return contexts


def choose_refitter(
    policy: Policy,
    generator: Generator,
    requested: Literal["adapter", "merge", "auto"],
    *,
    prompts: Sequence[list[int]],
    max_length: int,
    tokens_per_step: int,
    has_adapter: bool = True,
    merge_only: str | None = None,
    version: int = 0,
    say: Callable[[str], None] = print,
) -> Refitter:
    """The refitter of `policy.generation.refit`, after its first refit, which is `version`. generator: just started.

    auto: refits and generates both ways and takes the one with fewer seconds a step of tokens_per_step tokens; one
    whose proof fails is out. merge_only: why merging is the only way, where it is. say: told the choice and why, on
    every rank (give a no-op where it is not to speak).
    """
    mode: RefitMode = "merge" if requested == "merge" or merge_only else "adapter"
    refitter = Refitter(policy, generator, mode, prompts=prompts, max_length=max_length)
    # Of a whole model that has been trained the trainer has no base left to compare.
    if has_adapter or version == 0:
        refitter.measure_base(has_adapter=has_adapter)
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
    prompts = [refitter.probe[0][: max(1, len(refitter.probe[0]) // 2)]] * count
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


def _slowest(value: float) -> float:
    """The largest of the ranks' values, so that all ranks decide alike. NaN stays NaN."""
    values: list[float | None] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    numbers = [float(one) for one in values if one is not None]
    return float("nan") if any(one != one for one in numbers) else max(numbers)
