"""Answers asked ahead of their step, against small HTTP servers: which version draws them, what a refit waits for, what
is dropped, and what a run that goes on asks again."""

import threading
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_rollout_servers import OPTIONS, Server, adapter, start, two

from megatron_lora.config.schema_algorithms import GrpoConfig
from megatron_lora.data.dataset import Prompt
from megatron_lora.data.loader import GroupLoader
from megatron_lora.rollout.generator import RolloutError
from megatron_lora.rollout.servers import ServerGenerator
from megatron_lora.trainers.rollout_ahead import RolloutsAhead, describe_ages

__all__ = ["two"]
PROMPTS = [Prompt(torch.tensor([10 + i, 1]), f"{i}", "", index=i) for i in range(7)]
STEPS = 6


class Engine:
    """What `RolloutsAhead` asks of a RolloutEngine, whose proofs need a model."""

    refits_by_adapter = True

    def __init__(self, generator: ServerGenerator):
        self.generator = generator
        self.version = -1

    def sampling_options(self, step: int, purpose: int, batch: int) -> Any:
        return replace(OPTIONS, seed=step)

    def showing_progress(self, title: str, total: int) -> Any:
        return nullcontext()

    def refit(self, version: int) -> dict[str, float]:
        self.generator.load_adapter(adapter(), version)
        self.version = version
        return {}


def loader_of(prompts: list[Prompt] = PROMPTS) -> GroupLoader[Prompt]:
    return GroupLoader(prompts, 2, seed=3)


def ahead_of(
    servers: list[Server], folder: Path, age: int, loader: Any = None, step: int = 0, **keys: Any
) -> RolloutsAhead:
    generator, _ = start(servers, folder)
    engine: Any = Engine(generator)
    engine.refit(step)
    section = {"enabled": True, "max_trajectory_age_steps": age} | keys
    options = GrpoConfig.model_validate({"num_generations_per_prompt": 2, "async_grpo": section})
    return RolloutsAhead(engine, loader or loader_of(), options, STEPS)


def take_steps(ahead: RolloutsAhead, loader: GroupLoader[Prompt], steps: range) -> list[tuple[list[int], set[int]]]:
    """(prompts, versions of their answers) of each step."""
    prompts, found = loader.forever(), []
    for step in steps:
        batch = next(prompts)
        ahead.ask()
        answers, _ = ahead.collect(step, batch)
        for prompt, samples in zip(batch, answers, strict=True):
            assert [sample.completion_ids for sample in samples] == [[int(prompt.input_ids[0])]] * 2
        found.append(([p.index for p in batch], {s.adapter_version for samples in answers for s in samples}))
        ahead.refit(step + 1)
    return found


def open_soon(server: Server) -> None:
    threading.Timer(0.3, server.gate.set).start()


@pytest.mark.parametrize("age", [0, 1, 4])
def test_answers_are_as_old_as_allowed_and_no_prompt_is_asked_twice(
    age: int, two: list[Server], tmp_path: Path
) -> None:
    ahead, loader = ahead_of(two, tmp_path, age), loader_of()
    found = take_steps(ahead, loader, range(STEPS))
    plain, order = loader_of().forever(), []
    for _ in range(STEPS):
        order.append([prompt.index for prompt in next(plain)])
    assert [prompts for prompts, _ in found] == order
    assert [versions for _, versions in found] == [{max(0, step - age)} for step in range(STEPS)]
    # Nothing is asked for steps that the run does not take.
    assert sum(server.asked for server in two) == 2 * STEPS


def test_a_run_that_goes_on_loses_no_prompt_and_repeats_none(two: list[Server], tmp_path: Path) -> None:
    whole = take_steps(ahead_of(two, tmp_path, 2), loader_of(), range(STEPS))
    loader = loader_of()
    first = take_steps(ahead_of(two, tmp_path, 2, loader), loader, range(4))
    saved = loader.state_dict()
    resumed = loader_of()
    resumed.load_state_dict(saved)
    rest = take_steps(ahead_of(two, tmp_path, 2, resumed, step=4), resumed, range(4, STEPS))
    assert [prompts for prompts, _ in first + rest] == [prompts for prompts, _ in whole]
    assert [versions for _, versions in rest] == [{4}, {4}]  # asked again


def test_other_prompts_than_were_asked_for_are_a_bug(two: list[Server], tmp_path: Path) -> None:
    ahead = ahead_of(two, tmp_path, 1)
    ahead.ask()
    with pytest.raises(AssertionError, match="other prompts"):
        ahead.collect(0, ahead._asked[1])


def test_a_refit_waits_for_the_answers_that_were_begun(two: list[Server], tmp_path: Path) -> None:
    ahead = ahead_of(two, tmp_path, 1)
    two[0].gate.clear()
    ahead.ask()
    open_soon(two[0])
    waited = ahead.refit(1)["refit_wait_seconds"]
    assert waited > 0.2 and len(two[0].adapters) == 1
    assert {s.adapter_version for group in ahead.collect(0, ahead._asked[0])[0] for s in group} == {0}


def test_in_flight_a_refit_waits_for_nobody_and_the_old_adapter_stays_until_it_is_done(
    two: list[Server], tmp_path: Path
) -> None:
    ahead = ahead_of(two, tmp_path, 1, in_flight_weight_updates=True)
    [old] = two[0].adapters
    two[0].gate.clear()
    ahead.ask()
    requests: Any = ahead.engine.generator.requests  # pyright: ignore[reportAttributeAccessIssue]
    answered = time.monotonic() + 30
    while requests.models_in_use(requests.clients[1]) and time.monotonic() < answered:
        time.sleep(0.01)  # the server that is not held has answered its own
    assert ahead.refit(1)["refit_wait_seconds"] < 0.2
    folder = tmp_path / "rollout-weights"
    assert list(two[0].adapters)[0] == old and len(two[0].adapters) == 2 and (folder / old).is_dir()
    assert old not in two[1].adapters
    two[0].gate.set()
    for step in (0, 1):  # both were asked of version 0; while one is open, version 0 stays
        assert {s.adapter_version for group in ahead.collect(step, ahead._asked[step])[0] for s in group} == {0}
    ahead.refit(2)
    assert old not in two[0].adapters and not (folder / old).exists()


