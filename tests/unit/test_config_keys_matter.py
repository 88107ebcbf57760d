"""Each key changes something: it is set to another value, and what a run computes from it must differ.

Keys of the loss, the advantages, rewards, sampling and rows are turned one by one; keys that leave a run's numbers
alone (outputs, memory, layout) are in `changed_keys.HARMLESS`, are read (test_config_keys_read.py), and have tests that
nothing changes; keys without any effect are in `config/unimplemented.py` and named in a notice.
"""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from objective_batches import mean_loss_and_grads
from test_objectives_dpo import random_pairs
from test_objectives_grpo import random_rows

from megatron_lora.config.loader import check_recipe
from megatron_lora.config.schema import Recipe
from megatron_lora.config.schema_algorithms import (
    AdvantageConfig,
    DpoConfig,
    GrpoConfig,
    RewardScalingConfig,
    RewardShapingConfig,
)
from megatron_lora.config.schema_data import DatasetConfig
from megatron_lora.config.schema_env import RewardFunctionConfig
from megatron_lora.config.schema_generation import GenerationConfig
from megatron_lora.config.schema_loss import OF_DISTILLATION, LossFnConfig
from megatron_lora.config.schema_tree import walk_fields
from megatron_lora.data.dataset import Prompt
from megatron_lora.data.prepare import prepare_data
from megatron_lora.objectives.dpo import DPOConfig, DPOObjective
from megatron_lora.objectives.estimators import Estimator
from megatron_lora.objectives.grpo import GRPOObjective, set_positive_example_weights
from megatron_lora.objectives.grpo_config import GRPOConfig
from megatron_lora.rollout.generator import Sample, SamplingOptions
from megatron_lora.rollout.rewards import RewardOutcome, RewardRunner, RewardSample, RewardSpec
from megatron_lora.trainers.changed_keys import HARMLESS
from megatron_lora.trainers.rollout_batch import Group, shaped_rewards
from tools.tiny_model import build_tokenizer

# Key -> (what else has to be set for it to matter, its other value).
Turns = dict[str, tuple[dict[str, Any], Any]]
CORRECTED = {"use_importance_sampling_correction": True}
TRUNCATED = CORRECTED | {"truncated_importance_sampling_type": "icepop", "truncated_importance_sampling_ratio": 1.1}

LOSS: Turns = {
    "ratio_clip_min": ({}, 0.01),
    "ratio_clip_max": ({}, 0.01),
    "ratio_clip_c": ({}, 1.01),
    "token_level_loss": ({}, False),
    "length_normalization": ({}, False),
    "sequence_level_importance_ratios": ({"token_level_loss": False}, True),
    "reference_policy_kl_penalty": ({}, 0.5),
    "reference_policy_kl_type": ({}, "k1"),
    "kl_input_clamp_value": ({}, 0.1),
    "kl_output_clamp_value": ({}, 0.01),
    "use_kl_in_reward": ({}, True),
    "use_on_policy_kl_approximation": ({}, True),
    "disable_ppo_ratio": ({}, True),
    "force_on_policy_ratio": ({}, True),
    "use_cispo": ({}, True),
    "positive_example_nll_weight": ({}, 0.1),
    "use_importance_sampling_correction": ({}, True),
    "proximal_policy": ({}, "rollout"),
    "truncated_importance_sampling_type": (TRUNCATED | {"truncated_importance_sampling_ratio_min": 0.9}, "tis"),
    "truncated_importance_sampling_ratio": (TRUNCATED | {"truncated_importance_sampling_ratio_min": 0.5}, 5.0),
    "truncated_importance_sampling_ratio_min": (TRUNCATED | {"truncated_importance_sampling_ratio_min": 0.1}, 0.95),
}
DPO: Turns = {
    "loss_type": ({}, "ipo"),
    "label_smoothing": ({}, 0.2),
    "reference_policy_kl_penalty": ({}, 0.5),
    "preference_loss_weight": ({}, 2.0),
    "sft_loss_weight": ({}, 0.3),
    "preference_average_log_probs": ({}, True),
    "sft_average_log_probs": ({"sft_loss_weight": 0.3}, True),
}
ESTIMATOR: Turns = {
    "name": ({}, "rloo"),
    "normalize_rewards": ({}, False),
    "use_leave_one_out_baseline": ({}, False),
    "minus_baseline": ({"name": "reinforce_plus_plus"}, False),
    "gae_gamma": ({"name": "gae"}, 0.9),
    "gae_lambda": ({"name": "gae"}, 0.9),
    "whiten_rewards": ({"name": "gae", "whiten_advantages": False}, True),
    "whiten_advantages": ({"name": "gae"}, False),
}
SHAPED = {"enabled": True, "max_response_length": 8, "overlong_buffer_length": 6}
SHAPING: Turns = {
    "enabled": (SHAPED | {"enabled": False}, True),
    "max_response_length": (SHAPED, 7),
    "overlong_buffer_length": (SHAPED, 4),
    "overlong_buffer_penalty": (SHAPED, 3.0),
    "stop_properly_penalty_coef": (SHAPED, 0.5),
}
SCALING: Turns = {
    "enabled": ({"target_max": 2.0}, True),
    "source_min": ({"enabled": True}, -1.0),
    "source_max": ({"enabled": True}, 2.0),
    "target_min": ({"enabled": True}, -1.0),
    "target_max": ({"enabled": True}, 3.0),
}
SAMPLING: Turns = {
    "max_new_tokens": ({}, 3),
    "temperature": ({}, 0.5),
    "top_p": ({}, 0.5),
    "top_k": ({}, 5),
    "val_temperature": ({}, 0.0),
    "val_top_p": ({}, 0.5),
    "val_top_k": ({}, 5),
    "stop_token_ids": ({}, [7]),
    "stop_strings": ({}, ["x"]),
}
# Who generates and on what, which other tests run: no matter of the answers' distribution.
ENGINE = {"backend", "refit", "vllm_cfg", "vllm_kwargs", "colocated", "servers"}
REWARD: Turns = {
    "kind": ({"kind": "exact"}, "gsm8k"),
    "name": ({"kind": "exact"}, "another"),
    "weight": ({"kind": "exact"}, 0.5),
    "timeout_seconds": ({"kind": "python", "function": "time:sleep"}, 0.5),
    "pattern": ({"kind": "format", "pattern": "4.*"}, "5.*"),
    "max_tokens": ({"kind": "length", "max_tokens": 100}, 2),
    "function": ({"kind": "python", "function": "operator:length_hint"}, "operator:truth"),
    "kwargs": ({"kind": "python", "function": "functools:reduce", "kwargs": {"initial": 0}}, {"initial": 1}),
}


