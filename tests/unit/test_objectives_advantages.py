import math

import pytest
import torch
from objective_batches import make_row
from pydantic import ValidationError

from megatron_lora.config.schema_algorithms import GrpoConfig
from megatron_lora.errors import UserError
from megatron_lora.objectives.advantages import (
    check_group_size,
    clip_advantages,
    group_advantages,
    informative_groups,
    normalize_over_tokens,
    subtract_kl,
)
from megatron_lora.objectives.estimators import Estimator
from megatron_lora.objectives.grpo import GRPOObjective
from megatron_lora.objectives.grpo_config import GRPOConfig
from megatron_lora.objectives.reward_shaping import scale_rewards, soft_overlong_penalty, stop_properly_penalty
from megatron_lora.objectives.row_filters import filter_overlong, mask_by_logprob_error


def test_group_mean_by_hand():
    # Mean 0.5, unbiased std sqrt(4 * 0.25 / 3) = 1 / sqrt(3).
    rewards = torch.tensor([[1.0, 0.0, 1.0, 0.0]])
    plain = group_advantages(rewards, normalize=False, leave_one_out=False)
    torch.testing.assert_close(plain.advantages, torch.tensor([[0.5, -0.5, 0.5, -0.5]]))
    normalized = group_advantages(rewards, normalize=True, leave_one_out=False).advantages
    assert normalized[0, 0].item() == pytest.approx(0.5 / (1 / math.sqrt(3) + 1e-6), rel=1e-6)


def test_leave_one_out_by_hand():
    # Others of the first: 0, 0, 1: mean 1/3, unbiased std sqrt((2/9 + 4/9) / 2) = sqrt(1/3).
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0]])
    plain = group_advantages(rewards, normalize=False, leave_one_out=True).advantages
    torch.testing.assert_close(plain, torch.tensor([[2 / 3, -2 / 3, -2 / 3, 2 / 3]]))
    normalized = group_advantages(rewards).advantages
    assert normalized[0, 0].item() == pytest.approx((2 / 3) / (math.sqrt(1 / 3) + 1e-6), rel=1e-6)


def test_zero_variance_groups_are_counted_and_have_no_advantage():
    result = group_advantages(torch.tensor([[0.1, 0.1, 0.1], [0.1, 0.2, 0.3]]))
    assert result.num_zero_variance == 1
    assert result.zero_variance.tolist() == [True, False]
    assert result.advantages[0].abs().sum() == 0
    assert result.advantages[1].abs().sum() > 0


def test_equal_peers_do_not_blow_up():
    # The others of the first answer are all 0.1, whose std a computer does not find to be exactly 0.
    advantages = group_advantages(torch.tensor([[0.7, 0.1, 0.1, 0.1]])).advantages
    assert advantages[0, 0].item() == pytest.approx(0.6, rel=1e-6)


def test_leave_one_out_baselines_of_two_groups() -> None:
    # Expected by hand: the baseline of 1, 2, 3 is 2.5, 2, 1.5; of 4, 5, 6 it is 5.5, 5, 4.5.
    rewards = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    baselines = rewards - group_advantages(rewards, normalize=False).advantages
    torch.testing.assert_close(baselines, torch.tensor([[2.5, 2.0, 1.5], [5.5, 5.0, 4.5]]))