def test_merged_weights_are_never_replaced_under_an_answer(two: list[Server], tmp_path: Path) -> None:
    ahead = ahead_of(two, tmp_path, 1, in_flight_weight_updates=True)
    ahead.engine.refits_by_adapter = False  # pyright: ignore[reportAttributeAccessIssue]
    two[0].gate.clear()
    ahead.ask()
    open_soon(two[0])
    assert ahead.refit(1)["refit_wait_seconds"] > 0.2


def test_what_waits_for_a_place_is_drawn_by_the_newer_weights(two: list[Server], tmp_path: Path) -> None:
    generator, _ = start(two, tmp_path)
    generator.requests.at_once = 1
    two[0].gate.clear()
    generator.ask_ahead(7, [[10, 1], [11, 1], [12, 1], [13, 1]], 1, OPTIONS)
    open_soon(two[0])
    with generator.new_weights(in_flight=False):
        generator.load_adapter(adapter(), 4)
    found = generator.collect(7, oldest=0).samples
    assert [sample.completion_ids for sample in found] == [[10], [11], [12], [13]]
    # The second server had answered both of its own before it was held back, the first one of its two.
    assert [sample.adapter_version for sample in found][::2] == [3, 4]


def test_answers_that_are_too_old_are_dropped_counted_and_drawn_again(two: list[Server], tmp_path: Path) -> None:
    generator, _ = start(two, tmp_path)
    generator.ask_ahead(5, [[10, 1], [11, 1]], 3, OPTIONS)
    for version in (4, 5):
        with generator.new_weights(in_flight=False):
            generator.load_adapter(adapter(), version)
    found = generator.collect(5, oldest=4)
    assert found.num_stale == 6 and {sample.adapter_version for sample in found.samples} == {5}
    assert [sample.completion_ids for sample in found.samples] == [[10]] * 3 + [[11]] * 3
    assert sum(server.asked for server in two) == 4


def test_validation_and_proofs_go_before_what_is_asked_ahead(two: list[Server], tmp_path: Path) -> None:
    generator, _ = start(two, tmp_path)
    generator.requests.at_once = 1
    for server in two:
        server.gate.clear()
    generator.ask_ahead(0, [[10 + i, 1] for i in range(6)], 1, OPTIONS)
    for server in two:
        open_soon(server)
    generator.requests.hold_back(until_answered=False)
    assert [s.completion_ids for s in generator.generate([[50], [51]], 1, OPTIONS)] == [[50], [51]]
    assert sum(server.asked for server in two) == 4
    generator.requests.go_on()
    assert len(generator.collect(0, oldest=0).samples) == 6


def test_a_proof_does_not_wait_for_answers_that_fill_every_place(two: list[Server], tmp_path: Path) -> None:
    generator, _ = start(two, tmp_path)
    generator.requests.at_once = 1
    for server in two:
        server.gate.clear()
    generator.ask_ahead(0, [[10 + i, 1] for i in range(6)], 1, OPTIONS)
    proof = generator.requests.ask([[50], [51]], 1, OPTIONS, urgent=True)
    deadline = time.perf_counter() + 5
    while any(server.asked < 2 for server in two) and time.perf_counter() < deadline:
        time.sleep(0.01)
    # What was begun, and the proof; nothing else has been sent.
    assert [server.asked for server in two] == [2, 2]
    for server in two:
        server.gate.set()
    generator.requests.wait(proof, lambda count: None)
    assert len(generator.collect(0, oldest=0).samples) == 6


def test_a_server_that_dies_over_answers_asked_ahead_loses_none(two: list[Server], tmp_path: Path) -> None:
    ahead = ahead_of(two, tmp_path, 4)
    two[0].behaviour = "error"
    assert len(take_steps(ahead, loader_of(), range(STEPS))) == STEPS
    ahead = ahead_of(two, tmp_path, 4)
    two[1].behaviour = "error"
    with pytest.raises(RolloutError, match="no rollout server is left"):
        take_steps(ahead, loader_of(), range(STEPS))


def test_a_run_that_ends_waits_for_no_answer(two: list[Server], tmp_path: Path) -> None:
    ahead = ahead_of(two, tmp_path, 2)
    for server in two:
        server.gate.clear()
    ahead.ask()
    start_time = time.perf_counter()
    ahead.servers.close()
    assert time.perf_counter() - start_time < 1.0
    ahead_threads = [thread for thread in threading.enumerate() if thread.name.endswith("(_answer)")]
    assert ahead_threads and all(thread.daemon for thread in ahead_threads)
    for server in two:
        server.gate.set()


def test_ages_are_told_as_shares(two: list[Server], tmp_path: Path) -> None:
    generator, _ = start(two, tmp_path)
    samples = generator.generate([[10], [11]], 2, OPTIONS)
    samples[0].adapter_version = 1
    found = describe_ages(samples, 4, 3)
    assert found["staleness_mean"] == 1.5 and found["staleness_max"] == 3
    assert [found[f"staleness_share_{age}"] for age in range(4)] == [0.0, 0.75, 0.0, 0.25]
