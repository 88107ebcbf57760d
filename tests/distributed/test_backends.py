"""One recipe and starting adapter on both backends, world sizes 1, 2 and 4: SFT, DPO, GRPO and full fine-tuning, also
with its start as the reference and with a config.json that the recipe changes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_lora.data.batch import Row
from tests.distributed.backends_checks import (
    ALGORITHMS,
    DPO_BETA,
    HALF,
    LAYOUTS,
    NUM_STEPS,
    WITH_ANOTHER,
    YARN,
    Algorithm,
    folder_of,
    pairs_of,
    rows_of,
)
from tests.distributed.cases import Case
from tests.support.compare import relative_differences
from tests.support.reference import token_logps

pytestmark = pytest.mark.timeout(1800)

TOLERANCE = 1e-4
# Two ranks take two minutes of two cores, four take three.
ONE = Case("backends_1", 1, "backends", adapter=None, both=True)
MORE = [Case(f"backends_{size}", size, "backends", adapter=None, both=True, needs=ONE) for size in LAYOUTS if size > 1]
CASES = [ONE, *(pytest.param(case, marks=pytest.mark.long) for case in MORE)]
Ranks = list[dict[str, Any]]


@pytest.fixture
def bases(case: Case, ranks_found: Ranks, workers: Any) -> Path:
    """A folder of bases and adapters."""
    return folder_of(workers.folder, case.ranks)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("name", ALGORITHMS)
def test_twenty_steps_are_the_same_on_both_backends(name: str, case: Case, ranks_found: Ranks) -> None:
    for rank in ranks_found:
        ours, theirs = rank[f"{name}_megatron"], rank[f"{name}_dtensor"]
        assert len(ours["losses"]) == NUM_STEPS
        assert max(relative_differences(ours["losses"], theirs["losses"])) < TOLERANCE
        assert max(relative_differences(ours["grad_norms"], theirs["grad_norms"])) < TOLERANCE
        assert ours["learning_rates"] == pytest.approx(theirs["learning_rates"])
        for mine, other in zip(ours["metrics"], theirs["metrics"], strict=True):
            assert mine == pytest.approx(other, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("backend", ["megatron", "dtensor"])
@pytest.mark.parametrize("name", [name for name, algorithm in ALGORITHMS.items() if algorithm.exchanged])
def test_a_run_goes_on_from_the_other_backends_checkpoint(
    name: str, backend: str, case: Case, ranks_found: Ranks
) -> None:
    """Weights, Adam's moments and the schedule: the second half of the steps is that of a run that never changed."""
    for rank in ranks_found:
        resumed, straight = rank[f"{name}_{backend}_resumed"], rank[f"{name}_{backend}"]
        for key in ("losses", "grad_norms"):
            assert max(relative_differences(resumed[key], straight[key][HALF:])) < TOLERANCE
        assert resumed["learning_rates"] == pytest.approx(straight["learning_rates"][HALF:])


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("name", [name for name, algorithm in ALGORITHMS.items() if algorithm.drawn])
def test_both_backends_draw_the_same_adapter(name: str, case: Case, ranks_found: Ranks) -> None:
    ours, theirs = (ranks_found[0][f"{name}_{backend}_start"] for backend in ("megatron", "dtensor"))
    assert ours.config == theirs.config
    assert set(ours.tensors) == set(theirs.tensors)
    assert all(torch.equal(ours.tensors[name], value) for name, value in theirs.tensors.items())


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("backend", ["megatron", "dtensor"])
@pytest.mark.parametrize("name", ["sft", "grpo", "full_dpo", "full_grpo"])
def test_a_policy_is_its_reference_before_it_trains(name: str, backend: str, case: Case, ranks_found: Ranks) -> None:
    """B at zero, an adapter from a folder, and a whole model whose start is kept."""
    for rank in ranks_found:
        assert rank[f"{name}_{backend}"]["at_reference"] == [True, False]
        assert rank[f"{name}_{backend}"]["moved_by_reference"] == 0


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("backend", ["megatron", "dtensor"])
@pytest.mark.parametrize("name", ["full_dpo", "full_grpo", "dpo"])
def test_the_reference_is_transformers_base(
    name: str, backend: str, case: Case, ranks_found: Ranks, bases: Path
) -> None:
    """Of a whole model after all steps and after a resume; of a starting adapter where the recipe asks for the base."""
    algorithm = ALGORITHMS[name]
    model = transformers_model(bases, algorithm)
    with torch.no_grad():
        wanted = [token_logps(model, row) for row in rows_of(0)]
    for rank in ranks_found:
        for run in (f"{name}_{backend}", *([f"{name}_{backend}_resumed"] if algorithm.exchanged else [])):
            for row, logps, base in zip(rows_of(0), rank[run]["reference"], wanted, strict=True):
                assert ((logps[1:] - base) * row.target_mask[1:]).abs().max() < TOLERANCE


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("backend", ["megatron", "dtensor"])
@pytest.mark.parametrize("name", WITH_ANOTHER)
def test_another_adapter_on_the_base_is_pefts(
    name: str, backend: str, case: Case, ranks_found: Ranks, bases: Path
) -> None:
    """Of another scale than the run's, after the run has trained its own, which comes back bit for bit."""
    model = PeftModel.from_pretrained(transformers_model(bases, ALGORITHMS[name]), bases / "qwen3_other")
    with torch.no_grad():
        wanted = [token_logps(model, row) for row in rows_of(0)]
    for rank in ranks_found:
        run = rank[f"{name}_{backend}"]
        assert run["moved_by_other"] == 0
        for row, logps, one in zip(rows_of(0), run["other"], wanted, strict=True):
            assert ((logps[1:] - one) * row.target_mask[1:]).abs().max() < TOLERANCE