@pytest.mark.parametrize("leave_one_out", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
def test_an_answer_without_reward_is_as_if_it_were_not_there(leave_one_out: bool, normalize: bool) -> None:
    three = group_advantages(torch.tensor([[1.0, 0.0, 0.5]]), normalize, leave_one_out)
    four = group_advantages(torch.tensor([[1.0, math.nan, 0.0, 0.5]]), normalize, leave_one_out)
    torch.testing.assert_close(four.advantages[:, [0, 2, 3]], three.advantages)
    assert four.advantages[0, 1] == 0
    lonely = group_advantages(torch.tensor([[1.0, math.nan], [math.nan, math.nan]]), normalize, leave_one_out)
    assert not lonely.advantages.any() and lonely.num_zero_variance == 2
    assert informative_groups(torch.tensor([[1.0, math.nan], [1.0, 0.0]])).tolist() == [False, True]


def test_rewards_of_any_size_have_finite_advantages() -> None:
    huge = torch.tensor([[1e300, 0.0, 1e300, 0.0]], dtype=torch.float64)
    for leave_one_out in (False, True):
        wanted = group_advantages(huge / 1e300, leave_one_out=leave_one_out).advantages
        torch.testing.assert_close(group_advantages(huge, leave_one_out=leave_one_out).advantages, wanted)
    tiny = group_advantages(torch.tensor([[1e-9, 0.0, 1e-9, 0.0]])).advantages
    assert tiny.isfinite().all() and 0 < tiny.abs().max() < 1e-2
    with pytest.raises(ValueError, match="infinite"):
        group_advantages(torch.tensor([[math.inf, 0.0]]))


def test_one_sum_in_another_order_is_the_same_reward() -> None:
    assert 0.1 + 0.2 != 0.3
    rewards = torch.tensor([[0.1 + 0.2, 0.3, 0.3]], dtype=torch.float64)
    assert not group_advantages(rewards).advantages.any()
    assert informative_groups(rewards).tolist() == [False]


def test_two_generations_leave_one_out_is_not_divided():
    advantages = group_advantages(torch.tensor([[1.0, 0.25]])).advantages
    torch.testing.assert_close(advantages, torch.tensor([[0.75, -0.75]]))


def test_check_group_size():
    check_group_size(2, leave_one_out=True)
    with pytest.raises(UserError, match="num_generations_per_prompt=1.*use_leave_one_out_baseline"):
        check_group_size(1, leave_one_out=True)
    with pytest.raises(UserError, match="nothing trains"):
        check_group_size(1, leave_one_out=False)
    with pytest.raises(UserError, match="at least 1"):
        check_group_size(0, leave_one_out=False)


def test_clip_and_filter():
    advantages = torch.tensor([-3.0, 0.5, 4.0])
    assert clip_advantages(advantages, -1.0, None).tolist() == [-1.0, 0.5, 4.0]
    assert clip_advantages(advantages, None, 2.0).tolist() == [-3.0, 0.5, 2.0]
    assert clip_advantages(advantages, None, None) is advantages
    rewards = torch.tensor([[1.0, 1.0], [0.0, 1.0], [0.0, 0.0]])
    assert informative_groups(rewards).tolist() == [False, True, False]


def test_kl_in_reward_and_global_normalisation_by_hand():
    # k1 of pi_old = e^-1 against e^-3 is 2 nats; penalty 0.1.
    shaped = subtract_kl([torch.tensor([1.0])], [torch.tensor([-1.0])], [torch.tensor([-3.0])], 0.1, "k1")
    assert shaped[0].item() == pytest.approx(0.8)
    # Targets 1, 1, 4: mean 2, variance (1 + 1 + 4) / 3 = 2.
    advantages = [torch.tensor([9.0, 1.0, 1.0]), torch.tensor([9.0, 4.0])]
    masks = [torch.tensor([False, True, True]), torch.tensor([False, True])]
    first, second = normalize_over_tokens(advantages, masks)
    root = math.sqrt(2)
    torch.testing.assert_close(first, torch.tensor([0.0, -1 / root, -1 / root]))
    torch.testing.assert_close(second, torch.tensor([0.0, 2 / root]))
    # Without a target, and where all are one number up to rounding, nothing is to be learnt.
    assert normalize_over_tokens([torch.tensor([1.0])], [torch.tensor([False])])[0].tolist() == [0.0]
    equal = [torch.full((3,), 0.1 + 0.2, dtype=torch.float64), torch.full((2,), 0.3, dtype=torch.float64)]
    everywhere = [torch.ones(3, dtype=torch.bool), torch.ones(2, dtype=torch.bool)]
    assert all(not values.any() for values in normalize_over_tokens(equal, everywhere))


def estimator(**keys: object) -> Estimator:
    """Of a recipe's `grpo.adv_estimator`."""
    return Estimator.from_config(GrpoConfig.model_validate({"adv_estimator": keys}).adv_estimator)


def test_named_estimators_within_a_group_by_hand():
    # Mean 2; the others' means are 2.5, 2, 1.5; the others' unbiased std is 1/sqrt(2), sqrt(2), 1/sqrt(2).
    rewards = torch.tensor([[1.0, 2.0, 3.0]])
    wanted = {
        "rloo": [-1.5, 0.0, 1.5],
        "dr_grpo": [-1.0, 0.0, 1.0],
        "reinforce_plus_plus": [-1.0, 0.0, 1.0],
    }
    for name, values in wanted.items():
        torch.testing.assert_close(estimator(name=name).within_groups(rewards).advantages, torch.tensor([values]))
    plain = estimator(name="reinforce_plus_plus", minus_baseline=False).within_groups(rewards)
    assert plain.advantages.tolist() == [[1.0, 2.0, 3.0]]
    found = estimator(name="grpo").within_groups(rewards).advantages
    torch.testing.assert_close(found, torch.tensor([[-1.5, 0.0, 1.5]]) / (math.sqrt(0.5) + 1e-6))
    found = estimator(normalize_rewards=False, use_leave_one_out_baseline=False).within_groups(rewards).advantages
    torch.testing.assert_close(found, torch.tensor([[-1.0, 0.0, 1.0]]))


def test_reinforce_plus_plus_over_the_batch_by_hand():
    """Tokens count, not answers: two answers of advantage 1 and -1 with one and three tokens have mean -1/2 and
    variance (9/4 + 3 * 1/4) / 4 = 3/4. An answer without a reward stays at 0 and does not count."""
    advantages = [torch.tensor([0.0, 1.0]), torch.tensor([0.0, -1.0, -1.0, -1.0]), torch.tensor([0.0, 0.0])]
    masks = [torch.arange(len(values)) > 0 for values in advantages]
    plus_plus = estimator(name="reinforce_plus_plus")
    first, second, third = plus_plus.over_tokens(advantages, masks, [True, True, False])
    torch.testing.assert_close(first[1:], torch.tensor([1.5 / math.sqrt(0.75)]))
    torch.testing.assert_close(second[1:], torch.full((3,), -0.5 / math.sqrt(0.75)))
    assert not third.any() and first[0] == 0
    unchanged = estimator(name="rloo").over_tokens(advantages, masks, [True, True, False])
    assert all(same is given for same, given in zip(unchanged, advantages, strict=True))


def test_the_name_decides_and_one_answer_is_enough_without_a_baseline():
    contradicting = {"name": "rloo", "normalize_rewards": True, "use_leave_one_out_baseline": False}
    assert estimator(**contradicting) == estimator(name="rloo") == Estimator("others")
    alone = {"name": "reinforce_plus_plus", "minus_baseline": False}
    config = GrpoConfig.model_validate({"num_generations_per_prompt": 1, "adv_estimator": alone})
    Estimator.from_config(config.adv_estimator).check_group_size(1)
    with pytest.raises(UserError, match="nothing trains"):
        estimator(name="reinforce_plus_plus").check_group_size(1)
    for wrong, message in (
        ({"num_generations_per_prompt": 1, "adv_estimator": {"name": "rloo"}}, "leaves no other answer"),
        ({"num_generations_per_prompt": 1, "adv_estimator": alone, "use_dynamic_sampling": True}, "no groups of"),
        ({"adv_estimator": {"minus_baseline": False}}, "minus_baseline=false is for name=reinforce_plus_plus"),
        ({"adv_estimator": {"name": "gdpo"}}, "'grpo', 'rloo', 'dr_grpo', 'reinforce_plus_plus' or 'gae'"),
    ):
        with pytest.raises(ValidationError, match=message):
            GrpoConfig.model_validate(wrong)


def test_scale_rewards_by_hand():
    # [-1, 3] onto [0, 10]: 1 is halfway; 5 is clamped to 3.
    scaled = scale_rewards(torch.tensor([1.0, 5.0, -1.0]), -1.0, 3.0, 0.0, 10.0)
    assert scaled.tolist() == [5.0, 10.0, 0.0]
    with pytest.raises(UserError, match="source_max"):
        scale_rewards(torch.tensor([1.0]), 1.0, 1.0, 0.0, 1.0)


def test_soft_overlong_penalty_by_hand():
    # Limit 100, buffer 20: no penalty to 80, half at 90, full from 100.
    penalty = soft_overlong_penalty(torch.tensor([10, 80, 90, 100, 120]), 100, 20, 2.0)
    assert penalty.tolist() == [0.0, 0.0, -1.0, -2.0, -2.0]
    for limit, buffer, amount in [(100, 0, 1.0), (100, 101, 1.0), (100, 20, -1.0)]:
        with pytest.raises(UserError, match="overlong_buffer"):
            soft_overlong_penalty(torch.tensor([1]), limit, buffer, amount)


def test_stop_properly_penalty_by_hand():
    rewards = stop_properly_penalty(torch.tensor([1.0, 1.0]), torch.tensor([True, False]), 0.25)
    assert rewards.tolist() == [0.25, 1.0]
    with pytest.raises(UserError, match="stop_properly"):
        stop_properly_penalty(torch.tensor([1.0]), torch.tensor([True]), 2.0)


def test_overlong_rows_lose_their_targets_and_their_count():
    rows = [make_row(5, 3), make_row(5, 2, 1)]
    filtered = filter_overlong(rows, [True, False])
    assert [row.num_targets for row in filtered] == [0, 2]
    assert [row.num_targets for row in rows] == [3, 2]  # the given rows are untouched
    assert GRPOObjective(GRPOConfig()).count(filtered) == 2
    assert GRPOObjective(GRPOConfig(token_level_loss=False)).count(filtered) == 1


def test_logprob_error_masking_by_hand():
    # Row 0: factors 2 and 4, mean 3; row 1: factor 1.
    log2 = math.log(2)
    rows = [
        make_row(4, 2, 0, old_logps=torch.tensor([-1.0, -1.0]), rollout_logps=torch.tensor([log2 - 1, -1 - 2 * log2])),
        make_row(4, 2, 1, old_logps=torch.tensor([-1.0, -1.0]), rollout_logps=torch.tensor([-1.0, -1.0])),
    ]
    rows[0].row_fields["reward"], rows[1].row_fields["reward"] = 1.0, 0.0
    measured = mask_by_logprob_error(rows, None)
    assert measured.num_masked == 0 and measured.max_error == pytest.approx(3.0, rel=1e-6)
    masked = mask_by_logprob_error(rows, 2.9)
    assert [row.num_targets for row in masked.rows] == [0, 2]
    assert (masked.num_masked, masked.masked_positive_share) == (1, 1.0)
    assert masked.max_error_after_mask == pytest.approx(1.0)
    rows[1].token_fields["rollout_logps"][:] = torch.nan
    assert mask_by_logprob_error(rows, 5.0).num_masked == 1
