"""PPO from the command line: a critic beside the policy, its checkpoints, and a run that goes on."""

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_lora.conversion.adapter_checkpoint import read_adapter
from tests.support.runs import adapter_of, assert_names_are_known, metrics, run, save_base

pytestmark = [pytest.mark.timeout(1800), pytest.mark.long]

STEPS = 4
SAME = ("reward", "loss", "grad_norm", "kl", "value_loss", "critic_grad_norm", "explained_variance", "value_mean")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("ppo") / "base")


def recipe(base: Path, **grpo: Any) -> dict[str, Any]:
    """One answer of up to 8 tokens to each prompt, rewarded for digits; by the training model itself at PP=2."""
    return {
        "grpo": {
            "max_num_steps": STEPS,
            "num_prompts_per_step": 16,
            "num_generations_per_prompt": 1,
            "val_period": 0,
            "adv_estimator": {"name": "gae", "gae_lambda": 0.9},
        }
        | grpo,
        "critic": {"optim": {"lr": 1e-2}, "warmup_steps": 1},
        "loss_fn": {"reference_policy_kl_penalty": 0.01, "use_kl_in_reward": True},
        "env": {
            "reward_functions": [{"kind": "python", "name": "digits", "function": "tests.support.rewards:digit_share"}]
        },
        "policy": {
            "model_name": str(base),
            "precision": "float32",
            "train_global_batch_size": 8,
            "train_micro_batch_size": 4,
            "max_total_sequence_length": 32,
            "megatron_cfg": {
                "enabled": True,
                "pipeline_model_parallel_size": 2,
                "peft": {"enabled": True, "dim": 4, "alpha": 8},
                "optimizer": {"lr": 1e-2},
            },
            "generation": {"max_new_tokens": 8, "backend": "megatron"},
        },
        "data": {"train": {"dataset_name": "arithmetic"}},
        "checkpointing": {"save_period": 1, "keep_top_k": None, "metric_name": "train:explained_variance"},
    }


@pytest.fixture(scope="module")
def whole(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("whole"), recipe(base), 2)


def test_the_critic_warms_up_and_then_both_learn(whole: Path) -> None:
    lines = metrics(whole)
    assert [line["num_updates"] for line in lines] == [0, 2, 2, 2]
    assert all(line["critic_grad_norm"] > 0 for line in lines)
    assert lines[-1]["value_loss"] < lines[0]["value_loss"]
    assert max(line["rollout_logprob_error"] for line in lines) < 1e-5
    assert all("zero_variance_groups" not in line for line in lines)
    assert_names_are_known(whole)


def test_the_adapter_is_the_policys_alone(whole: Path) -> None:
    first, last = (adapter_of(whole / f"step_{step}") for step in (1, STEPS))
    assert not any("score" in name for name in last)
    # Nothing of the policy had moved at the end of the warm-up, and the critic had.
    assert not any(value.any() for name, value in first.items() if "lora_B" in name)
    assert all(value.any() for name, value in last.items() if "lora_B" in name)
    _, critic = read_adapter(whole / "step_1" / "critic" / "weights")
    assert all(value.any() for value in critic.values())


def test_a_resumed_run_is_the_same_run(base: Path, whole: Path, tmp_path: Path) -> None:
    run(tmp_path, recipe(base, max_num_steps=2), 2)
    resumed = run(tmp_path, recipe(base), 2)
    found, wanted = ([[line[name] for name in SAME] for line in metrics(folder)] for folder in (resumed, whole))
    assert found == wanted
    for weights in ("policy", "critic"):
        ours, theirs = (read_adapter(folder / f"step_{STEPS}" / weights / "weights")[1] for folder in (resumed, whole))
        assert all(torch.equal(ours[name], value) for name, value in theirs.items())
