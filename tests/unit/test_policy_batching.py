"""How many tokens a pass takes at once: what a recipe says is obeyed, what it leaves open follows training."""

from typing import Any

import pytest
import torch

from megatron_lora.config.schema_policy import PolicyConfig
from megatron_lora.data.batch import Row
from megatron_lora.policy.batching import BatchingOptions, Purpose, divide

LENGTH, ROWS = 100, 24
PACKED = {"sequence_packing": {"enabled": True, "train_mb_tokens": 400}}
DYNAMIC = {"dynamic_batching": {"enabled": True, "train_mb_tokens": 400}}


def tokens(policy: dict[str, Any], purpose: Purpose, **options: Any) -> int:
    """The most tokens in a micro-batch of rows of 100."""
    rows = [Row(torch.arange(LENGTH) + n, torch.arange(LENGTH) > 9, index=n) for n in range(ROWS)]
    recipe = {"model_name": "m", "train_global_batch_size": 32, "max_total_sequence_length": 100}
    share = divide(
        [[row] for row in rows],
        PolicyConfig.model_validate(recipe | policy),
        BatchingOptions(pad_token_id=0, **options),
        dp_size=1,
        dp_rank=0,
        purpose=purpose,
    )
    assert share.num_tokens == ROWS * LENGTH == sum(batch.tokens.numel() for batch in share.batches)
    return max(batch.tokens.numel() for batch in share.batches)


@pytest.mark.parametrize("policy", [PACKED, DYNAMIC, {"train_micro_batch_size": 4}], ids=str)
def test_passes_without_gradients_take_more(policy: dict[str, Any]) -> None:
    assert tokens(policy, "training") == 400
    assert tokens(policy, "scoring") == tokens(policy, "evaluation") == 1600
    # Whole logits grow with the tokens, and a pipeline idles with few micro-batches.
    for options in ({"bounded_logits": False}, {"num_stages": 2}):
        assert tokens(policy, "scoring", **options) == tokens(policy, "evaluation", **options) == 400


def test_training_with_more_than_saturates_a_gpu_is_followed() -> None:
    large = {"sequence_packing": {"enabled": True, "train_mb_tokens": 20_000}}
    assert tokens(large, "scoring") == ROWS * LENGTH


@pytest.mark.parametrize(
    ("policy", "wanted"),
    [
        (PACKED | {"logprob_batch_size": 2}, 200),
        ({"sequence_packing": PACKED["sequence_packing"] | {"logprob_mb_tokens": 300}}, 300),
        ({"dynamic_batching": DYNAMIC["dynamic_batching"] | {"logprob_mb_tokens": 100}}, 100),
        ({"train_micro_batch_size": 4, "logprob_batch_size": 3}, 300),
    ],
    ids=str,
)
def test_explicit_numbers_are_obeyed(policy: dict[str, Any], wanted: int) -> None:
    assert tokens(policy, "scoring") == wanted


def test_validation_packs_as_training_does_whatever_scoring_is_told() -> None:
    assert tokens(PACKED | {"logprob_batch_size": 1}, "evaluation") == 1600
