"""GRPO's loss and gradient against TRL's own loss method on the same tensors."""

from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from data_tokenizers import build_tokenizer
from datasets import Dataset
from objective_batches import mean_loss_and_grads, pack, policy_logps
from test_objectives_grpo import random_rows
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_lora.objectives.advantages import group_advantages
from megatron_lora.objectives.estimators import Estimator
from megatron_lora.objectives.grpo import GRPOObjective
from megatron_lora.objectives.grpo_config import GRPOConfig
from tests.support.models import family_config

pytestmark = pytest.mark.slow


def trl_grpo_loss(rows, loss_type="dapo", level="token", beta=0.0, delta=None, weights=False, constant=0):
    """`GRPOTrainer._compute_loss` with stand-ins for what it reads of model, accelerator and configuration. Returns
    the loss and d loss / d log-probabilities of each row's targets, and the metrics it logged."""
    from trl.trainer.grpo_trainer import GRPOTrainer

    width = max(row.num_targets for row in rows)

    def grid(name: str) -> Tensor:
        out = torch.zeros(len(rows), width, dtype=torch.float64)
        for i, row in enumerate(rows):
            out[i, : row.num_targets] = row.token_fields[name][row.target_mask]
        return out

    mask = torch.zeros(len(rows), width, dtype=torch.int64)
    for i, row in enumerate(rows):
        mask[i, : row.num_targets] = 1
    logps = grid("policy").requires_grad_()
    inputs = {
        "prompt_ids": torch.zeros(len(rows), 1, dtype=torch.int64),
        "prompt_mask": torch.ones(len(rows), 1, dtype=torch.int64),
        "completion_ids": torch.zeros_like(mask),
        "completion_mask": mask,
        "advantages": torch.stack([row.token_fields["advantages"][row.target_mask][0] for row in rows]),
        "old_per_token_logps": grid("old_logps"),
        "ref_per_token_logps": grid("reference_logps"),
        "importance_sampling_ratio": (grid("old_logps") - grid("rollout_logps")).exp().clamp(max=2.0),
        "num_items_in_batch": mask.sum(),
    }
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *args, **kwargs: (logps, torch.zeros_like(logps), None),
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level=level,
        beta=beta,
        args=SimpleNamespace(use_bias_correction_kl=beta != 0, delta=delta, steps_per_generation=1),
        loss_type=loss_type,
        epsilon_low=0.2,
        epsilon_high=1.2 if loss_type == "cispo" else 0.3,
        use_vllm=weights,
        vllm_importance_sampling_correction=weights,
        model=SimpleNamespace(training=True),
        current_gradient_accumulation_steps=1,
        max_completion_length=constant,
        accelerator=SimpleNamespace(num_processes=1, gather=lambda value: value, reduce=lambda value, reduction: value),
        _entropy_bonus_enabled=False,
        _metrics={"train": defaultdict(list)},
    )
    loss = GRPOTrainer._compute_loss(trainer, None, inputs)  # pyright: ignore
    loss.backward()
    assert logps.grad is not None
    grads = [logps.grad[i, : row.num_targets] for i, row in enumerate(rows)]
    return float(loss.detach()), grads, trainer._metrics["train"]


def compare(config: GRPOConfig, rows, expected) -> None:
    loss, grads, _ = expected
    ours, our_grads = mean_loss_and_grads(GRPOObjective(config), [rows])
    assert ours == pytest.approx(loss, rel=1e-9, abs=1e-12)
    for row, mine, theirs in zip(rows, our_grads, grads, strict=True):
        torch.testing.assert_close(mine[:-1][row.target_mask[1:]], theirs, rtol=1e-9, atol=1e-12)


OURS: dict[str, Any] = {"ratio_clip_max": 0.3, "reference_policy_kl_penalty": 0.0}


