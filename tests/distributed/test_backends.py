"""One recipe and starting adapter on both backends, world sizes 1, 2 and 4: SFT, DPO, GRPO and full fine-tuning."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.distributed.backends_worker import ALGORITHMS, HALF, LAYOUTS, NUM_STEPS
from tests.support.compare import relative_differences
from tests.support.launch import run_ranks
from tests.support.models import save_model
from tests.support.reference import save_adapter

pytestmark = pytest.mark.timeout(1800)

TOLERANCE = 1e-4
# Two ranks take two minutes of two cores, four take three.
SIZES = [pytest.param(size, marks=[pytest.mark.long] if size > 1 else []) for size in LAYOUTS]
Found = Callable[[int], list[dict[str, Any]]]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """What each rank of a world size found; the processes are started when first asked for."""
    folder = tmp_path_factory.mktemp("backends")
    for family in {algorithm.family for algorithm in ALGORITHMS.values()}:
        save_adapter(save_model(folder / family, family), folder / f"{family}_adapter")
    started: set[int] = set()

    def results(size: int) -> list[dict[str, Any]]:
        if size not in started:
            started.add(size)
            run_ranks("tests.distributed.backends_worker", size, folder)
        return [torch.load(folder / f"backends_{size}.{rank}.pt", weights_only=False) for rank in range(size)]

    return results


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ALGORITHMS)
def test_twenty_steps_are_the_same_on_both_backends(name: str, size: int, found: Found) -> None:
    for rank in found(size):
        ours, theirs = rank[f"{name}_megatron"], rank[f"{name}_dtensor"]
        assert len(ours["losses"]) == NUM_STEPS
        assert max(relative_differences(ours["losses"], theirs["losses"])) < TOLERANCE
        assert max(relative_differences(ours["grad_norms"], theirs["grad_norms"])) < TOLERANCE
        assert ours["learning_rates"] == pytest.approx(theirs["learning_rates"])
        for mine, other in zip(ours["metrics"], theirs["metrics"], strict=True):
            assert mine == pytest.approx(other, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("backend", ["megatron", "dtensor"])
@pytest.mark.parametrize("name", [name for name, algorithm in ALGORITHMS.items() if algorithm.exchanged])
def test_a_run_goes_on_from_the_other_backends_checkpoint(name: str, backend: str, size: int, found: Found) -> None:
    """Weights, Adam's moments and the schedule: the second half of the steps is that of a run that never changed."""
    for rank in found(size):
        resumed, straight = rank[f"{name}_{backend}_resumed"], rank[f"{name}_{backend}"]
        for key in ("losses", "grad_norms"):
            assert max(relative_differences(resumed[key], straight[key][HALF:])) < TOLERANCE
        assert resumed["learning_rates"] == pytest.approx(straight["learning_rates"][HALF:])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", [name for name, algorithm in ALGORITHMS.items() if algorithm.drawn])
def test_both_backends_draw_the_same_adapter(name: str, size: int, found: Found) -> None:
    ours, theirs = (found(size)[0][f"{name}_{backend}_start"] for backend in ("megatron", "dtensor"))
    assert ours.config == theirs.config
    assert set(ours.tensors) == set(theirs.tensors)
    assert all(torch.equal(ours.tensors[name], value) for name, value in theirs.tensors.items())


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("backend", ["megatron", "dtensor"])
@pytest.mark.parametrize("name", ["sft", "grpo"])
def test_a_policy_is_its_reference_before_it_trains(name: str, backend: str, size: int, found: Found) -> None:
    """B at zero, and an adapter from a folder."""
    for rank in found(size):
        assert rank[f"{name}_{backend}"]["at_reference"] == [True, False]


@pytest.mark.parametrize("size", SIZES[1:])
@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_layout_does_not_matter(name: str, size: int, found: Found) -> None:
    wanted, ours = found(1)[0][f"{name}_dtensor"], found(size)[0][f"{name}_megatron"]
    assert max(relative_differences(ours["losses"], wanted["losses"])) < TOLERANCE
    assert max(relative_differences(ours["grad_norms"], wanted["grad_norms"])) < TOLERANCE


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_steps_learn_something(name: str, found: Found) -> None:
    """Equal numbers prove little where nothing moves."""
    run = found(1)[0][f"{name}_megatron"]
    assert min(run["grad_norms"]) > 0
    assert max(run["losses"]) - min(run["losses"]) > 0.1
