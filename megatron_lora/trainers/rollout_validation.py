"""Validation by answers: answers to held-out prompts, their accuracy, and some of them to look at."""

import time
from collections.abc import Sequence

from megatron_lora.data.dataset import Prompt
from megatron_lora.data.loader import GroupLoader
from megatron_lora.rollout.rewards import RewardRunner, RewardSpec
from megatron_lora.runtime.activity import begin
from megatron_lora.trainers.last_answer import shorten
from megatron_lora.trainers.rollout_batch import Group, describe_groups, num_generated, reward_answers, sample_table
from megatron_lora.trainers.rollout_engine import VALIDATION, RolloutEngine
from megatron_lora.trainers.session import Session

# Rewards that say whether an answer is right, rather than how it looks.
CORRECTNESS = ("exact", "math", "dapo_math_verify", "gsm8k")
STOP = "stop_at_validation"
COLUMNS = ("prompt", "answer", "reference", "reward", "tokens")


def validate_answers(
    session: Session, engine: RolloutEngine, runner: RewardRunner, loader: GroupLoader[Prompt]
) -> None:
    """Answers to each prompt, drawn with the `val_*` keys; logs accuracy and reward, shows answers. Collective."""
    begin(f"generating and rewarding validation answers at step {session.step}", is_slow=True)
    count = session.recipe.rollouts.val_num_generations_per_prompt
    start = time.perf_counter()
    groups: list[Group] = []
    generation_seconds = 0.0
    loader.epoch = loader.position = 0
    for number, prompts in enumerate(loader):
        answers, seconds = engine.generate(prompts, count, purpose=VALIDATION, batch=number)
        generation_seconds += seconds
        groups += reward_answers(runner, prompts, answers, session.world)
    engine.sleep()
    tokens, seconds = num_generated(groups), time.perf_counter() - start
    session.log_validation(
        describe_groups(groups)
        | {
            "accuracy": accuracy(groups, runner.specs),
            **({"pass_k": pass_k(groups, runner.specs)} if count > 1 else {}),
            "adapter_version": engine.version,
            "num_samples": len(groups) * count,
            "num_tokens": tokens,
            "generation_seconds": generation_seconds,
            "generation_tokens_per_second": tokens / generation_seconds,
            "step_time_seconds": seconds,
            "tokens_per_second": tokens / seconds,
        }
    )
    show_samples(session, groups, "validation answers")


def accuracy(groups: Sequence[Group], specs: Sequence[RewardSpec]) -> float:
    """Mean of the first reward that says whether an answer is right; of the weighted sum where there is none. Answers
    on which it abstained do not count."""
    values = [value for group in groups for value in _marks(group, specs) if value is not None]
    return sum(values) / len(values) if values else 0.0


def pass_k(groups: Sequence[Group], specs: Sequence[RewardSpec]) -> float:
    """Share of prompts with an answer that `accuracy` gives something for."""
    return sum(any((value or 0.0) > 0 for value in _marks(group, specs)) for group in groups) / len(groups)


def _marks(group: Group, specs: Sequence[RewardSpec]) -> list[float | None]:
    name = next((spec.name for spec in specs if spec.kind in CORRECTNESS), None)
    return [outcome.total if name is None else outcome.values[name] for outcome in group.outcomes]


def stop_reason(session: Session) -> str:
    """Why the last validation ends the run (`stop_at_validation_*`); "" where it does not. What it found is kept
    with the checkpoint, so that the same command does not train on."""
    options = session.recipe.rollouts
    name, threshold = options.stop_at_validation_metric, options.stop_at_validation_threshold
    if name is None or threshold is None:
        return ""
    value = session.metrics.get(("validation", name))
    found = session.state.setdefault(STOP, {})
    if value is not None:
        found[name] = value
    if found.get(name, float("-inf")) < threshold:
        return ""
    key = f"{session.recipe.algorithm}.stop_at_validation_threshold"
    return f"validation's {name} is {found[name]:.4g}, at least {key}={threshold:g}"


def show_samples(session: Session, groups: Sequence[Group], title: str) -> None:
    """A table of `logger.num_val_samples_to_print` answers with their rewards."""
    count = session.recipe.logger.num_val_samples_to_print
    if count:
        session.reporter.table(f"{title} at step {session.step}", COLUMNS, sample_table(groups, count))


def show_answer(session: Session, group: Group) -> None:
    """The first answer of a group, long texts cut."""
    [cells] = sample_table([group], 1)
    session.reporter.table(f"an answer of step {session.step}", COLUMNS, [shorten(cells)])