@pytest.mark.parametrize("case", [ONE], ids=str)
@pytest.mark.parametrize("backend", ["megatron", "dtensor"])
def test_dpo_of_the_whole_model_equals_transformers(
    case: Case, backend: str, found: dict[str, Any], bases: Path
) -> None:
    run = found[f"full_dpo_{backend}"]
    losses, norms = transformers_dpo(bases, run["learning_rates"])
    assert max(relative_differences(run["losses"], losses)) < TOLERANCE
    assert max(relative_differences(run["grad_norms"], norms)) < TOLERANCE


def transformers_model(bases: Path, algorithm: Algorithm) -> Any:
    """The base with the algorithm's changes of config.json, made without this project's code."""
    config = AutoConfig.from_pretrained(bases / algorithm.family)
    if algorithm.overrides:
        config.rope_parameters = dict(YARN["rope_scaling"])
        config.max_position_embeddings = YARN["max_position_embeddings"]
    return AutoModelForCausalLM.from_pretrained(bases / algorithm.family, config=config, attn_implementation="eager")


def transformers_dpo(bases: Path, rates: list[float]) -> tuple[list[float], list[float]]:
    """Losses and gradient norms of full DPO with a frozen second model (Rafailov et al. 2023, eq. 7)."""
    model, frozen = (transformers_model(bases, ALGORITHMS["full_dpo"]) for _ in range(2))
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), eps=1e-8)
    losses, norms = [], []

    def answer(network: Any, row: Row) -> torch.Tensor:
        return (token_logps(network, row) * row.target_mask[1:]).sum()

    for step, rate in enumerate(rates):
        for group in optimizer.param_groups:
            group["lr"] = rate
        margins = []
        for chosen, rejected in pairs_of(step):
            with torch.no_grad():
                base = answer(frozen, chosen) - answer(frozen, rejected)
            margins.append(answer(model, chosen) - answer(model, rejected) - base)
        loss = -torch.nn.functional.logsigmoid(DPO_BETA * torch.stack(margins)).mean()
        optimizer.zero_grad()
        loss.backward()
        losses.append(loss.item())
        norms.append(float(torch.nn.utils.clip_grad_norm_(parameters, 1.0)))
        optimizer.step()
    return losses, norms


@pytest.mark.parametrize("case", CASES[1:], ids=str)
@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_layout_does_not_matter(name: str, case: Case, found: dict[str, Any], workers: Any) -> None:
    wanted, ours = workers.found(ONE)[0][f"{name}_dtensor"], found[f"{name}_megatron"]
    assert max(relative_differences(ours["losses"], wanted["losses"])) < TOLERANCE
    assert max(relative_differences(ours["grad_norms"], wanted["grad_norms"])) < TOLERANCE


@pytest.mark.parametrize("case", [ONE], ids=str)
@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_steps_learn_something(name: str, case: Case, found: dict[str, Any]) -> None:
    """Equal numbers prove little where nothing moves."""
    run = found[f"{name}_megatron"]
    assert min(run["grad_norms"]) > 0
    assert max(run["losses"]) - min(run["losses"]) > 0.1
