"""Settings of a model's experts and their router that cannot work, before any weight is loaded."""

from megatron_lora.config.schema_megatron import MegatronConfig
from megatron_lora.config.schema_policy import PolicyConfig
from megatron_lora.errors import UserError
from megatron_lora.lora.model_spec import ModelSpec

_MEGATRON = "policy.megatron_cfg"


def check_router(megatron: MegatronConfig, shape: ModelSpec) -> None:
    """Raise UserError for a setting that a model with experts does not take. The model has experts."""
    _check_bias(megatron, shape)
    if megatron.moe_token_dispatcher_type == "flex":
        raise UserError(
            f"{_MEGATRON}.moe_token_dispatcher_type=flex needs DeepEP or HybridEP, which are not used here; set it to "
            "alltoall, which computes the same"
        )
    if not megatron.moe_shared_expert_overlap or not shape.shared_ffn_hidden_size:
        return
    key = f"{_MEGATRON}.moe_shared_expert_overlap=true"
    if megatron.moe_token_dispatcher_type != "alltoall":
        raise UserError(
            f"{key} works with moe_token_dispatcher_type=alltoall, got {megatron.moe_token_dispatcher_type}; set it to "
            "alltoall, or moe_shared_expert_overlap=false"
        )
    if megatron.tensor_model_parallel_size > 1:
        raise UserError(
            f"{key} at tensor_model_parallel_size={megatron.tensor_model_parallel_size}: adapters on shared experts "
            "exchange between tensor-parallel ranks within their linears, not beside the dispatcher; set it to false"
        )
    if megatron.activation_checkpointing and "shared_experts" in (megatron.recompute_modules or []):
        raise UserError(f"{key}, and recompute_modules has shared_experts: leave one of the two out")


def check_replay(policy: PolicyConfig, shape: ModelSpec) -> None:
    """Raise UserError where the rollout engine's choice of experts cannot be had or followed."""
    if not policy.router_replay.enabled:
        return
    reason = policy.generation.engine.no_experts
    if not shape.num_experts:
        reason = f"a {shape.model_type} model has no experts"
    elif policy.backend != "megatron":
        reason = f"the experts of transformers' models choose for themselves ({_MEGATRON}.enabled=false)"
    elif reason == "" and _recomputes_routers(policy.megatron_cfg):
        reason = (
            f"{_MEGATRON}.recompute_modules has moe, which routes again when a stage of a pipeline has other tokens; "
            "recompute moe_act or whole layers instead"
        )
    if reason:
        raise UserError(f"policy.router_replay.enabled=true, but {reason}; set it to false")


def _recomputes_routers(megatron: MegatronConfig) -> bool:
    """Whether routers run again in the backward pass without the layer around them, with other micro-batches' forward
    passes in between."""
    selective = megatron.activation_checkpointing and megatron.recompute_granularity == "selective"
    return selective and "moe" in (megatron.recompute_modules or []) and megatron.pipeline_model_parallel_size > 1


def router_notices(megatron: MegatronConfig, shape: ModelSpec) -> list[str]:
    """What of these settings a run of this model does not follow."""
    if not shape.num_experts or megatron.freeze_moe_router is not False or not megatron.peft.enabled:
        return []
    return [
        f"{_MEGATRON}.freeze_moe_router=false: beside adapters the router's own weights stay frozen, like the rest of "
        "the base"
    ]


def _check_bias(megatron: MegatronConfig, shape: ModelSpec) -> None:
    biased = any(other.name.endswith("router.expert_bias") for other in shape.others)
    wanted, rate = megatron.moe_router_enable_expert_bias, megatron.moe_router_bias_update_rate
    if wanted is not None and wanted != biased:
        has = "has a bias by which it chooses experts" if biased else "has no bias by which it chooses experts"
        raise UserError(
            f"{_MEGATRON}.moe_router_enable_expert_bias={str(wanted).lower()}: the router of a {shape.model_type} "
            f"model {has}, and its files with it; set it to null"
        )
    if biased and rate > 0:
        raise UserError(
            f"{_MEGATRON}.moe_router_bias_update_rate={rate}: the bias by which the router of a {shape.model_type} "
            "model chooses experts is the base's, and no adapter's file has a place for another; set it to 0"
        )
