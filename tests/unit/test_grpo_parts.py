"""What the GRPO loop is made of: shaping, rows, seeds, the mean of several updates, what is refused at the start."""

import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from pydantic import ValidationError

from megatron_lora.config.loader import load_recipe
from megatron_lora.config.schema import Recipe
from megatron_lora.config.schema_algorithms import GrpoConfig
from megatron_lora.config.schema_run import CheckpointingConfig
from megatron_lora.data.dataset import Prompt
from megatron_lora.data.prepare import longest_prompt
from megatron_lora.errors import UserError
from megatron_lora.policy.interface import StepResult
from megatron_lora.rollout.generator import Sample
from megatron_lora.rollout.rewards import RewardOutcome, RewardSpec
from megatron_lora.runtime.world import World
from megatron_lora.trainers.grpo import GRPO
from megatron_lora.trainers.loop import run_steps
from megatron_lora.trainers.metric_names import check_stop_metric
from megatron_lora.trainers.rollout_batch import Group, build_rows, describe_groups, sample_table, shaped_rewards
from megatron_lora.trainers.rollout_engine import derive_seed
from megatron_lora.trainers.rollout_loop import mean_result
from megatron_lora.trainers.rollout_setup import build_prompt_loaders
from megatron_lora.trainers.rollout_validation import accuracy, pass_k, show_answer, stop_reason
from megatron_lora.trainers.session import Session
from tests.support.models import save_model

RECIPE = Path(__file__).parents[2] / "recipes" / "grpo-quickstart-megatron.yaml"


def group(rewards: list[float], lengths: list[int], reasons: list[str] | None = None) -> Group:
    prompt = Prompt(torch.tensor([5, 6, 7]), "1+1=", "2", index=4)
    samples = [
        Sample(0, [5, 6, 7], list(range(10, 10 + n)), -torch.arange(1.0, n + 1), reason, "2", adapter_version=3)
        for n, reason in zip(lengths, reasons or ["stop"] * len(lengths), strict=True)
    ]
    outcomes = [RewardOutcome(total=2 * r, values={"look": 0.5, "right": r}, errors={}) for r in rewards]
    return Group(prompt, samples, outcomes)


def test_rows_carry_what_the_loss_reads() -> None:
    rows = build_rows([group([1.0, 0.0], [2, 1])], torch.tensor([[0.5, -0.5]]))
    first, second = rows
    assert first.input_ids.tolist() == [5, 6, 7, 10, 11] and second.input_ids.tolist() == [5, 6, 7, 10]
    assert first.target_mask.tolist() == [False] * 3 + [True] * 2
    assert first.token_fields["advantages"].tolist() == [0.5] * 5
    assert first.token_fields["rollout_logps"].tolist() == [0, 0, 0, -1, -2]
    assert [row.row_fields["reward"] for row in rows] == [2.0, 0.0] and first.index == 4


def test_scaling_then_length_penalty() -> None:
    groups = [group([1.0, 0.5], [8, 10])]
    grpo = GrpoConfig.model_validate(
        {
            "reward_scaling": {"enabled": True, "source_max": 2.0, "target_max": 10.0},
            "reward_shaping": {"enabled": True, "max_response_length": 10, "overlong_buffer_length": 4},
        }
    )
    # 2 and 1 scaled to 10 and 5; 8 of 10 tokens are 2 into a buffer of 4, 10 are at its end.
    assert shaped_rewards(groups, grpo).tolist() == [[9.5, 4.0]]


def test_answers_cut_off_keep_a_share_of_their_reward() -> None:
    groups = [group([1.0, 1.0], [8, 10], ["stop", "length"])]
    shaping = {"enabled": True, "max_response_length": 256, "stop_properly_penalty_coef": 0.25}
    assert shaped_rewards(groups, GrpoConfig.model_validate({"reward_shaping": shaping})).tolist() == [[2.0, 0.5]]


def test_log_of_the_answers() -> None:
    found = describe_groups([group([1.0, 0.0], [2, 4], ["stop", "length"])])
    assert found["reward"] == 1.0 and found["reward_right"] == 0.5 and found["reward_look"] == 0.5
    assert found["reward_std"] == 1.0 and found["response_length"] == 3 and found["truncated_share"] == 0.5
    assert sample_table([group([1.0], [2])], 4) == [("1+1=", "2", "2", 2.0, 2)]


def test_accuracy_is_the_reward_that_judges() -> None:
    groups = [group([1.0, 0.0], [1, 1])]
    look = RewardSpec("format", "look", pattern="x")
    assert accuracy(groups, [look, RewardSpec("exact", "right")]) == 0.5
    assert accuracy(groups, [look]) == 1.0


