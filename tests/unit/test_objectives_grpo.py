import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from objective_batches import make_row, mean_loss_and_grads, pack, policy_logps

from megatron_lora.config.schema_loss import LossFnConfig
from megatron_lora.errors import UserError
from megatron_lora.objectives.grpo import GRPOObjective, clipped_policy_loss, set_positive_example_weights
from megatron_lora.objectives.grpo_config import GRPOConfig
from megatron_lora.objectives.kl import kl_estimate

LOG2 = math.log(2)


def random_rows(num_rows: int, seed: int = 0, noise: float = 0.4) -> list:
    generator = torch.Generator().manual_seed(seed)

    def randn(size):
        return torch.randn(size, generator=generator, dtype=torch.float64)

    rows = []
    for i in range(num_rows):
        n = int(torch.randint(2, 7, (1,), generator=generator))
        policy = -torch.rand(n, generator=generator, dtype=torch.float64) * 3
        old = policy + noise * randn(n)
        advantage = randn(1).expand(n).clone()
        fields = {"old_logps": old, "rollout_logps": old + 0.3 * randn(n), "reference_logps": policy + noise * randn(n)}
        rows.append(make_row(n + 2 + i % 3, n, i, policy=policy, advantages=advantage, reward=i % 2, **fields))
    return rows


def one_row(policy, advantages, old=None, rollout=None, reference=None, index=0):
    fields = {"old_logps": old, "rollout_logps": rollout, "reference_logps": reference}
    given: dict[str, Any] = {
        name: torch.tensor(value, dtype=torch.float64) for name, value in fields.items() if value is not None
    }
    n = len(policy)
    as_tensor = {"policy": policy, "advantages": advantages}
    given |= {name: torch.tensor(value, dtype=torch.float64) for name, value in as_tensor.items()}
    return make_row(n + 2, n, index, **given)


def evaluate(config: GRPOConfig, rows: list):
    """Mean loss and metrics over one micro-batch, as an engine would log them."""
    objective, batch = GRPOObjective(config), pack(rows)
    result = objective(policy_logps(rows, batch), batch)
    count = objective.count(rows)
    assert not any(value.requires_grad for value in result.metrics.values())
    return result.loss.item() / count, {name: value.item() / count for name, value in result.metrics.items()}


@pytest.mark.parametrize(
    "ratio, advantage, dual_clip, expected",
    [
        (1.5, 1.0, None, -1.2),  # gain cut at 1 + 0.2
        (0.5, 1.0, None, -0.5),  # the pessimistic side is not cut
        (0.5, -1.0, None, 0.9),  # loss no less than at 1 - 0.1
        (5.0, -1.0, None, 5.0),
        (5.0, -1.0, 3.0, 3.0),  # dual clip
        (5.0, 1.0, 3.0, -1.2),
    ],
)
def test_clipping_by_hand(ratio, advantage, dual_clip, expected):
    loss = clipped_policy_loss(torch.tensor(ratio).log(), torch.tensor(advantage), 0.1, 0.2, dual_clip)
    assert loss.item() == pytest.approx(expected, rel=1e-6)


def test_kl_by_hand():
    # pi = 1/2, reference = 1: log(reference / pi) = log 2.
    logps, reference = torch.tensor(-LOG2), torch.tensor(0.0)
    assert kl_estimate(logps, reference, "k1").item() == pytest.approx(-LOG2)
    assert kl_estimate(logps, reference, "k2").item() == pytest.approx(LOG2**2 / 2)
    assert kl_estimate(logps, reference, "k3").item() == pytest.approx(2 - 1 - LOG2)
    assert kl_estimate(logps, reference + 100, "k3", 2.0).item() == pytest.approx(math.exp(2) - 3)
    assert kl_estimate(logps, reference + 100, "k3", 20.0, 10.0).item() == 10.0
    with pytest.raises(ValueError, match="k4"):
        kl_estimate(logps, reference, "k4")  # pyright: ignore[reportArgumentType]