@pytest.mark.parametrize(
    "ours, trl",
    [
        ({}, {"loss_type": "dapo"}),
        ({"token_level_loss": False}, {"loss_type": "grpo"}),
        ({"constant_length": 11}, {"loss_type": "dr_grpo", "constant": 11}),
        ({"ratio_clip_c": 1.5}, {"loss_type": "dapo", "delta": 1.5}),
        (
            {"token_level_loss": False, "sequence_level_importance_ratios": True},
            {"loss_type": "grpo", "level": "sequence"},
        ),
        # TRL's CISPO has no lower bound and counts its upper bound from 0.
        ({"use_cispo": True, "ratio_clip_min": 1.0, "ratio_clip_max": 0.2}, {"loss_type": "cispo"}),
        (
            {
                "use_importance_sampling_correction": True,
                "truncated_importance_sampling_type": "tis",
                "truncated_importance_sampling_ratio": 2.0,
            },
            {"loss_type": "dapo", "weights": True},
        ),
    ],
    ids=["dapo", "grpo", "dr_grpo", "dual_clip", "gspo", "cispo", "tis"],
)
def test_equals_trl(ours, trl):
    rows = random_rows(6, seed=5, noise=0.6)
    compare(GRPOConfig(**{**OURS, **ours}), rows, trl_grpo_loss(rows, **trl))


def test_kl_equals_trl():
    """TRL's `use_bias_correction_kl` weighs the KL by pi / pi_old, whose gradient at pi_old = pi is the score
    function's term that this project always has."""
    rows = random_rows(4, seed=6)
    for row in rows:
        row.token_fields["old_logps"] = row.token_fields["policy"].clone()
    expected = trl_grpo_loss(rows, beta=0.2)
    config = GRPOConfig(ratio_clip_max=0.3, reference_policy_kl_penalty=0.2)
    compare(config, rows, expected)
    batch, objective = pack(rows), GRPOObjective(config)
    kl = float(objective(policy_logps(rows, batch), batch).metrics["kl"]) / objective.count(rows)
    assert kl == pytest.approx(expected[2]["kl"][0])


def test_clip_fraction_equals_trl():
    rows = random_rows(6, seed=7, noise=0.6)
    metrics = trl_grpo_loss(rows)[2]
    objective, batch = GRPOObjective(GRPOConfig(**OURS)), pack(rows)
    fraction = float(objective(policy_logps(rows, batch), batch).metrics["clip_fraction"]) / objective.count(rows)
    assert fraction > 0
    assert fraction == pytest.approx(metrics["clip_ratio/region_mean"][0], rel=1e-6)


def test_group_normalisation_is_trls_up_to_epsilon():
    # TRL: (r - mean) / (std + 1e-4) with the unbiased std of the group.
    rewards = torch.tensor([[0.0, 1.0, 1.0, 0.5]])
    expected = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
    ours = group_advantages(rewards, normalize=True, leave_one_out=False).advantages
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=0)


def trl_advantages(trainer_class: Any, config_class: Any, folder: Path, rewards: list[float], **options: Any) -> Tensor:
    """The advantages of one step of a real TRL trainer: two prompts, a random model, these rewards. [2, 4]"""
    model = AutoModelForCausalLM.from_config(family_config("qwen3", num_hidden_layers=1, vocab_size=600))
    config = config_class(
        output_dir=str(folder), per_device_train_batch_size=8, num_generations=4, max_completion_length=2, max_steps=1,
        beta=0.0, report_to="none", use_cpu=True, save_strategy="no", disable_tqdm=True, **options,
    )  # fmt: skip
    trainer = trainer_class(
        model=model,
        reward_funcs=lambda completions, **columns: rewards,
        args=config,
        train_dataset=Dataset.from_list([{"prompt": "a"}, {"prompt": "b"}]),
        processing_class=build_tokenizer(),
    )
    trainer.train()
    return torch.tensor(list(trainer._logs["advantages"])).view(2, 4)


@pytest.mark.slow
def test_rloo_and_dr_grpo_have_the_advantages_of_trls_trainers(tmp_path: Path):
    from trl import GRPOConfig as TrlGrpoConfig
    from trl import GRPOTrainer, RLOOConfig, RLOOTrainer

    rewards = [1.0, 0.0, 0.25, 0.5, 3.0, 3.0, 3.0, -1.0]
    grouped = torch.tensor(rewards).view(2, 4)
    found = trl_advantages(RLOOTrainer, RLOOConfig, tmp_path, rewards)
    torch.testing.assert_close(Estimator("others").within_groups(grouped).advantages, found)
    found = trl_advantages(GRPOTrainer, TrlGrpoConfig, tmp_path, rewards, scale_rewards="none", loss_type="dr_grpo")
    torch.testing.assert_close(Estimator("group").within_groups(grouped).advantages, found)