def test_seeds_of_neighbouring_steps_differ() -> None:
    seeds = {derive_seed(42, step, purpose, batch) for step in range(50) for purpose in (0, 1) for batch in range(3)}
    assert len(seeds) == 300 and all(0 <= seed < 1 << 31 for seed in seeds)
    assert derive_seed(42, 1, 0, 0) == derive_seed(42, 1, 0, 0)


def test_mean_over_updates() -> None:
    results = [StepResult(1.0, {"kl": 0.2}, 3.0, 1e-3, 5, 9), StepResult(2.0, {"kl": 0.4}, 5.0, 5e-4, 5, 9)]
    found = mean_result(results, build_rows([group([1.0], [2])], torch.zeros(1, 1)), 5e-4)
    assert (found.loss, found.grad_norm, found.learning_rate) == (1.5, 4.0, 5e-4)
    assert found.metrics["kl"] == pytest.approx(0.3) and found.metrics["num_updates"] == 2
    assert (found.num_target_tokens, found.num_tokens) == (2, 5)
    nothing = mean_result([], [], 1e-3)
    assert (nothing.loss, nothing.grad_norm, nothing.metrics) == (0.0, 0.0, {"num_updates": 0})


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("base") / "model", "qwen3")


def recipe(base: Path, *overrides: str) -> Recipe:
    return load_recipe(RECIPE, [f"policy.model_name={base}", *overrides]).recipe


