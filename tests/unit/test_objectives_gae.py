"""PPO's numbers: advantages and returns from a critic's values, whitening, the critic's loss."""

import math
import statistics
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from objective_batches import make_row, mean_loss_and_grads
from torch import Tensor

from megatron_lora.config.loader import check_recipe
from megatron_lora.data.batch import Row
from megatron_lora.errors import UserError
from megatron_lora.objectives.estimators import Estimator
from megatron_lora.objectives.gae import GAE, explained_variance, reward_at_the_end, row_advantages, whiten
from megatron_lora.objectives.grpo_config import GRPOConfig
from megatron_lora.objectives.value import ValueObjective
from megatron_lora.policy.critic import critic_spec
from megatron_lora.policy.interface import StepResult
from megatron_lora.trainers.ppo import PPOTrainer

WHOLE_NORM = {"enabled": True, "modules_to_save": ["norm"]}
ALL = torch.ones(3, dtype=torch.bool)


def test_three_tokens_by_hand():
    """delta = (0 + 0.9 * 2 - 1, 0 + 0.9 * 3 - 2, 1 - 3) = (0.8, 0.7, -2); with gamma lam = 0.45
    A = (0.8 + 0.45 * -0.2, 0.7 + 0.45 * -2, -2) = (0.71, -0.2, -2)."""
    rewards, values = torch.tensor([0.0, 0.0, 1.0]), torch.tensor([1.0, 2.0, 3.0])
    found = row_advantages(rewards, values, ALL, 0.9, 0.5)
    torch.testing.assert_close(found, torch.tensor([0.71, -0.2, -2.0], dtype=torch.float64))
    [advantages], [returns] = GAE(0.9, 0.5, whiten_advantages=False)([rewards], [values], [ALL])
    torch.testing.assert_close(advantages, torch.tensor([0.71, -0.2, -2.0]))
    torch.testing.assert_close(returns, torch.tensor([1.71, 1.8, 1.0]))


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (0.97, 0.9), (0.5, 0.0), (0.0, 0.7)])
def test_advantages_are_the_weighted_sums_of_all_estimates(gamma: float, lam: float):
    """A_t = sum_l (gamma lam)^l delta_{t+l}, written out; what an environment said between the tokens takes no step."""
    generator = torch.Generator().manual_seed(3)
    rewards, values = torch.randn(2, 12, generator=generator)
    mask = torch.tensor([0, 0, 1, 1, 1, 0, 0, 1, 1, 0, 1, 1], dtype=torch.bool)
    r, v = rewards[mask].double().tolist(), [*values[mask].double().tolist(), 0.0]
    deltas = [r[t] + gamma * v[t + 1] - v[t] for t in range(len(r))]
    wanted = [sum((gamma * lam) ** n * delta for n, delta in enumerate(deltas[t:])) for t in range(len(r))]
    found = row_advantages(rewards, values, mask, gamma, lam)
    assert found[mask].tolist() == pytest.approx(wanted, rel=1e-12)
    assert not found[~mask].any()


def test_without_discount_the_returns_are_the_rewards_that_followed():
    values = torch.tensor([5.0, -1.0, 0.3, 2.0])
    mask = torch.tensor([False, True, True, True])
    rewards = reward_at_the_end(0.75, mask)
    assert rewards.tolist() == [0, 0, 0, 0.75]
    [advantages], [returns] = GAE(whiten_advantages=False)([rewards], [values], [mask])
    torch.testing.assert_close(returns, torch.tensor([0.0, 0.75, 0.75, 0.75]))
    torch.testing.assert_close(advantages, torch.tensor([0.0, 1.75, 0.45, -1.25]))


def test_a_row_without_targets_has_nothing():
    nothing = torch.zeros(3, dtype=torch.bool)
    assert not reward_at_the_end(1.0, nothing).any()
    advantages, returns = GAE()([torch.ones(3)] * 2, [torch.ones(3)] * 2, [nothing, nothing])
    assert not torch.stack([*advantages, *returns]).any()


def test_whitening_equals_the_formula_of_trl_and_verl():
    """(x - mean) / sqrt(var + 1e-8), the unbiased variance of the targets alone, the mean kept where asked."""
    rows = [torch.tensor([9.0, 1.0, 2.0]), torch.tensor([9.0, 4.0, 9.0])]
    masks = [torch.tensor([False, True, True]), torch.tensor([False, True, False])]
    mean, variance = statistics.mean([1.0, 2.0, 4.0]), statistics.variance([1.0, 2.0, 4.0])
    wanted = [(x - mean) / math.sqrt(variance + 1e-8) for x in (1.0, 2.0, 4.0)]
    found = whiten(rows, masks)
    assert torch.cat([row[mask] for row, mask in zip(found, masks, strict=True)]).tolist() == pytest.approx(wanted)
    kept = whiten(rows, masks, keeps_mean=True)
    assert [float(kept[0][1]), float(kept[1][1])] == pytest.approx([wanted[0] + mean, wanted[2] + mean])
    assert not any(bool(row[~mask].any()) for row, mask in zip(found, masks, strict=True))