def turned(table: Turns, key: str) -> tuple[dict[str, Any], dict[str, Any]]:
    context, value = table[key]
    return context, context | {key: value}


def grpo_loss(**keys: Any) -> Any:
    config = GRPOConfig.from_config(LossFnConfig.model_validate(keys), max_new_tokens=11)
    objective = GRPOObjective(config)
    rows = random_rows(8, seed=3, noise=0.6)
    set_positive_example_weights(rows, objective)
    loss, grads = mean_loss_and_grads(objective, [rows])
    return loss, torch.cat(grads).tolist()


def dpo_loss(**keys: Any) -> Any:
    objective = DPOObjective(DPOConfig.from_config(DpoConfig.model_validate(keys)))
    loss, grads = mean_loss_and_grads(objective, [random_pairs(4, seed=1)])
    return loss, torch.cat(grads).tolist()


def estimated(**keys: Any) -> Any:
    estimator = Estimator.from_config(GrpoConfig.model_validate({"adv_estimator": keys}).adv_estimator)
    advantages = estimator.within_groups(torch.tensor([[1.0, 0.0, 0.5], [4.0, 3.0, 3.0]])).advantages
    if estimator.gae is not None:
        rewards = [torch.tensor([0.0, value]) for value in advantages.flatten().tolist()]
        values, both = [torch.tensor([0.2, 0.5])] * 6, [torch.ones(2, dtype=torch.bool)] * 6
        return torch.stack(estimator.gae(rewards, values, both)[0]).tolist()
    masks = [torch.ones(1, dtype=torch.bool)] * 6
    return [float(value) for value in estimator.over_tokens(list(advantages.flatten()[:, None]), masks, [True] * 6)]


def rewarded(section: str, **keys: Any) -> Any:
    config = GrpoConfig.model_validate({section: keys})
    config.reward_shaping.max_response_length = config.reward_shaping.max_response_length or 8
    samples = [Sample(0, [1], list(range(n)), torch.zeros(n), "length", "", 0) for n in (3, 7, 8)]
    outcomes = [RewardOutcome(total=value, values={}, errors={}) for value in (0.0, 0.5, 1.5)]
    return shaped_rewards([Group(Prompt(torch.tensor([1]), "", "", index=1), samples, outcomes)], config).tolist()


def drawn(**keys: Any) -> Any:
    config = GenerationConfig.model_validate(keys)
    return [
        SamplingOptions.from_config(
            config, max_total_sequence_length=64, eos_token_ids=[2], seed=1, validation=validation
        )
        for validation in (False, True)
    ]


def reward(**keys: Any) -> Any:
    spec = RewardSpec.from_config(RewardFunctionConfig.model_validate(keys))
    if spec.kind == "python":  # calling is test_rewards_calling.py's
        return spec
    with RewardRunner([spec]) as runner:
        [outcome] = runner([RewardSample("2+2=", "4", "#### 4", {"num_tokens": 3})])
    return outcome