def test_clamped_token_has_no_kl_gradient():
    logps = torch.tensor([-30.0, -1.0], dtype=torch.float64, requires_grad=True)
    weights = (logps - logps.detach()).exp()
    kl_estimate(logps, torch.zeros(2, dtype=torch.float64), "k1", 20.0, None, weights).sum().backward()
    assert logps.grad is not None and logps.grad[0] == 0
    # k1 with the score function's term: d(w k)/d logp = k + 1 with k = -1.
    assert logps.grad[1].item() == pytest.approx(0.0)


def test_token_and_sequence_means_by_hand():
    # On policy, no KL: loss of a token is -A. Row 0: one token, A = 1; row 1: three tokens, A = -1.
    rows = [
        one_row([-1.0], [1.0], old=[-1.0]),
        one_row([-1.0, -1.0, -1.0], [-1.0, -1.0, -1.0], old=[-1.0, -1.0, -1.0], index=1),
    ]
    off: dict[str, Any] = {"reference_policy_kl_penalty": 0.0}
    assert evaluate(GRPOConfig(**off), rows)[0] == pytest.approx((-1 + 3) / 4)
    assert evaluate(GRPOConfig(token_level_loss=False, **off), rows)[0] == pytest.approx((-1 + 1) / 2)
    # Dr. GRPO divides each row's sum by the constant: (-1/10 + 3/10) / 2; metrics stay means over a row's tokens.
    loss, metrics = evaluate(GRPOConfig(constant_length=10, **off), rows)
    assert loss == pytest.approx((-1 / 10 + 3 / 10) / 2)
    assert metrics["probs_ratio"] == pytest.approx(1.0)


def test_gspo_ratio_by_hand():
    # Log ratios 0.3 and -0.1: their mean is 0.1, exp(0.1) is within the clip: loss -A exp(0.1) at every token.
    rows = [one_row([-1.0, -2.0], [2.0, 2.0], old=[-1.3, -1.9])]
    config = GRPOConfig(sequence_level_importance_ratios=True, token_level_loss=False, reference_policy_kl_penalty=0.0)
    loss, metrics = evaluate(config, rows)
    assert loss == pytest.approx(-2 * math.exp(0.1))
    assert metrics["probs_ratio"] == pytest.approx(math.exp(0.1))


def test_cispo_reinforce_and_on_policy_gradients_by_hand():
    off: dict[str, Any] = {"reference_policy_kl_penalty": 0.0}
    rows = [one_row([-1.0], [2.0], old=[-2.0])]  # ratio e, clipped to 1.2

    def gradient(config):
        return mean_loss_and_grads(GRPOObjective(config), [rows])[1][0].sum().item()

    assert gradient(GRPOConfig(**off)) == 0.0  # the clip stops PPO's gradient
    assert gradient(GRPOConfig(use_cispo=True, **off)) == pytest.approx(-2 * 1.2)
    assert gradient(GRPOConfig(disable_ppo_ratio=True, **off)) == pytest.approx(-2.0)
    assert gradient(GRPOConfig(force_on_policy_ratio=True, **off)) == pytest.approx(-2.0)
    assert evaluate(GRPOConfig(use_cispo=True, **off), rows)[0] == pytest.approx(2 * 1.2 * 1.0)


def test_kl_term_by_hand():
    # k3 with log(reference / pi) = log 2: 1 - log 2; beta 0.5. The policy part is -A = -1 on policy.
    rows = [one_row([-LOG2], [1.0], old=[-LOG2], rollout=[-2 * LOG2], reference=[0.0])]
    loss, metrics = evaluate(GRPOConfig(reference_policy_kl_penalty=0.5), rows)
    assert loss == pytest.approx(-1 + 0.5 * (1 - LOG2))
    assert metrics["kl"] == pytest.approx(1 - LOG2)
    # Gradient: -A + beta (k3 + d k3 / d logp), d k3 / d logp = -exp(log 2) + 1.
    grads = mean_loss_and_grads(GRPOObjective(GRPOConfig(reference_policy_kl_penalty=0.5)), [rows])[1]
    assert grads[0].sum().item() == pytest.approx(-1 + 0.5 * (1 - LOG2 - 1))
    # With the on-policy approximation the estimate is weighted by pi / pi_rollout = 2.
    approximated = GRPOConfig(reference_policy_kl_penalty=0.5, use_on_policy_kl_approximation=True)
    assert evaluate(approximated, rows)[0] == pytest.approx(-1 + 0.5 * 2 * (1 - LOG2))
    # In the reward, it is not in the loss.
    assert evaluate(GRPOConfig(reference_policy_kl_penalty=0.5, use_kl_in_reward=True), rows)[0] == pytest.approx(-1)


