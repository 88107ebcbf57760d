"""Whether rows that begin alike send what they share through the model once: `policy.shared_prefix`."""

from megatron_lora.config.schema import PolicyConfig
from megatron_lora.errors import UserError
from megatron_lora.lora.model_tables import RECURRENT
from megatron_lora.runtime.shared_attention import LARGEST_HEAD_DIM


def unshared_reason(
    policy: PolicyConfig, *, model_type: str, head_dim: int, num_experts: int, on_gpu: bool
) -> str | None:
    """Why prefixes are not shared: None where they are. Raises UserError where the recipe asks for it and the layout or
    the model does not allow it."""
    if policy.shared_prefix is False:
        return "policy.shared_prefix=false"
    reason = _reason_against(policy, model_type=model_type, head_dim=head_dim, on_gpu=on_gpu)
    if num_experts and policy.backend == "megatron" and policy.megatron_cfg.balances_experts:
        reason = (
            "policy.megatron_cfg.moe_router_load_balancing_type=aux_loss counts each row's tokens, those it shares too"
        )
    if reason and policy.shared_prefix is True:
        raise UserError(f"policy.shared_prefix=true, but {reason}; set it to auto, which leaves it off there")
    return reason


def _reason_against(policy: PolicyConfig, *, model_type: str, head_dim: int, on_gpu: bool) -> str | None:
    if model_type in RECURRENT:
        return "some of its layers carry a state from token to token, which follows one row"
    if policy.backend != "megatron":
        return None
    if policy.megatron_cfg.context_parallel_size > 1:
        return (
            f"policy.megatron_cfg.context_parallel_size={policy.megatron_cfg.context_parallel_size} splits rows over "
            "ranks one by one"
        )
    if not on_gpu or policy.precision == "float32":
        return None
    if model_type.startswith("gemma"):
        return f"the attention of a {model_type} model on a GPU is of two kinds"
    if model_type == "gpt_oss":
        return "its kernel knows no attention sinks, which a gpt_oss model has"
    if head_dim > LARGEST_HEAD_DIM:
        return f"its kernel takes heads of at most {LARGEST_HEAD_DIM}, and the model's are {head_dim} wide"
    return None