SERVERS = [
    "policy.generation.colocated.enabled=false",
    "policy.generation.servers.urls=['http://one:8000', 'http://two:8000']",
]
CORRECTED = ["loss_fn.use_importance_sampling_correction=true"]
REFUSALS: dict[str, tuple[list[str], str]] = {
    "one answer": (
        ["grpo.num_generations_per_prompt=1", "grpo.num_prompts_per_step=16", "policy.train_global_batch_size=16"],
        "num_generations_per_prompt=1",
    ),
    "unknown reward": (
        ["env.reward_functions=[{kind: python, function: 'no_such_module:f'}]"],
        "there is no module 'no_such_module'",
    ),
    "greedy": (["policy.generation.temperature=0"], "draws the same answer"),
    "rank": (
        ["policy.megatron_cfg.peft.dim=64", "policy.generation.vllm_kwargs={max_lora_rank: 32}"],
        "rank 64 is above vLLM's max_lora_rank 32",
    ),
    "vllm tp": (["policy.generation.vllm_cfg.tensor_parallel_size=3"], "does not divide the 2 processes"),
    "too long for the trainer": (["policy.generation.vllm_cfg.max_model_len=65"], "max_model_len=65"),
    "adapter without one": (
        [
            "policy.megatron_cfg.peft.enabled=false",
            "policy.generation.refit=adapter",
            "loss_fn.reference_policy_kl_penalty=0",
        ],
        "set it to merge",
    ),
    "no reference": (
        ["grpo.skip_reference_policy_logprobs_calculation=true", "loss_fn.reference_policy_kl_penalty=1"],
        "needs the reference's log-probabilities",
    ),
    "native on dtensor": (
        ["policy.megatron_cfg.enabled=false", "policy.generation.backend=megatron"],
        "policy.megatron_cfg.enabled",
    ),
    "servers without one": (SERVERS[:1], "needs policy.generation.servers.urls"),
    "servers beside colocated": (SERVERS[1:], "names 2 servers, but policy.generation.colocated.enabled is true"),
    "servers and the training model": ([*SERVERS, "policy.generation.backend=megatron"], "backend=megatron generates"),
    "a server twice": (
        [SERVERS[0], "policy.generation.servers.urls=['http://one:8000', 'http://one:8000']"],
        "each server once",
    ),
    "a server without http": ([SERVERS[0], "policy.generation.servers.urls=['one:8000']"], "as http://host:port"),
    "servers over 4 bits": (
        [*SERVERS, "policy.megatron_cfg.peft.quantization=nf4", "policy.megatron_cfg.peft.lora_dtype=float32"],
        "rollout servers do not take a base in 4 bits",
    ),
    "servers over other fields": (
        [*SERVERS, "policy.hf_config_overrides={rope_theta: 5000.0}"],
        "rollout servers do not take policy.hf_config_overrides",
    ),
    "rank beyond the servers": (
        [*SERVERS, "policy.megatron_cfg.peft.dim=64", "policy.generation.vllm_kwargs={max_lora_rank: 32}"],
        "rank 64 is above vLLM's max_lora_rank 32",
    ),
    "asynchronous without servers": (["grpo.async_grpo.enabled=true"], "colocated.enabled=false"),
    "asynchronous, no server named": ([SERVERS[0], "grpo.async_grpo.enabled=true"], "needs policy.generation.servers"),
    "an age without a correction": (
        [*SERVERS, "grpo.async_grpo={enabled: true, max_trajectory_age_steps: 2}"],
        "max_trajectory_age_steps=2 trains on answers of older weights",
    ),
    "asynchronous dynamic sampling": (
        [*SERVERS, *CORRECTED, "grpo.async_grpo.enabled=true", "grpo.use_dynamic_sampling=true"],
        "cannot be asked ahead",
    ),
    "a correction twice": ([*CORRECTED, "loss_fn.proximal_policy=rollout"], "proximal_policy=rollout corrects by"),
    "contradiction": (["loss_fn.sequence_level_importance_ratios=true"], "token_level_loss=false"),
    "shaping": (
        ["grpo.reward_scaling={enabled: true, source_min: 1.0, source_max: 1.0}"],
        "reward_scaling.source_max=1.0",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refused_before_weights_load(name: str, base: Path) -> None:
    overrides, text = REFUSALS[name]
    world = World(rank=0, size=2, local_rank=0, device=torch.device("cpu"))
    with pytest.raises(UserError) as error:
        GRPO().check(recipe(base, *overrides), world)
    assert text in str(error.value)


@pytest.mark.parametrize(
    "overrides",
    [
        [*CORRECTED, "grpo.async_grpo={enabled: true, max_trajectory_age_steps: 4}"],
        ["loss_fn.proximal_policy=rollout", "grpo.async_grpo={enabled: true, in_flight_weight_updates: true}"],
        ["grpo.async_grpo={enabled: true, max_trajectory_age_steps: 0}"],
    ],
)
def test_answers_asked_ahead_are_accepted_with_a_correction(base: Path, overrides: list[str]) -> None:
    GRPO().check(recipe(base, *SERVERS, *overrides), World(rank=0, size=2, local_rank=0, device=torch.device("cpu")))


def test_an_age_below_zero_is_refused(base: Path) -> None:
    with pytest.raises(UserError, match=r"async_grpo\.max_trajectory_age_steps"):
        recipe(base, "grpo.async_grpo.max_trajectory_age_steps=-1")


def test_the_recipe_itself_is_accepted(base: Path) -> None:
    GRPO().check(recipe(base), World(rank=0, size=2, local_rank=0, device=torch.device("cpu")))


def test_servers_have_a_vllm_and_a_size_of_their_own(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "vllm" else find(name, *rest))
    world = World(rank=0, size=2, local_rank=0, device=torch.device("cpu"))
    GRPO().check(recipe(base, *SERVERS, "policy.generation.vllm_cfg.tensor_parallel_size=4"), world)


def test_vllm_missing_names_the_command(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "vllm" else find(name, *rest))
    with pytest.raises(UserError, match="make install EXTRAS=rollout-cpu"):
        GRPO().check(recipe(base), World(rank=0, size=2, local_rank=0, device=torch.device("cpu")))


@pytest.mark.parametrize(("overrides", "limit"), [([], 63), (["data.max_input_seq_length=20"], 20)])
def test_a_prompt_leaves_room_for_an_answer(base: Path, overrides: list[str], limit: int) -> None:
    assert longest_prompt(recipe(base, *overrides)) == limit


def test_validation_reads_its_first_prompts(base: Path) -> None:
    values: Any = recipe(base, "data.validation={dataset_name: arithmetic}", "grpo.max_val_samples=2")
    prompts: Any = ["a", "b", "c"]
    values.grpo.num_prompts_per_step, values.grpo.use_dynamic_sampling = 1, False
    _, validation = build_prompt_loaders(values, prompts, prompts)
    assert validation is not None
    assert [prompt for batch in validation for prompt in batch] == ["a", "b"]


def test_pass_k_is_the_share_of_prompts_with_a_right_answer() -> None:
    groups = [group([0.0, 1.0, 0.0], [1, 1, 1]), group([0.0, 0.0, 0.0], [1, 1, 1])]
    specs = [RewardSpec("format", "look"), RewardSpec("exact", "right")]
    assert pass_k(groups, specs) == 0.5 and accuracy(groups, specs) == pytest.approx(1 / 6)
    assert pass_k(groups, [RewardSpec("format", "look")]) == 0.5


def test_the_answer_at_the_end_of_a_run_is_cut() -> None:
    shown: list[Any] = []
    session: Any = SimpleNamespace(step=7, reporter=SimpleNamespace(table=lambda *cells: shown.append(cells)))
    found = group([1.0, 0.0], [2, 1])
    found.samples[0] = replace(found.samples[0], text="x" * 500)
    show_answer(session, found)
    [(title, columns, [row])] = shown
    assert title == "an answer of step 7" and len(columns) == len(row)
    assert row[0] == "1+1=" and row[1] == "x" * 400 + "..." and row[3] == 2.0


STOPS = ["grpo.stop_at_validation_metric=accuracy", "grpo.stop_at_validation_threshold=0.5"]


def test_a_validation_that_is_good_enough_ends_the_run(base: Path) -> None:
    stops = recipe(base, *STOPS)
    session: Any = SimpleNamespace(metrics={}, state={}, recipe=stops)
    assert stop_reason(session) == ""
    session.metrics = {("validation", "accuracy"): 0.4, ("train", "accuracy"): 1.0}
    assert stop_reason(session) == ""
    session.metrics = {("validation", "accuracy"): 0.5}
    assert "accuracy is 0.5, at least grpo.stop_at_validation_threshold=0.5" in stop_reason(session)
    # The run that goes on from its checkpoint has validated nothing yet.
    resumed: Any = SimpleNamespace(metrics={}, state=dict(session.state), recipe=stops)
    assert stop_reason(resumed)
    resumed.recipe = recipe(base)
    assert not stop_reason(resumed)
    resumed.recipe = stops
    stops.rollouts.stop_at_validation_threshold = 0.9
    assert stop_reason(resumed) == ""


def test_the_loop_validates_from_its_first_step_on_and_ends_early() -> None:
    done: list[tuple[int, str]] = []
    session: Any = SimpleNamespace(
        step=0,
        total_steps=20,
        loader=SimpleNamespace(state_dict=dict),
        reporter=SimpleNamespace(message=lambda text: done.append((session.step, text))),
        should_stop=lambda: False,
        out_of_time=lambda: False,
        save_if_due=lambda force: done.append((session.step, "saved")) if force else None,
        finish=lambda: None,
    )

    def step() -> None:
        session.step += 1

    options: Any = SimpleNamespace(val_at_start=False, val_at_end=True, val_period=2)
    validated: list[int] = []
    run_steps(
        session,
        options,
        step,
        lambda: validated.append(session.step),
        first_validation=5,
        stop_reason=lambda: "good" if session.step >= 8 else "",
    )
    (first, start), *rest = done
    assert first == 1 and start.startswith("the first step was done ")
    assert validated == [6, 8] and rest == [(8, "the run ends after step 8: good"), (8, "saved")]
    done.clear()
    session.step, session.out_of_time = 8, lambda: session.step >= 10
    session.recipe = SimpleNamespace(checkpointing=CheckpointingConfig(checkpoint_must_save_by="00:03:45:00"))
    run_steps(session, options, step, lambda: validated.append(session.step))
    assert [number for number, _ in done] == [9, 10, 10] and done[1][1] == "saved"
    assert "after step 10: checkpointing.checkpoint_must_save_by=00:03:45:00 leaves no time" in done[2][1]


def test_the_time_for_another_step() -> None:
    assert CheckpointingConfig(checkpoint_must_save_by="01:02:03:04").seconds_to_save == 93784
    with pytest.raises(ValidationError, match="such as 00:03:45:00"):
        CheckpointingConfig(checkpoint_must_save_by="3h")
    with pytest.raises(ValidationError, match="would end the run and save nothing; set enabled=true"):
        CheckpointingConfig(checkpoint_must_save_by="00:03:45:00", enabled=False)
    names = [name for name in Session.__dataclass_fields__ if name not in ("step", "state", "metrics", "world")]
    unused: dict[str, Any] = {name: None for name in names if not name.startswith("_")}
    session = Session(**unused, world=World.alone())
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        session.recipe = recipe_of_limit(None)
        assert not session.out_of_time()
        session.recipe, session._first_step, session.step = recipe_of_limit("0:0:1:40"), 2, 6
        for elapsed, is_over in ((70, False), (81, True), (101, True)):  # a step takes a fourth of it on average
            session._began = time.monotonic() - elapsed
            assert session.out_of_time() == is_over
    finally:
        dist.destroy_process_group()


def recipe_of_limit(limit: str | None) -> Any:
    return SimpleNamespace(checkpointing=CheckpointingConfig(checkpoint_must_save_by=limit))


@pytest.mark.parametrize(
    ("metric", "message"),
    [("acuracy", "did you mean accuracy"), ("loss", "validation does not log it"), ("accuracy", "has no validation")],
)
def test_a_metric_that_could_never_end_the_run_is_refused(base: Path, metric: str, message: str) -> None:
    values = recipe(base, f"grpo.stop_at_validation_metric={metric}", "grpo.stop_at_validation_threshold=0.5")
    with pytest.raises(UserError, match=message):
        check_stop_metric(values, has_validation="has no" not in message)


def test_recipe_values_are_whole(base: Path) -> None:
    values: Any = recipe(base)
    samples = values.grpo.num_prompts_per_step * values.grpo.num_generations_per_prompt
    assert samples % values.policy.train_global_batch_size == 0