@pytest.mark.parametrize(
    "kind, bounds, expected, out_of_bounds",
    [
        (None, (None, None), -(4 + 1 + 0.25) / 3, None),
        ("tis", (2.0, None), -(2 + 1 + 0.25) / 3, 1 / 3),
        ("tis", (2.0, 0.5), -(2 + 1 + 0.5) / 3, 2 / 3),
        ("seq-tis", (2.0, None), -1.0, 0.0),  # the product is 1, at every token
        ("seq-tis", (0.5, None), -0.5, 1.0),
        ("seq-tis", (9.0, 2.0), -2.0, 1.0),
        ("icepop", (2.0, 0.5), -(0 + 1 + 0) / 3, 2 / 3),
        ("seq-mask-tis", (1.1, 0.9), -(4 + 1 + 0.25) / 3, 0.0),  # the geometric mean is 1
        ("seq-mask-tis", (3.0, 1.1), 0.0, 1.0),
    ],
)
def test_importance_weights_by_hand(kind, bounds, expected, out_of_bounds):
    # pi_old / pi_rollout = 4, 1, 1/4 at the three tokens; on policy, A = 1.
    rows = [one_row([-1.0] * 3, [1.0] * 3, old=[-1.0] * 3, rollout=[-1 - 2 * LOG2, -1.0, -1 + 2 * LOG2])]
    config = GRPOConfig(
        reference_policy_kl_penalty=0.0,
        use_importance_sampling_correction=True,
        truncated_importance_sampling_type=kind,
        truncated_importance_sampling_ratio=bounds[0],
        truncated_importance_sampling_ratio_min=bounds[1],
    )
    loss, metrics = evaluate(config, rows)
    assert loss == pytest.approx(expected)
    assert metrics.get("is_oob_ratio") == (None if out_of_bounds is None else pytest.approx(out_of_bounds))
    assert metrics["rollout_logprob_error"] == pytest.approx(4 * LOG2 / 3)
    assert metrics["token_mult_prob_error"] == pytest.approx((4 + 1 + 4) / 3)


def test_sequence_level_importance_weight_by_hand():
    # A sequence's weight is the product of its tokens' 4, 1 and 1/2.
    rows = [one_row([-1.0] * 3, [1.0] * 3, old=[-1.0] * 3, rollout=[-1 - 2 * LOG2, -1.0, -1 + LOG2])]
    config = GRPOConfig(
        reference_policy_kl_penalty=0.0,
        token_level_loss=False,
        sequence_level_importance_ratios=True,
        use_importance_sampling_correction=True,
    )
    loss, metrics = evaluate(config, rows)
    assert loss == pytest.approx(-2.0)
    assert metrics["sampling_importance_ratio"] == pytest.approx(2.0)


def test_a_product_beyond_fp32_is_cut_as_any_other():
    rows = [one_row([-1.0] * 2, [1.0] * 2, old=[-1.0] * 2, rollout=[-100.0] * 2)]
    for row in rows:
        row.token_fields = {name: value.float() for name, value in row.token_fields.items()}
    config = GRPOConfig(
        reference_policy_kl_penalty=0.0,
        use_importance_sampling_correction=True,
        truncated_importance_sampling_type="seq-tis",
        truncated_importance_sampling_ratio=3.0,
    )
    assert evaluate(config, rows)[0] == pytest.approx(-3.0)


