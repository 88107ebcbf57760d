"""GRPO with an environment: answers of several turns by the training model itself, from the command line."""

from pathlib import Path

import pytest

from tests.end_to_end.test_grpo import NATIVE, recipe
from tests.support.runs import assert_names_are_known, metrics, run, save_base

pytestmark = [pytest.mark.timeout(900), pytest.mark.long]
STEPS = 14


def test_what_the_model_writes_is_learned_and_what_the_environment_answers_is_not(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    # Half of the vocabulary ends a turn, as a random model's rarely end otherwise.
    values = recipe(base, NATIVE | {"max_new_tokens": 5, "stop_token_ids": list(range(5, 133))}, max_num_steps=STEPS)
    values["grpo"] |= {"max_rollout_turns": 3, "num_prompts_per_step": 8}
    values["policy"] |= {"train_global_batch_size": 32, "train_micro_batch_size": 8}
    values["env"] = {
        "environment": {"path": "tests.support.environments:Letters"},
        "reward_functions": [
            {"kind": "python", "name": "ascii", "function": "tests.support.rewards:ascii_share_of_final_turn"}
        ],
    }
    folder = run(tmp_path / "turns", values, 1)
    lines = metrics(folder)
    assert_names_are_known(folder)
    # The trainer's log-probabilities of what was drawn behind the environment's text are the generator's.
    assert max(line["rollout_logprob_error"] for line in lines) < 1e-5
    for line in lines:
        assert 1.5 < line["num_turns"] <= 3 and line["environment_errors"] == 0
        # Three letters a turn but the last; 32 answers, whose other tokens carry loss.
        assert line["environment_tokens"] == pytest.approx(3 * (line["num_turns"] - 1))
        drawn = 32 * (line["response_length"] - line["environment_tokens"])
        assert line["num_target_tokens"] == pytest.approx(drawn)
    rewards = [line["reward"] for line in lines]
    assert sum(rewards[-3:]) > sum(rewards[:3]) + 0.3, rewards
    assert {line["step"] for line in metrics(folder, "validation")} == set(range(2, STEPS + 1, 2))
