"""Adapters on the experts of a model and its routers: their ranks, and what does not go with them, before any weight is
loaded."""

from collections.abc import Sequence

from megatron_lora.config.schema_adapters import LoraConfig, PeftConfig
from megatron_lora.config.schema_policy import PolicyConfig
from megatron_lora.errors import UserError
from megatron_lora.lora.layout import AdapterSpec, ModelSpec, without_expert
from megatron_lora.lora.packed_experts import adapts_experts, is_on_experts, is_on_router
from megatron_lora.lora.peft_format import HFLinear


def expert_ranks(config: PeftConfig | LoraConfig, linears: Sequence[HFLinear], shapes: ModelSpec) -> dict[str, int]:
    """HF linear of an expert -> its rank, where that is not `dim`. Raises UserError where it is no whole number."""
    experts = [linear.name for linear in linears if linear.expert is not None]
    if not experts or not isinstance(config, PeftConfig) or not config.normalize_moe_lora:
        return {}
    routed = shapes.num_experts_per_token
    if config.dim % routed:
        above = -(-config.dim // routed) * routed
        raise UserError(
            f"policy.megatron_cfg.peft.normalize_moe_lora=true divides dim={config.dim} among the {routed} experts "
            f"of a token, which leaves no whole rank; set dim to a multiple of {routed} such as {above}"
        )
    return dict.fromkeys(experts, config.dim // routed)


def check_with_recipe(policy: PolicyConfig, spec: AdapterSpec) -> None:
    """Raise UserError for keys outside the adapter's own that it does not go with: a router that is to stay frozen, and
    dropout where an expert is split over ranks: each would drop others."""
    megatron = policy.megatron_cfg
    on_router = any(map(is_on_router, spec.modules))
    if on_router and megatron.freeze_moe_router:
        raise UserError(
            "policy.megatron_cfg.freeze_moe_router=true, and the adapter is on the router; set it to null, or leave "
            "the router out of target_modules"
        )
    dropout, size = policy.adapter.dropout, megatron.expert_tensor_parallel_size
    if policy.backend == "megatron" and dropout > 0 and size > 1 and adapts_experts(spec):
        raise UserError(
            f"policy.megatron_cfg.peft.dropout={dropout} with adapters on experts at expert_tensor_parallel_size="
            f"{size}: the ranks of an expert do not draw the same; set one to 0, or the other to 1"
        )


def check_expert_adapters(config: PeftConfig | LoraConfig, spec: AdapterSpec, section: str) -> None:
    """Raise UserError for a setting that adapters on experts do not go with. section: the recipe's."""
    on_experts = [module for module in spec.modules if is_on_experts(module, spec.shapes)]
    on_router = any(map(is_on_router, spec.modules))
    if not on_experts and not on_router:
        return
    where = "experts" if on_experts else "router"
    what = f"adapters on the {where} of a {spec.shapes.model_type} model"
    if isinstance(config, LoraConfig):
        raise UserError(
            f"{section}: {what} are trained by the Megatron backend alone; leave the {where}'s linears out of "
            "target_modules, or set policy.megatron_cfg.enabled=true"
        )
    if config.type != "lora":
        raise UserError(
            f"{section}.type={config.type!r}: {what} are of type 'lora', as PEFT has them; set it, or leave the "
            f"{where}'s linears out of target_modules"
        )
    if config.init_lora_weights is not None:
        raise UserError(
            f"{section}.init_lora_weights={config.init_lora_weights}: {what} start from lora_A_init_method; set it to "
            f"null, or leave the {where}'s linears out of target_modules"
        )
    if on_router and config.dropout > 0:
        raise UserError(
            f"{section}.dropout={config.dropout}: an adapter on a router has none, as PEFT's on a bare parameter has "
            "none; set it to 0, or leave the router out of target_modules"
        )
    forms: dict[str, set] = {}
    for module in on_experts:
        forms.setdefault(without_expert(module.name), set()).add(module.blocks)
    for name, blocks in forms.items():
        if len(blocks) > 1:
            raise UserError(
                f"{section}: the experts of {name} have adapters of different rank or alpha, and PEFT has one for a "
                "tensor of all of them; give all experts of a layer the same in rank_pattern and alpha_pattern"
            )


def misread_by_peft(spec: AdapterSpec) -> list[str]:
    """A notice where peft 0.21 does not load the written adapter into transformers' model as it was trained: in a model
    with experts it takes `gate_proj`, `up_proj` and `down_proj` for the experts', whatever stands before them
    (`peft.utils.transformers_weight_conversion`), so its files cannot name those of dense layers and shared experts."""
    names = [
        module.kind
        for module in spec.modules
        if spec.shapes.num_experts and not is_on_experts(module, spec.shapes) and module.kind.endswith(("fc1", "fc2"))
    ]
    if not names:
        return []
    return [
        f"adapters on {', '.join(sorted(set(names)))} of a {spec.shapes.model_type} model: peft 0.21 takes their names "
        "in adapter_config.json for the experts' and would compute something else from hf_adapter/; give transformers "
        "and rollout engines the merged model"
    ]
