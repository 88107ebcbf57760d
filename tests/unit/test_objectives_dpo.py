import math
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from objective_batches import make_row, mean_loss_and_grads, pack, policy_logps
from torch.nn import functional as F

from megatron_lora.config.schema_algorithms import DpoConfig
from megatron_lora.errors import UserError
from megatron_lora.objectives.dpo import DPOConfig, DPOObjective, dpo_loss


def random_pairs(num_pairs: int, seed: int = 0) -> list:
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for i in range(2 * num_pairs):
        targets = int(torch.randint(2, 7, (1,), generator=generator))
        policy = -torch.rand(targets, generator=generator, dtype=torch.float64) * 3
        reference = policy + torch.randn(targets, generator=generator, dtype=torch.float64) * 0.5
        rows.append(make_row(targets + 2 + i % 3, targets, i, policy=policy, reference_logps=reference))
    return rows


def test_sigmoid_by_hand():
    # chosen: log ratio 1, rejected: log ratio -1, so the margin is 2; beta 0.5 gives -log sigmoid(1) = log(1 + 1/e).
    loss = dpo_loss(torch.tensor([[-3.0, -5.0]]), torch.tensor([[-4.0, -4.0]]), beta=0.5)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-1)), rel=1e-6)


def test_label_smoothing_by_hand():
    # 0.9 log(1 + 1/e) + 0.1 log(1 + e)
    loss = dpo_loss(torch.tensor([[-3.0, -5.0]]), torch.tensor([[-4.0, -4.0]]), beta=0.5, label_smoothing=0.1)
    expected = 0.9 * math.log(1 + math.exp(-1)) + 0.1 * math.log(1 + math.e)
    assert loss.item() == pytest.approx(expected, rel=1e-6)


def test_ipo_by_hand():
    # margin 2, 1 / (2 * 0.5) = 1, so the loss is (2 - 1)^2.
    loss = dpo_loss(torch.tensor([[-3.0, -5.0]]), torch.tensor([[-4.0, -4.0]]), beta=0.5, loss_type="ipo")
    assert loss.item() == pytest.approx(1.0)


def test_shapes_must_agree():
    with pytest.raises(ValueError, match=r"\[pairs, 2\]"):
        dpo_loss(torch.zeros(2, 2), torch.zeros(3, 2), beta=0.1)


def test_objective_by_hand_with_sft():
    # Sums: chosen -1 - 2 = -3 against -4, rejected -5 against -4: margin 2, beta 0.5.
    rows = [
        make_row(4, 2, 0, policy=torch.tensor([-1.0, -2.0]), reference_logps=torch.tensor([-2.0, -2.0])),
        make_row(3, 1, 1, policy=torch.tensor([-5.0]), reference_logps=torch.tensor([-4.0])),
    ]
    batch = pack(rows, padding=3)
    config = DPOConfig(0.5, sft_loss_weight=0.1, preference_loss_weight=2.0)
    result = DPOObjective(config)(policy_logps(rows, batch), batch)
    preference = math.log(1 + math.exp(-1))
    assert result.loss.item() == pytest.approx(2 * preference + 0.1 * 3, rel=1e-6)
    metrics = {name: float(value) for name, value in result.metrics.items()}
    assert metrics == pytest.approx(
        {
            "preference_loss": preference,
            "sft_loss": 3.0,
            "accuracy": 1.0,
            "rewards_chosen": 0.5,
            "rewards_rejected": -0.5,
            "reward_margin": 1.0,
        }
    )
    averaged = DPOConfig(0.5, preference_average_log_probs=True, sft_average_log_probs=True, sft_loss_weight=1.0)
    result = DPOObjective(averaged)(policy_logps(rows, batch), batch)
    # Means: chosen ratio 0.5, rejected -1: beta * 1.5 = 0.75; SFT: 3 / 2.
    assert result.loss.item() == pytest.approx(math.log(1 + math.exp(-0.75)) + 1.5, rel=1e-6)


@pytest.mark.parametrize(
    "config",
    [
        DPOConfig(0.3),
        DPOConfig(0.3, label_smoothing=0.2, preference_average_log_probs=True),
        DPOConfig(0.3, sft_loss_weight=0.5, sft_average_log_probs=True),
        DPOConfig(0.3, loss_type="ipo"),
    ],
)
def test_gradient(config):
    rows = random_pairs(2)
    batch = pack(rows)
    objective = DPOObjective(config)
    logps = policy_logps(rows, batch)
    assert torch.autograd.gradcheck(lambda x: objective(x, batch).loss, (logps,))


@pytest.mark.parametrize("config", [DPOConfig(0.3, sft_loss_weight=0.5), DPOConfig(0.2, loss_type="ipo")])
def test_micro_batches_and_padding_do_not_matter(config):
    rows = random_pairs(3)
    objective = DPOObjective(config)
    whole, whole_grads = mean_loss_and_grads(objective, [rows])
    split, split_grads = mean_loss_and_grads(objective, [rows[:2], rows[2:]], padding=5)
    assert split == pytest.approx(whole, rel=1e-12)
    for a, b in zip(whole_grads, split_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=0)


def test_pair_without_targets_is_left_out():
    rows = random_pairs(2)
    rows[1].target_mask[:] = False
    objective = DPOObjective(DPOConfig(0.3, sft_loss_weight=1.0))
    assert objective.count(rows) == 1
    loss, grads = mean_loss_and_grads(objective, [rows])
    assert loss == pytest.approx(mean_loss_and_grads(objective, [rows[2:]])[0], rel=1e-12)
    assert grads[0].abs().sum() == 0


