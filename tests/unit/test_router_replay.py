"""The experts that a rollout engine named, on their way to the trainer's routers; and what cannot replay them."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from megatron_lora.config import check_recipe
from megatron_lora.config.schema_policy import PolicyConfig
from megatron_lora.data.batch import Row
from megatron_lora.data.packing import collate
from megatron_lora.data.shared_prefix import collate_families
from megatron_lora.errors import UserError
from megatron_lora.lora.describe import describe
from megatron_lora.lora.model_spec import ModelSizes, ModelSpec
from megatron_lora.policy.layout_checks import check_layout
from megatron_lora.rollout.generator import RolloutError, Sample, _with_tensors
from megatron_lora.rollout.routing import reported_experts
from megatron_lora.trainers.metric_names import metric_names
from megatron_lora.trainers.rollout_turns import _joined_experts, _with_unknown

LAYERS, CHOSEN = 3, 2
EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_token": 2, "moe_ffn_hidden_size": 48}
MOE = describe(ModelSizes("qwen3_moe", 64, 96, 4, 4, 2, 16, 100, False, **EXPERTS))
DENSE = describe(ModelSizes("llama", 64, 96, 4, 4, 2, 16, 100, False))


def drawn(num_tokens: int, seed: int = 0) -> torch.Tensor:
    """Different experts for each token and layer."""
    draw = torch.Generator().manual_seed(seed)
    return torch.rand(num_tokens, LAYERS, 8, generator=draw).topk(CHOSEN).indices.to(torch.int16)


def row(ids: list[int], first_target: int, seed: int | None) -> Row:
    experts = None if seed is None else drawn(len(ids), seed)
    return Row(torch.tensor(ids), torch.arange(len(ids)) >= first_target, routed_experts=experts)


def test_each_token_of_a_packed_batch_has_its_own_and_padding_none() -> None:
    rows = [row([5, 6, 7], 1, 0), row([8, 9], 1, None), row([10, 11, 12, 13], 2, 1)]
    batch = collate(rows, pad_token_id=0, row_multiple=4, total_multiple=16)
    found = batch.routed_experts
    assert found is not None
    assert found.shape == (16, LAYERS, CHOSEN)
    for start, one in zip((0, 4, 8), rows, strict=True):
        end = start + len(one)
        assert torch.equal(batch.tokens[start:end], one.input_ids)
        wanted = torch.full((len(one), LAYERS, CHOSEN), -1) if one.routed_experts is None else one.routed_experts
        assert torch.equal(found[start:end], wanted.to(torch.int16))
        assert bool((found[end : start + 4] == -1).all())
    assert bool((found[12:] == -1).all())
    assert collate([replace(one, routed_experts=None) for one in rows], pad_token_id=0).routed_experts is None


def test_a_shared_prefix_has_its_first_rows() -> None:
    rows = [row([5, 6, 7, 8], 2, 0), row([5, 6, 9], 2, 1), row([5, 6, 10, 11, 12], 2, None)]
    batch = collate_families([(2, rows)], pad_token_id=0, total_multiple=16)
    first, second = rows[0].routed_experts, rows[1].routed_experts
    assert batch.routed_experts is not None
    assert first is not None
    assert second is not None
    assert batch.tokens[:8].tolist() == [5, 6, 7, 8, 9, 10, 11, 12]
    wanted = torch.cat([first, second[2:], torch.full((11, LAYERS, CHOSEN), -1, dtype=torch.int16)])
    assert torch.equal(batch.routed_experts, wanted)


def test_experts_of_two_models_are_no_batch() -> None:
    other = replace(row([8, 9], 1, 0), routed_experts=drawn(2)[:, :2])
    with pytest.raises(ValueError, match="shapes"):
        collate([row([5, 6, 7], 1, 0), other], pad_token_id=0)


def test_the_token_drawn_last_was_sent_nowhere_yet() -> None:
    whole = drawn(5)
    found = reported_experts(whole[:4].numpy().astype(np.uint8), 5)
    assert torch.equal(found[:4], whole[:4])
    assert bool((found[4] == -1).all())
    dense_first = whole.clone()
    dense_first[:, 0] = 0
    assert torch.equal(reported_experts(dense_first.numpy(), 5), dense_first)


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (None, "did not report"),
        (np.zeros((4, LAYERS, CHOSEN), np.uint8), "same expert twice"),
        (np.array([[[0, 1]], [[2, 2]], [[0, 3]], [[1, 2]]], np.uint8), "same expert twice"),
        (np.array([[[0, 1]]] * 2, np.uint8), "experts of 2 tokens of an answer, wanted 4"),
    ],
)
def test_a_report_that_is_none_ends_the_run(found: Any, message: str) -> None:
    with pytest.raises(RolloutError, match=message):
        reported_experts(found, 5)


def sample(prompt: list[int], completion: list[int], seed: int) -> Sample:
    experts = drawn(len(prompt) + len(completion), seed)
    experts[-1] = -1
    return Sample(0, prompt, completion, torch.zeros(len(completion)), "stop", "", 0, routed_experts=experts)


def test_a_turn_more_says_what_the_turns_before_could_not() -> None:
    first = sample([5, 6], [7, 8], 0)
    asked = replace(first, routed_experts=_with_unknown(first.routed_experts, 2))
    turn = sample([5, 6, 7, 8, 20, 21], [9, 10], 1)
    found = _joined_experts(asked, turn)
    assert found is not None
    assert first.routed_experts is not None
    assert turn.routed_experts is not None
    assert torch.equal(found, torch.cat([first.routed_experts[:3], turn.routed_experts[3:]]))
    assert _joined_experts(replace(asked, routed_experts=None), turn) is None


def test_samples_travel_with_their_experts() -> None:
    samples = [sample([5, 6], [7], 0), sample([5], [7, 8, 9], 1)]
    pieces = [one.routed_experts for one in samples if one.routed_experts is not None]
    bare = [replace(one, logprobs=torch.empty(0), routed_experts=None) for one in samples]
    logprobs = torch.cat([one.logprobs for one in samples]).numpy()
    found = _with_tensors(bare, logprobs, torch.cat(pieces).numpy())
    for mine, theirs, wanted in zip(found, samples, pieces, strict=True):
        assert mine.routed_experts is not None
        assert torch.equal(mine.routed_experts, wanted)
        assert torch.equal(mine.logprobs, theirs.logprobs)
    assert all(one.routed_experts is None for one in _with_tensors(bare, logprobs, None))


def policy(generation: dict[str, Any] | None = None, megatron: bool = True, **keys: Any) -> PolicyConfig:
    return PolicyConfig.model_validate(
        {
            "model_name": "m",
            "router_replay": {"enabled": True},
            "generation": generation or {},
            "megatron_cfg": {"enabled": megatron, "peft": {"enabled": True}, **keys},
            "dtensor_cfg": {"lora_cfg": {"enabled": True}},
        }
    )


RECOMPUTED = {"activation_checkpointing": True, "recompute_granularity": "selective", "recompute_modules": ["moe"]}
SERVERS = {"colocated": {"enabled": False}, "servers": {"urls": ["http://a:1"]}}


@pytest.mark.parametrize(
    ("policy", "shape", "message"),
    [
        (policy(), DENSE, "a llama model has no experts; set it to false"),
        (policy(megatron=False), MOE, "transformers' models choose for themselves"),
        (policy({"backend": "megatron"}), MOE, "the training model itself answers"),
        (policy(**RECOMPUTED, pipeline_model_parallel_size=2), MOE, "recompute_modules has moe"),
    ],
)
def test_where_it_cannot_work_it_is_refused(policy: PolicyConfig, shape: ModelSpec, message: str) -> None:
    with pytest.raises(UserError, match=f"^policy.router_replay.enabled=true, but .*{message}"):
        check_layout(policy, shape, 4)
    check_layout(policy.model_copy(update={"router_replay": PolicyConfig(model_name="m").router_replay}), shape, 4)


def test_where_it_works_it_passes() -> None:
    check_layout(policy(), MOE, 4)
    check_layout(policy(SERVERS), MOE, 4)
    check_layout(policy(**RECOMPUTED), MOE, 4)


def test_a_recipe_says_what_it_is_for() -> None:
    data = {"train": {"dataset_name": "arithmetic"}}
    values = {"policy": {"model_name": "m", "router_replay": {"enabled": True}}, "data": data, "grpo": {}}
    recipe = check_recipe(values).recipe
    assert "routing_mismatch" in metric_names(recipe, "train")
    with pytest.raises(UserError, match="sft draws no answers"):
        check_recipe({**{name: value for name, value in values.items() if name != "grpo"}, "sft": {}})
    alone = values | {"policy": {"model_name": "m", "router_replay": {"observe_only": True}}}
    with pytest.raises(UserError, match="set enabled=true as well"):
        check_recipe(alone)