CASES: list[tuple[str, type, Turns, Any, set[str]]] = [
    ("loss_fn", LossFnConfig, LOSS, grpo_loss, set(OF_DISTILLATION)),
    ("dpo", DpoConfig, DPO, dpo_loss, set(DpoConfig.model_fields) - set(DPO)),
    ("grpo.adv_estimator", AdvantageConfig, ESTIMATOR, estimated, set()),
    ("grpo.reward_shaping", RewardShapingConfig, SHAPING, lambda **k: rewarded("reward_shaping", **k), set()),
    ("grpo.reward_scaling", RewardScalingConfig, SCALING, lambda **k: rewarded("reward_scaling", **k), set()),
    ("policy.generation", GenerationConfig, SAMPLING, drawn, ENGINE),
    ("env.reward_functions", RewardFunctionConfig, REWARD, reward, set()),
]


@pytest.mark.parametrize(
    ("section", "key", "table", "compute"),
    [(section, key, table, compute) for section, _, table, compute, _ in CASES for key in table],
    ids=[f"{section}.{key}" for section, _, table, _, _ in CASES for key in table],
)
def test_another_value_gives_another_result(section: str, key: str, table: Turns, compute: Any):
    before, after = turned(table, key)
    first = compute(**before)
    assert compute(**after) != first, f"{section}.{key} changes nothing"
    assert compute(**before) == first


@pytest.mark.parametrize(("section", "model", "table", "elsewhere"), [(s, m, t, e) for s, m, t, _, e in CASES])
def test_every_key_of_these_sections_is_turned(section: str, model: Any, table: Turns, elsewhere: set[str]):
    assert set(table) | elsewhere == set(model.model_fields), section


ROWS = [{"question": f"{i}+{i}=", "other": f"{i}?", "answer": str(2 * i), "reply": "x" * i} for i in range(1, 12)]
DATA: Turns = {
    "input_key": ({"input_key": "question", "output_key": "answer"}, "other"),
    "output_key": ({"input_key": "question", "output_key": "answer"}, "reply"),
    "data_path": ({}, "second.jsonl"),
    "max_samples": ({}, 4),
    "split_validation_size": ({}, 0.3),
    "seed": ({"max_samples": 4, "seed": 1}, 2),
    "prompt_file": ({}, "around.txt"),
    "system_prompt_file": ({}, "system.txt"),
    "also": ({}, [{"data_path": "second.jsonl"}]),
}
# Columns of other forms, names of hub data sets: test_data_*.py.
OTHER_FORMS = set(
    "dataset_name subset split chosen_key rejected_key prompt_key chat_key system_key tool_key form repeat".split()
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    build_tokenizer().save_pretrained(folder / "tokenizer")
    for name, rows in (("first", ROWS), ("second", ROWS[3:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "around.txt").write_text("Reckon: {}")
    (folder / "system.txt").write_text("Be brief.")
    return folder


def tokens(folder: Path, **keys: Any) -> Any:
    def placed(value: Any) -> Any:
        if isinstance(value, list):
            return [{name: placed(inner) for name, inner in item.items()} for item in value]
        return str(folder / value) if isinstance(value, str) and value.endswith((".jsonl", ".txt")) else value

    train = {"data_path": str(folder / "first.jsonl")} | {name: placed(value) for name, value in keys.items()}
    policy = {"model_name": str(folder / "tokenizer"), "train_global_batch_size": 1}
    data = prepare_data(check_recipe({"policy": policy, "data": {"train": train}, "sft": {}}).recipe)
    return [[data.train[i][0].input_ids.tolist() for i in range(len(data.train))], data.validation is None]


@pytest.mark.parametrize("key", DATA)
def test_another_value_gives_other_rows(folder: Path, key: str):
    before, after = turned(DATA, key)
    assert tokens(folder, **after) != tokens(folder, **before)
    assert set(DATA) | OTHER_FORMS == set(DatasetConfig.model_fields)


def test_what_is_harmless_is_read_and_the_rest_would_be_told_at_a_resume():
    """What is said not to change a run's numbers is there; of all other keys a resume says that they change it."""
    known = [path for path, _ in walk_fields(Recipe)]
    for pattern in HARMLESS:
        assert any(re.fullmatch(pattern, path) for path in known), pattern
    harmless = [path for path in known if any(re.fullmatch(pattern, path) for pattern in HARMLESS)]
    assert 50 < len(harmless) < len(known) / 2
    for section, _, table, _, _ in CASES[:5]:
        assert not {f"{section}.{key}" for key in table} & set(harmless), section
