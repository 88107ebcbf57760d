"""Asynchronous GRPO: rollout servers answer the prompts of later steps while the policy trains on those before.

A step is numbered by the version of the weights that it starts from. Its prompts are asked as soon as the servers hold
version `step - max_trajectory_age_steps`, so that its answers are at most that many versions old when they are trained
on. Nothing of this is part of a checkpoint: its data position is that of the steps trained on, and a run that goes on
asks for the steps after them again.
"""

import copy
import time
from collections.abc import Iterator, Sequence

from megatron_lora.config.algorithm_section import RolloutSection
from megatron_lora.data.dataset import Prompt
from megatron_lora.data.loader import GroupLoader
from megatron_lora.rollout.generator import AheadGenerator, Sample
from megatron_lora.trainers.rollout_engine import TRAINING, RolloutEngine


class RolloutsAhead:
    """Answers of a run's steps, asked for ahead on the engine's servers. Every method is collective.

    loader: of the run, at the data of its next step; it is not moved. total_steps: of the run.
    """

    def __init__(self, engine: RolloutEngine, loader: GroupLoader[Prompt], options: RolloutSection, total_steps: int):
        assert isinstance(engine.generator, AheadGenerator)
        self.engine, self.servers = engine, engine.generator
        self.options, self.total_steps = options, total_steps
        self.max_age = options.oldest_answer
        self._prompts: Iterator[list[Prompt]] = copy.copy(loader).forever()
        self._asked: dict[int, list[Prompt]] = {}
        self._next_step = engine.version
        self.num_stale = 0
        self.wait_seconds = 0.0

    def ask(self) -> None:
        """For the steps that the weights which the servers hold may answer, as far as they were not asked for."""
        while self._next_step <= min(self.engine.version + self.max_age, self.total_steps - 1):
            step, prompts = self._next_step, next(self._prompts)
            self._asked[step] = prompts
            self.servers.ask_ahead(
                step,
                [prompt.input_ids.tolist() for prompt in prompts],
                self.options.num_generations_per_prompt,
                self.engine.sampling_options(step, TRAINING, 0),
            )
            self._next_step += 1

    def collect(self, step: int, prompts: Sequence[Prompt]) -> tuple[list[list[Sample]], float]:
        """(the answers to each of the step's prompts, seconds that they took), waiting for those that are not in.

        `num_stale` and `wait_seconds` are then the step's: answers that were too old and drawn again, and the time
        waited here. Raises RolloutError as `RolloutEngine.generate` does.
        """
        start = time.perf_counter()
        asked = [prompt.index for prompt in self._asked.pop(step)]
        if asked != [prompt.index for prompt in prompts]:
            raise AssertionError(f"step {step} trains on other prompts than were asked for: {asked}")
        size = self.options.num_generations_per_prompt
        with self.engine.showing_progress("rollout", len(prompts) * size):
            found = self.servers.collect(step, oldest=step - self.max_age)
        self.num_stale, self.wait_seconds = found.num_stale, time.perf_counter() - start
        samples = found.samples
        return [samples[first : first + size] for first in range(0, len(samples), size)], found.seconds

    def refit(self, version: int) -> dict[str, float]:
        """`RolloutEngine.refit`, with prompts held back until the new weights are proven; then further steps are asked
        for. Only an adapter can be handed over while answers are drawn: merged weights would change under them."""
        in_flight = self.options.in_flight and self.engine.refits_by_adapter
        start = time.perf_counter()
        with self.servers.new_weights(in_flight=in_flight):
            waited = time.perf_counter() - start
            report = self.engine.refit(version)
        self.ask()
        return report | {"refit_wait_seconds": waited}


def describe_ages(samples: Sequence[Sample], step: int, max_age: int) -> dict[str, float]:
    """How many versions before the step's own the answers were drawn: mean, largest, and the share of each age."""
    ages = [step - sample.adapter_version for sample in samples]
    shares = {f"staleness_share_{age}": ages.count(age) / len(ages) for age in range(max_age + 1)}
    return {"staleness_mean": sum(ages) / len(ages), "staleness_max": max(ages)} | shares