def test_equal_numbers_are_not_blown_up_by_whitening():
    rows, masks = [torch.full((2,), 0.1)] * 3, [torch.ones(2, dtype=torch.bool)] * 3
    assert not torch.stack(whiten(rows, masks)).any()
    torch.testing.assert_close(torch.stack(whiten(rows, masks, keeps_mean=True)), torch.full((3, 2), 0.1))


def test_whitened_rewards_change_the_returns_and_whitened_advantages_do_not():
    rewards = [torch.tensor([0.0, 0.0, 4.0]), torch.tensor([0.0, 0.0, 1.0])]
    values, masks = [torch.zeros(3)] * 2, [ALL, ALL]
    plain, returns = GAE(whiten_advantages=False)(rewards, values, masks)
    white, same = GAE()(rewards, values, masks)
    assert all(torch.equal(a, b) for a, b in zip(returns, same, strict=True))
    torch.testing.assert_close(torch.stack(white), torch.stack(whiten(plain, masks)))
    _, scaled = GAE(whiten_rewards=True)(rewards, values, masks)
    assert float(scaled[0][2]) == pytest.approx(float(whiten(rewards, masks, keeps_mean=True)[0][2]))


def test_explained_variance_of_a_perfect_and_of_a_blind_critic():
    returns = [torch.tensor([0.0, 1.0, 2.0]), torch.tensor([4.0, 0.0, 0.0])]
    masks = [ALL, torch.tensor([True, False, False])]
    assert explained_variance(returns, returns, masks) == 1
    assert explained_variance([torch.full((3,), 0.7)] * 2, returns, masks) == pytest.approx(0)
    assert explained_variance(returns, [torch.ones(3)] * 2, masks) == 0


def value_rows(values: Tensor, old: Tensor, returns: Tensor) -> list[Row]:
    return [make_row(len(values) + 2, len(values), 1, policy=values, values=old, returns=returns)]


def loss_and_gradient(objective: ValueObjective, rows: list[Row], padding: int = 0) -> tuple[float, Tensor]:
    """Of one row's targets, which all follow two other tokens."""
    loss, [grad] = mean_loss_and_grads(objective, [rows], padding)
    assert not grad[:1].any() and not grad[-1:].any()
    return loss, grad[1:-1]


def test_value_loss_and_gradient_by_hand():
    """R = 1 and c = 0.2 for all. V = 0.5 of 0: (0.2 - 1)^2 counts and has no gradient; V = 1.1 of 1: within;
    V = -0.5 of 0: its own error is the larger; V = 0.5 of 2: (1.8 - 1)^2 counts."""
    values, old = torch.tensor([0.5, 1.1, -0.5, 0.5]), torch.tensor([0.0, 1.0, 0.0, 2.0])
    rows = value_rows(values, old, torch.ones(4))
    loss, grad = loss_and_gradient(ValueObjective(0.2), rows, padding=3)
    assert loss == pytest.approx(0.5 * (0.64 + 0.01 + 2.25 + 0.64) / 4)
    assert grad.tolist() == pytest.approx([0, 0.1 / 4, -1.5 / 4, 0], abs=1e-7)
    loss, grad = loss_and_gradient(ValueObjective(None), rows)
    assert loss == pytest.approx(0.5 * (0.25 + 0.01 + 2.25 + 0.25) / 4)
    assert grad.tolist() == pytest.approx([-0.5 / 4, 0.1 / 4, -1.5 / 4, -0.5 / 4], abs=1e-7)


def test_value_loss_equals_verls_formula_on_random_values():
    generator = torch.Generator().manual_seed(5)
    values, old, returns = torch.randn(3, 40, generator=generator)
    leaf = values.clone().requires_grad_()
    clipped = torch.min(torch.max(leaf, old - 0.5), old + 0.5)
    wanted = 0.5 * torch.mean(torch.max((leaf - returns) ** 2, (clipped - returns) ** 2))
    wanted.backward()
    assert leaf.grad is not None
    loss, grad = loss_and_gradient(ValueObjective(0.5), value_rows(values, old, returns))
    assert loss == pytest.approx(float(wanted.detach()), rel=1e-6)
    torch.testing.assert_close(grad, leaf.grad)