@pytest.mark.parametrize("on_policy", [True, False])
def test_the_ratio_may_be_to_the_policy_that_drew_the_answers(on_policy: bool):
    # pi / pi_rollout = e^0.1, clipped for A > 0 at 1.2: e^0.1, e^0.5 -> 1.2. pi_old has no say.
    rows = [one_row([-1.0, -1.0], [1.0] * 2, old=[-9.0] * 2, rollout=[-1.1, -1.5])]
    config = GRPOConfig(proximal_policy="rollout", reference_policy_kl_penalty=0.0)
    objective = GRPOObjective(config, on_policy=on_policy)
    assert mean_loss_and_grads(objective, [rows])[0] == pytest.approx(-(math.exp(0.1) + 1.2) / 2)
    assert objective.required_token_fields == {"advantages", "rollout_logps"}


def test_the_decoupled_objective_by_hand():
    """AReaL (Fu et al. 2025), eq. 5: pi_prox / pi_behave times the loss that is clipped around pi_prox."""
    rows = [one_row([-1.0, -1.0], [1.0, -1.0], old=[-1.5, -1.1], rollout=[-1.7, -0.9])]
    config = GRPOConfig(use_importance_sampling_correction=True, reference_policy_kl_penalty=0.0)
    # Ratios e^0.5 -> 1.2 (A > 0) and e^0.1; weights e^0.2 and e^-0.2.
    assert evaluate(config, rows)[0] == pytest.approx((-1.2 * math.exp(0.2) + math.exp(0.1) * math.exp(-0.2)) / 2)


def test_metrics_by_hand():
    # Ratios e^0.5 (A > 0: clipped), 1, e^-0.5 (A > 0: not clipped).
    rows = [one_row([-1.0, -1.0, -1.0], [1.0] * 3, old=[-1.5, -1.0, -0.5], rollout=[-1.0] * 3)]
    _, metrics = evaluate(GRPOConfig(reference_policy_kl_penalty=0.0), rows)
    assert metrics["clip_fraction"] == pytest.approx(1 / 3)
    assert metrics["probs_ratio"] == pytest.approx((math.exp(0.5) + 1 + math.exp(-0.5)) / 3)
    assert metrics["probs_ratio_clamped"] == pytest.approx((1.2 + 1 + 0.8) / 3)
    assert metrics["approx_entropy"] == pytest.approx(1.0)
    assert metrics["rollout_logprob_error"] == pytest.approx(1 / 3)


