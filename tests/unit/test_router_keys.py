"""Keys of experts and their router: what cannot work is refused before weights load, what is not followed is said."""

from typing import Any

import pytest

from megatron_lora.config import check_recipe
from megatron_lora.config.schema_policy import PolicyConfig
from megatron_lora.conversion.hf_model import read_hf_model
from megatron_lora.errors import UserError
from megatron_lora.lora.describe import describe
from megatron_lora.lora.model_spec import ModelSizes, ModelSpec
from megatron_lora.policy.layout_checks import check_layout
from megatron_lora.policy.router_checks import router_notices
from megatron_lora.policy.shared_prefix import unshared_reason
from megatron_lora.trainers.metric_names import metric_names
from tests.support.models import family_config

DENSE = describe(ModelSizes("llama", 64, 96, 4, 4, 2, 16, 100, False))
EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_token": 2, "moe_ffn_hidden_size": 48}
PLAIN = describe(ModelSizes("qwen3_moe", 64, 96, 4, 4, 2, 16, 100, False, **EXPERTS))
BIASED = describe(ModelSizes("glm4_moe", 64, 96, 4, 4, 2, 16, 100, False, shared_ffn_hidden_size=48, **EXPERTS))
OVERLAP = {"moe_shared_expert_overlap": True}
SPLIT = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
RECOMPUTED = {
    "activation_checkpointing": True,
    "recompute_granularity": "selective",
    "recompute_modules": ["shared_experts"],
}


def policy(**megatron: Any) -> PolicyConfig:
    return PolicyConfig.model_validate(
        {"model_name": "m", "megatron_cfg": {"enabled": True, "peft": {"enabled": True}, **megatron}}
    )


@pytest.mark.parametrize(
    ("keys", "shape", "message"),
    [
        ({"moe_token_dispatcher_type": "flex"}, PLAIN, "needs DeepEP or HybridEP.* set it to alltoall"),
        ({"moe_router_enable_expert_bias": True}, PLAIN, "qwen3_moe model has no bias.* set it to null"),
        ({"moe_router_enable_expert_bias": False}, BIASED, "glm4_moe model has a bias.* set it to null"),
        ({"moe_router_bias_update_rate": 1e-3}, BIASED, "bias_update_rate=0.001: .* set it to 0"),
        (OVERLAP | {"moe_token_dispatcher_type": "allgather"}, BIASED, "type=alltoall, got allgather"),
        (OVERLAP | SPLIT, BIASED, "overlap=true at tensor_model_parallel_size=2"),
        (OVERLAP | RECOMPUTED, BIASED, "recompute_modules has shared_experts"),
    ],
)
def test_what_cannot_work_is_refused(keys: dict[str, Any], shape: ModelSpec, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_layout(policy(**keys), shape, 4)
    if "recompute_modules" not in keys:
        # Of a model without experts none of it is read, as in NeMo RL.
        check_layout(policy(**keys), DENSE, 4)


@pytest.mark.parametrize(
    ("keys", "shape"),
    [
        ({"moe_router_bias_update_rate": 1e-3}, PLAIN),
        ({"moe_router_enable_expert_bias": True}, BIASED),
        ({"moe_router_enable_expert_bias": False, "moe_token_dispatcher_type": "allgather"}, PLAIN),
        (OVERLAP, BIASED),
        (OVERLAP | SPLIT | {"moe_token_dispatcher_type": "allgather"}, PLAIN),
    ],
)
def test_what_works_passes(keys: dict[str, Any], shape: ModelSpec) -> None:
    check_layout(policy(**keys), shape, 4)


def test_a_router_beside_adapters_stays_frozen_and_a_run_says_so() -> None:
    [notice] = router_notices(policy(freeze_moe_router=False).megatron_cfg, PLAIN)
    assert "the router's own weights stay frozen" in notice
    for value in (True, None):
        assert not router_notices(policy(freeze_moe_router=value).megatron_cfg, PLAIN)
    assert not router_notices(policy(freeze_moe_router=False).megatron_cfg, DENSE)


def test_rows_share_no_prefix_where_their_tokens_are_counted() -> None:
    def reason(shape: ModelSpec, **megatron: Any) -> str | None:
        found = policy(**megatron)
        return unshared_reason(
            found, model_type=shape.model_type, head_dim=16, num_experts=shape.num_experts, on_gpu=False
        )

    balanced = {"moe_router_load_balancing_type": "aux_loss"}
    assert "aux_loss counts" in (reason(PLAIN, **balanced) or "")
    assert reason(DENSE, **balanced) is None and reason(PLAIN) is None
    assert reason(PLAIN, **balanced, moe_aux_loss_coeff=0) is None


@pytest.mark.parametrize(
    ("family", "changes", "wanted"),
    [
        ("qwen3_moe", {}, 0.001),
        ("olmoe", {"router_aux_loss_coef": 0.02}, 0.02),
        ("glm4_moe", {}, 0.001),
        ("deepseek_v3", {"aux_loss_alpha": 0.003}, 0.003),
    ],
)
def test_the_coefficient_is_that_of_the_model(family: str, changes: dict[str, Any], wanted: float, tmp_path) -> None:
    family_config(family, **changes).save_pretrained(tmp_path)
    assert read_hf_model(tmp_path).balancing_coefficient == wanted
    overridden = read_hf_model(tmp_path, overrides={"router_aux_loss_coef": 0.25})
    assert overridden.balancing_coefficient == 0.25


def test_the_metric_of_the_auxiliary_loss_is_known() -> None:
    content: dict[str, Any] = {"sft": {}, "policy": {"model_name": "m"}, "data": {"train": {"data_path": "rows.jsonl"}}}
    assert "load_balancing_loss" not in metric_names(check_recipe(content).recipe, "train")
    content["policy"]["megatron_cfg"] = {"moe_router_load_balancing_type": "aux_loss"}
    found = check_recipe(content).recipe
    assert "load_balancing_loss" in metric_names(found, "train")
    assert "load_balancing_loss" not in metric_names(found, "validation")