class Critic:
    """Values that it was given; it keeps the rows that it is trained on."""

    def __init__(self, value: float):
        self.value = value
        self.seen: list[list[Row]] = []

    def score(self, rows: list[Row]) -> list[Tensor]:
        return [torch.full((len(row),), self.value) for row in rows]

    def train_step(self, groups: list[list[Row]], objective: ValueObjective) -> StepResult:
        self.seen.append([row for group in groups for row in group])
        return StepResult(1.0, {"value_mean": 2.0}, 3.0, 0.1, 1, 1)


def trainer_of(
    critic: Any, *, step: int = 0, warmup_steps: int = 0, batch_size: int = 2, gae: GAE | None = None
) -> Any:
    """A run's steps without its policy and engine."""
    trainer: Any = object.__new__(PPOTrainer)
    trainer.critic, trainer.gae, trainer.warmup_steps = critic, gae, warmup_steps
    trainer.value_objective = ValueObjective(0.5)
    trainer.options = SimpleNamespace(advantage_clip_low=None, advantage_clip_high=None)
    trainer.estimator = Estimator("none", gae=gae)
    trainer.objective = SimpleNamespace(config=GRPOConfig(reference_policy_kl_penalty=0.0))
    recipe = SimpleNamespace(policy=SimpleNamespace(train_global_batch_size=2))
    trainer.session = SimpleNamespace(step=step, recipe=recipe)
    return trainer


def answers(*rewards: float) -> list[Row]:
    """Rows of two targets, each token with the reward of its answer at the end."""
    return [
        make_row(4, 2, number, advantages=torch.tensor([0.0, reward]), reward=reward)
        for number, reward in enumerate(rewards)
    ]


def test_the_loop_gives_the_critic_returns_and_leaves_out_what_has_no_reward():
    critic = Critic(0.5)
    trainer = trainer_of(critic, gae=GAE(0.5, 1.0, whiten_advantages=False))
    rows = trainer.over_batch(answers(1.0, 0.0, 0.0, 0.0), [True, True, False, False])
    # Of two tokens with reward 1 at the end and gamma 0.5: returns 0.5 and 1, less the values of 0.5.
    assert rows[0].token_fields["returns"].tolist() == [0, 0, 0.5, 1]
    assert rows[0].token_fields["advantages"].tolist() == [0, 0, 0, 0.5]
    assert rows[1].token_fields["advantages"].tolist() == [0, 0, -0.5, -0.5]
    assert not rows[2].token_fields["advantages"].any()
    values = trainer.update_critic(rows)
    assert [[row.num_targets for row in rows] for rows in critic.seen] == [[2, 2]], "a part without rewards is no step"
    assert values["value_loss"] == 1 and values["critic_grad_norm"] == 3 and values["value_mean"] == 2
    assert values["explained_variance"] == pytest.approx(0)
    assert not trainer.update_critic(rows[2:]).keys() & {"value_loss"}


def test_the_policy_waits_while_the_critic_warms_up():
    taught = [trainer_of(None, step=step, warmup_steps=2).teaches(answers(1.0)) for step in (0, 1, 2)]
    assert taught == [False, False, True]


def recipe(**sections: Any) -> Any:
    content: dict[str, Any] = {
        "grpo": {"adv_estimator": {"name": "gae"}, "num_generations_per_prompt": 1},
        "critic": {"optim": {"lr": 1e-4}},
        "policy": {"model_name": "base", "dtensor_cfg": {"lora_cfg": {"enabled": True}}},
        "data": {"train": {"dataset_name": "arithmetic"}},
    }
    return check_recipe(content | sections).recipe


def test_a_critic_has_no_adapter_on_the_output_layer():
    spec: Any = SimpleNamespace(modules=[SimpleNamespace(kind="output_layer")])
    with pytest.raises(UserError, match="output layer alone"):
        critic_spec(spec)


def test_ppo_takes_one_answer_a_prompt():
    assert recipe().critic.warmup_steps == 0


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"critic": None}, "critic.optim.lr"),
        ({"critic": {}}, "critic.optim"),
        ({"critic": {"optim": {"lr": 1e-4, "min_lr": 1e-3}}}, "min_lr"),
        ({"grpo": {"adv_estimator": {"name": "rloo"}}}, "section critic"),
        ({"grpo": {"adv_estimator": {"name": "grpo", "gae_lambda": 0.9}}, "critic": None}, "gae_lambda"),
        ({"grpo": {"adv_estimator": {"name": "gae", "gae_gamma": 1.5}}}, "gae_gamma"),
        ({"grpo": None, "sft": {}}, "section critic"),
        ({"policy": {"model_name": "base", "dtensor_cfg": {"lora_cfg": {"enabled": False}}}}, "lora_cfg.enabled"),
        (
            {
                "policy": {
                    "model_name": "b",
                    "dtensor_cfg": {"lora_cfg": {"enabled": True, "modules_to_save": ["norm"]}},
                }
            },
            "modules_to_save",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_critic_that_cannot_be_is_refused(sections: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        recipe(**sections)