CONFIGS = {
    "token": GRPOConfig(),
    "sequence": GRPOConfig(token_level_loss=False, ratio_clip_c=3.0),
    "dr_grpo": GRPOConfig(constant_length=9),
    "gspo": GRPOConfig(
        token_level_loss=False, sequence_level_importance_ratios=True, use_importance_sampling_correction=True
    ),
    "cispo": GRPOConfig(use_cispo=True, reference_policy_kl_type="k1"),
    "seq_mask": GRPOConfig(
        use_importance_sampling_correction=True,
        truncated_importance_sampling_type="seq-mask-tis",
        truncated_importance_sampling_ratio=1.05,
        truncated_importance_sampling_ratio_min=0.9,
        use_on_policy_kl_approximation=True,
        reference_policy_kl_type="k2",
    ),
    "vapo": GRPOConfig(positive_example_nll_weight=0.3),
    "reinforce": GRPOConfig(disable_ppo_ratio=True),
    "on_policy": GRPOConfig(force_on_policy_ratio=True),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_micro_batches_padding_and_filtered_rows_do_not_matter(config):
    rows, objective = random_rows(5, seed=1), GRPOObjective(config)
    filtered = make_row(4, 0, 9, **{name: torch.zeros(0) for name in rows[0].token_fields}, reward=1.0)
    set_positive_example_weights([*rows, filtered], objective)
    whole, whole_grads = mean_loss_and_grads(objective, [rows])
    split, split_grads = mean_loss_and_grads(objective, [rows[:1], [*rows[1:3], filtered], rows[3:]], padding=4)
    assert split == pytest.approx(whole, rel=1e-12)
    assert split_grads.pop(3).abs().sum() == 0
    for a, b in zip(whole_grads, split_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("name", ["token", "sequence", "dr_grpo", "gspo", "seq_mask"])
def test_gradient(name):
    """Against finite differences, where the loss is an ordinary function: with the KL's weight as importance ratio."""
    config = CONFIGS[name]
    if config.kl_in_loss and not config.use_on_policy_kl_approximation:
        config = GRPOConfig(**{**vars(config), "use_on_policy_kl_approximation": True})
    rows = random_rows(3, seed=2)
    batch, objective = pack(rows), GRPOObjective(config)
    assert torch.autograd.gradcheck(lambda x: objective(x, batch).loss, (policy_logps(rows, batch),))


def test_garbage_off_target_does_not_leak():
    rows, objective = random_rows(2), GRPOObjective(CONFIGS["gspo"])
    batch = pack(rows)
    logps = policy_logps(rows, batch)
    dirty = torch.where(batch.target_mask, logps.detach(), torch.nan).requires_grad_()
    objective(logps, batch).loss.backward()
    objective(dirty, batch).loss.backward()
    torch.testing.assert_close(logps.grad, dirty.grad, rtol=0, atol=0)


def test_count():
    rows = [*random_rows(3), make_row(4, 0, 3)]
    assert GRPOObjective(GRPOConfig()).count(rows) == sum(row.num_targets for row in rows)
    assert GRPOObjective(GRPOConfig(token_level_loss=False)).count(rows) == 3
    assert GRPOObjective(GRPOConfig(constant_length=5)).count(rows) == 3


def test_positive_example_term_by_hand():
    # Row 1 is right and has 2 tokens of -1 and -3: mean NLL 2, weight 0.5; the policy part is -A = 0.
    rows = [
        one_row([-1.0, -1.0], [0.0, 0.0], old=[-1.0, -1.0]),
        one_row([-1.0, -3.0], [0.0, 0.0], old=[-1.0, -3.0], index=1),
    ]
    rows[0].row_fields["reward"], rows[1].row_fields["reward"] = 0.0, 1.0
    for token_level in (True, False):
        config = GRPOConfig(
            reference_policy_kl_penalty=0.0, positive_example_nll_weight=0.5, token_level_loss=token_level
        )
        set_positive_example_weights(rows, GRPOObjective(config))
        loss, metrics = evaluate(config, rows)
        assert loss == pytest.approx(0.5 * 2.0)
        assert metrics["positive_nll_loss"] == pytest.approx(2.0)


def test_required_fields():
    rows = [one_row([-1.0], [1.0])]
    assert GRPOObjective(GRPOConfig()).required_token_fields == {"advantages", "old_logps", "reference_logps"}
    on_policy = GRPOConfig(force_on_policy_ratio=True, reference_policy_kl_penalty=0.0)
    assert GRPOObjective(on_policy).required_token_fields == {"advantages"}
    assert evaluate(on_policy, rows)[0] == pytest.approx(-1.0)
    batch = pack(rows)
    with pytest.raises(ValueError, match="old_logps"):
        GRPOObjective(GRPOConfig())(policy_logps(rows, batch), batch)


@pytest.mark.parametrize(
    "form",
    [
        {},
        {"use_cispo": True},
        {"token_level_loss": False, "sequence_level_importance_ratios": True},
        {"ratio_clip_c": 3.0},
        {"use_importance_sampling_correction": True},
        {"disable_ppo_ratio": True},
    ],
    ids=str,
)
def test_the_first_update_is_its_own_old_policy(form: dict) -> None:
    """The same loss, gradients and metrics as with its own log-probabilities scored ahead."""
    config = GRPOConfig(reference_policy_kl_penalty=0.1, **form)
    rows = random_rows(4)
    batch = pack(rows)
    current = policy_logps(rows, batch).detach()

    def run(on_policy: bool, **fields: torch.Tensor):
        logps = current.clone().requires_grad_()
        given = {name: values for name, values in batch.token_fields.items() if name != "old_logps"} | fields
        result = GRPOObjective(config, on_policy=on_policy)(logps, replace(batch, token_fields=given))
        return result, torch.autograd.grad(result.loss, logps)[0]

    (ahead, wanted), (own, gradient) = run(False, old_logps=current), run(True)
    torch.testing.assert_close(gradient, wanted)
    torch.testing.assert_close(own.loss, ahead.loss)
    assert set(own.metrics) == set(ahead.metrics)
    for name, value in own.metrics.items():
        torch.testing.assert_close(value, ahead.metrics[name], msg=name)
    # Scored ahead with dropout off, say: the ratio is still to the forward pass, and nothing is clipped.
    scored, _ = run(True, old_logps=current - 3)
    assert scored.metrics.get("clip_fraction", 0) == 0


def test_a_policy_that_is_its_reference_has_no_kl() -> None:
    rows = random_rows(3)
    for row in rows:
        del row.token_fields["old_logps"], row.token_fields["reference_logps"]
    batch = pack(rows)
    logps = policy_logps(rows, batch).detach().requires_grad_()
    config = GRPOConfig(reference_policy_kl_penalty=0.5)
    result = GRPOObjective(config, on_policy=True)(logps, batch)
    plain = GRPOObjective(GRPOConfig(reference_policy_kl_penalty=0.0), on_policy=True)(logps, batch)
    assert result.metrics["kl"] == 0 and "kl" not in plain.metrics
    kl_gradient = torch.autograd.grad(result.loss - plain.loss, logps)[0]
    assert not kl_gradient.any()


@pytest.mark.parametrize(
    "wrong",
    [
        {"ratio_clip_min": -0.1},
        {"ratio_clip_c": 1.0},
        {"reference_policy_kl_type": "k4"},
        {"reference_policy_kl_penalty": -1.0},
        {"constant_length": 0},
        {"sequence_level_importance_ratios": True},
        {"disable_ppo_ratio": True, "ratio_clip_c": 3.0},
        {"use_cispo": True, "force_on_policy_ratio": True},
        {"use_cispo": True, "token_level_loss": False},
        {"proximal_policy": "rollout", "use_importance_sampling_correction": True},
        {"proximal_policy": "rollout", "disable_ppo_ratio": True},
        {"proximal_policy": "rollout", "force_on_policy_ratio": True},
        {
            "use_importance_sampling_correction": True,
            "token_level_loss": False,
            "sequence_level_importance_ratios": True,
            "truncated_importance_sampling_type": "seq-tis",
            "truncated_importance_sampling_ratio": 2.0,
        },
        {"truncated_importance_sampling_type": "tis", "truncated_importance_sampling_ratio": 2.0},
        {"truncated_importance_sampling_ratio": 2.0},
        {"use_importance_sampling_correction": True, "truncated_importance_sampling_type": "tis"},
        {
            "use_importance_sampling_correction": True,
            "truncated_importance_sampling_type": "icepop",
            "truncated_importance_sampling_ratio": 2.0,
        },
        {
            "use_importance_sampling_correction": True,
            "truncated_importance_sampling_type": "tis",
            "truncated_importance_sampling_ratio": 2.0,
            "truncated_importance_sampling_ratio_min": 3.0,
        },
    ],
)
def test_contradictions_are_refused(wrong: dict[str, Any]):
    with pytest.raises(UserError, match="loss_fn"):
        GRPOConfig(**wrong)


def test_from_recipe():
    assert GRPOConfig.from_config(LossFnConfig(), max_new_tokens=64) == GRPOConfig()
    section = LossFnConfig(length_normalization=False, ratio_clip_c=3.0)
    assert GRPOConfig.from_config(section, max_new_tokens=64) == GRPOConfig(constant_length=64, ratio_clip_c=3.0)
    old = LossFnConfig(use_importance_sampling_correction=True, truncated_importance_sampling_ratio=2.0)
    assert GRPOConfig.from_config(old, max_new_tokens=64).truncated_importance_sampling_type == "tis"
