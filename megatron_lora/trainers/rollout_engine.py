"""The rollout engine of a run: built, kept at the trainer's weights, asked for answers with seeds that a resumed run
repeats."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from megatron_lora.data.dataset import Prompt
from megatron_lora.data.loader import Indexed
from megatron_lora.data.tokenizer import end_tokens
from megatron_lora.rollout.engines import Trainer, engine_of
from megatron_lora.rollout.generator import Generator, RolloutError, Sample, SamplingOptions
from megatron_lora.rollout.refit import PROBE_PROMPTS, Refitter, choose_refitter
from megatron_lora.runtime.activity import begin, hold
from megatron_lora.runtime.spans import span
from megatron_lora.trainers.rollout_turns import Turns
from megatron_lora.trainers.session import Session, StepAbandoned

REFIT_MODE = "refit_mode"
# What a seed is for, so that training and validation draw different numbers.
TRAINING, VALIDATION = 0, 1


class RolloutEngine:
    """The generator of `policy.generation`. Every method is collective.

    version: of the weights it answers with: the optimizer's state after that many rollout steps.
    """

    def __init__(self, session: Session, prompts: Indexed[Prompt]):
        """prompts: of the run's data; the proof of a refit continues some of them."""
        self.session, self.prompts = session, prompts
        self.policy_config = session.recipe.policy
        self.kind = engine_of(self.policy_config.generation)
        self.eos_token_ids = end_tokens(self.policy_config.model_name, session.tokenizer)
        self.generator = self._build()
        self._refitter: Refitter | None = None
        self._turns: Turns | None = None
        if session.recipe.env.environment is not None:
            longest = self.policy_config.generation.longest_sequence
            self._turns = Turns(
                session.recipe,
                session.world,
                lambda text: session.tokenizer.encode(text, add_special_tokens=False),
                longest or self.policy_config.max_total_sequence_length,
                session.reporter.warning,
            )

    def _build(self) -> Generator:
        session = self.session
        folder = Path(session.recipe.checkpointing.checkpoint_dir)
        say = session.reporter.message
        return self.kind.build(
            Trainer(session.policy, self.policy_config, session.world, session.tokenizer, folder, say)
        )

    @property
    def version(self) -> int:
        return self.generator.version

    @property
    def refits_by_adapter(self) -> bool:
        return self._refitter is not None and self._refitter.mode == "adapter"

    def start(self) -> None:
        """Build the engine and give it the trainer's weights. A resumed run refits as the run before it chose to.
        Raises StepAbandoned where a signal ends a wait for servers."""
        session, generation = self.session, self.policy_config.generation
        begin("starting the rollout engine", is_slow=True)
        if not self.generator.wait_until_ready(session.should_stop):
            raise StepAbandoned
        device = session.world.device
        before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
        self.generator.start()
        if device.type == "cuda":
            hold("the rollout engine while it answers", max(0, torch.cuda.memory_allocated(device) - before))
        if not self.kind.refits:
            self.generator.version = session.step
            return
        assert generation.max_new_tokens is not None
        self._refitter = choose_refitter(
            session.policy,
            self.generator,
            session.state.get(REFIT_MODE, generation.refit),
            prompts=self._probe_prompts(),
            max_length=generation.longest_sequence or self.policy_config.max_total_sequence_length,
            tokens_per_step=session.recipe.rollouts.num_samples * generation.max_new_tokens,
            has_adapter=self.policy_config.adapter.enabled,
            merge_only=self.kind.merge_only_reason(self.policy_config, session.world),
            version=session.step,
            say=session.reporter.message,
        )
        session.state[REFIT_MODE] = self._refitter.mode

    def _probe_prompts(self) -> list[list[int]]:
        count = min(PROBE_PROMPTS, len(self.prompts))
        return [self.prompts[position].input_ids.tolist() for position in range(count)]

    def refit(self, version: int) -> dict[str, float]:
        """Give the engine the trainer's present weights; returns what it took. Raises RolloutError, with the numbers,
        where it does not hold them afterwards. The native generator is the trainer's model and needs none."""
        if self._refitter is None:
            self.generator.version = version
            return {"refit_seconds": 0.0, "refit_bytes": 0}
        with span("wake"):
            self._wake()
        report = self._refitter.refit(version)
        return {
            "refit_seconds": report.seconds,
            "refit_bytes": report.bytes,
            "refit_proof_seconds": report.proof_seconds,
            "refit_probe_error": report.probe_error,
            "refit_probe_tolerance": report.tolerance,
        }

    def sampling_options(self, step: int, purpose: int, batch: int) -> SamplingOptions:
        """With the seed of a batch of prompts of a step, which a resumed run repeats."""
        return SamplingOptions.from_config(
            self.policy_config.generation,
            max_total_sequence_length=self.policy_config.max_total_sequence_length,
            eos_token_ids=self.eos_token_ids,
            seed=derive_seed(self.session.recipe.seed, step, purpose, batch),
            validation=purpose == VALIDATION,
        )

    def generate(
        self, prompts: Sequence[Prompt], num_samples: int, *, purpose: int, batch: int
    ) -> tuple[list[list[Sample]], float]:
        """(each prompt's answers, seconds). purpose, batch: with the run's seed and step they make the seed.

        Raises RolloutError for an answer of other weights than those after the run's present step.
        """
        options = self.sampling_options(self.session.step, purpose, batch)
        start = time.perf_counter()
        with span("wake"):
            self._wake()
        title = "validation answers" if purpose == VALIDATION else "rollout"
        total = len(prompts) * num_samples
        with self.showing_progress(title, total):
            ids = [prompt.input_ids.tolist() for prompt in prompts]
            with span("generation"):
                samples = self.generator.generate(ids, num_samples, options)
                if self._turns is not None:
                    samples = self._turns.play(prompts, samples, self._continue, options)
        seconds = time.perf_counter() - start
        stale = {sample.adapter_version for sample in samples} - {self.session.step}
        if stale:
            raise RolloutError(f"answers come from weights of version {sorted(stale)}, wanted {self.session.step}")
        return [samples[first : first + num_samples] for first in range(0, len(samples), num_samples)], seconds

    def _continue(self, contexts: Sequence[Sequence[int]], options: SamplingOptions) -> list[Sample]:
        return self.generator.generate(contexts, 1, options)

    def _wake(self) -> None:
        if self.session.world.device.type == "cuda":
            # What torch keeps for the next training step is what the engine needs now.
            torch.cuda.empty_cache()
        self.generator.wake()

    @contextmanager
    def showing_progress(self, title: str, total: int) -> Iterator[None]:
        """A bar of what the generator tells; at the end it stands at the total, whatever was guessed on the way."""
        with self.session.reporter.progress(title, total, "answers") as advance, self._reporting(advance, total):
            yield

    @contextmanager
    def _reporting(self, advance: Callable[[int], None], total: int) -> Iterator[None]:
        done = 0

        def on_answers(count: int) -> None:
            nonlocal done
            count = min(count, total - done)
            done += count
            advance(count)

        before = self.generator.on_answers
        self.generator.on_answers = on_answers
        try:
            yield
            advance(total - done)
        finally:
            self.generator.on_answers = before

    def sleep(self) -> None:
        """Leave the device's memory to the trainer."""
        self.generator.sleep()

    def close(self) -> None:
        if self._turns is not None:
            self._turns.close()
        self.generator.close()


def derive_seed(*numbers: int) -> int:
    """One seed [0, 2^31) from several numbers, spread so that neighbours have nothing in common."""
    return int(np.random.SeedSequence([number % (1 << 32) for number in numbers]).generate_state(1)[0]) >> 1