def test_padding_between_pairs_and_odd_rows():
    rows = random_pairs(2)
    padded = [*rows[:2], make_row(3, 0, -1, policy=torch.zeros(0), reference_logps=torch.zeros(0)), *rows[2:]]
    objective = DPOObjective(DPOConfig(0.3))
    assert objective.count(padded) == 2
    batch, plain = pack(padded), pack(rows)
    a, b = objective(policy_logps(padded, batch), batch), objective(policy_logps(rows, plain), plain)
    assert a.loss.item() == pytest.approx(b.loss.item())
    with pytest.raises(ValueError, match="whole pairs"):
        objective(policy_logps(rows[:3], pack(rows[:3])), pack(rows[:3]))
    with pytest.raises(ValueError, match="pairs"):
        objective.count(rows[:3])


@pytest.mark.parametrize(
    "wrong",
    [
        {"reference_policy_kl_penalty": 0.0},
        {"loss_type": "hinge"},
        {"label_smoothing": 0.5},
        {"label_smoothing": 0.1, "loss_type": "ipo"},
        {"sft_loss_weight": -1.0},
        {"preference_loss_weight": 0.0},
    ],
)
def test_bad_settings(wrong: dict[str, Any]):
    with pytest.raises(UserError, match="dpo"):
        DPOConfig(**wrong)


def test_from_recipe():
    assert DPOConfig.from_config(DpoConfig()) == DPOConfig()
    section = DpoConfig(preference_average_log_probs=True, loss_type="ipo")
    assert DPOConfig.from_config(section) == DPOConfig(
        preference_average_log_probs=True, sft_average_log_probs=True, loss_type="ipo"
    )


def trl_dpo_loss(rows, loss_type: str, beta: float, label_smoothing: float = 0.0):
    """TRL's own loss method on the same log-probabilities; stand-ins hold what it reads of model and trainer."""
    from trl.trainer.dpo_trainer import DPOTrainer

    order = [*rows[::2], *rows[1::2]]
    width = max(len(row) for row in order)

    def grid(name: str):
        values = [torch.where(row.target_mask, row.token_fields[name], 0.0) for row in order]
        return torch.stack([F.pad(v, (0, width - v.numel())) for v in values])

    mask = torch.stack([F.pad(row.target_mask.long(), (0, width - len(row))) for row in order])
    logps = grid("policy")[:, 1:].clone().requires_grad_()
    reference = grid("reference_logps").sum(1)
    outputs = SimpleNamespace(
        log_probs=logps,
        entropy=torch.zeros_like(logps),
        mean_logits=torch.zeros_like(logps),
        is_top1=torch.zeros_like(logps, dtype=torch.bool),
    )
    accelerator = SimpleNamespace(
        device=torch.device("cpu"), gather=lambda value: value, gather_for_metrics=lambda value: value
    )
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=accelerator,
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=[loss_type],
        loss_weights=[1.0],
        beta=beta,
        label_smoothing=label_smoothing,
        use_weighting=False,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    num_pairs = len(rows) // 2
    inputs = {
        "input_ids": torch.zeros_like(mask),
        "attention_mask": torch.ones_like(mask),
        "completion_mask": mask,
        "ref_chosen_logps": reference[:num_pairs],
        "ref_rejected_logps": reference[num_pairs:],
    }
    loss = DPOTrainer._compute_loss(trainer, lambda **kwargs: outputs, inputs, return_outputs=False)  # pyright: ignore
    loss.backward()
    assert logps.grad is not None
    grads = {id(row): logps.grad[i][: len(row) - 1] for i, row in enumerate(order)}
    return float(loss), [grads[id(row)] for row in rows], trainer._metrics["train"]


@pytest.mark.parametrize(
    "num_pairs, trl_type, smoothing, config",
    [
        (4, "sigmoid", 0.0, DPOConfig(0.3)),
        (4, "sigmoid_norm", 0.0, DPOConfig(0.3, preference_average_log_probs=True)),
        (4, "ipo", 0.0, DPOConfig(0.3, loss_type="ipo")),
        # TRL smooths labels in AOT, which sorts the margins; with one pair there is nothing to sort.
        (1, "aot_unpaired", 0.2, DPOConfig(0.3, label_smoothing=0.2)),
    ],
)
def test_equals_trl(num_pairs, trl_type, smoothing, config):
    rows = random_pairs(num_pairs, seed=3)
    loss, grads, metrics = trl_dpo_loss(rows, trl_type, 0.3, smoothing)
    ours, our_grads = mean_loss_and_grads(DPOObjective(config), [rows])
    assert ours == pytest.approx(loss, rel=1e-9)
    for row, mine, theirs in zip(rows, our_grads, grads, strict=True):
        targets = row.target_mask[1:]  # TRL relies on the model to return zeros elsewhere
        torch.testing.assert_close(mine[:-1][targets], theirs[targets], rtol=1e-9, atol=1e-12)
    if trl_type == "sigmoid":
        batch = pack(rows)
        sums = DPOObjective(config)(policy_logps(rows, batch), batch).metrics
        for name, theirs in {
            "accuracy": "rewards/accuracies",
            "rewards_chosen": "rewards/chosen",
            "rewards_rejected": "rewards/rejected",
            "reward_margin": "rewards/margins",
        }.items():
            assert float(sums[name]) / num_pairs == pytest.approx(metrics[theirs][0], rel=1e-6), name
