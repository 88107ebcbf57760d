"""Whether micro-batches run as CUDA graphs: `policy.megatron_cfg.cuda_graph_impl`."""

from megatron_lora.config.schema import PolicyConfig
from megatron_lora.errors import UserError
from megatron_lora.lora.model_spec import ModelSpec

_KEY = "policy.megatron_cfg.cuda_graph_impl"


def ungraphed_reason(policy: PolicyConfig, shapes: ModelSpec) -> str | None:
    """Why micro-batches do not run as CUDA graphs: None where they do, on a GPU. Raises UserError where the recipe asks
    for it and the layout, the adapter or the model does not allow it."""
    if policy.megatron_cfg.cuda_graph_impl == "none":
        return f"{_KEY}=none"
    reason = _reason_against(policy, shapes)
    if reason and policy.megatron_cfg.cuda_graph_impl == "local":
        raise UserError(f"{_KEY}=local, but {reason}; set it to null, which leaves graphs off there")
    return reason


def _reason_against(policy: PolicyConfig, shapes: ModelSpec) -> str | None:
    megatron = policy.megatron_cfg
    if policy.backend != "megatron":
        return "policy.megatron_cfg.enabled=false"
    # What ranks exchange inside a layer is not recorded.
    for name in ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size"):
        if getattr(megatron, name) > 1:
            return f"graphs hold a whole model on one GPU, and policy.megatron_cfg.{name}={getattr(megatron, name)}"
    if megatron.activation_checkpointing:
        return "policy.megatron_cfg.activation_checkpointing=true"
    if policy.precision != "bfloat16":
        return f"attention in policy.precision={policy.precision} asks the host for each row's length"
    if not megatron.use_fused_linear_logprobs:
        return "policy.megatron_cfg.use_fused_linear_logprobs=false"
    if shapes.linear_layers:
        return f"the host has to know each row's length for {shapes.recurrence}"
    if shapes.num_experts:
        return "the host has to know how many tokens each expert gets"
    return _reason_of_adapter(policy)


def _reason_of_adapter(policy: PolicyConfig) -> str | None:
    peft = policy.megatron_cfg.peft
    if not peft.enabled:
        return "all weights train"
    if peft.type == "dora":
        return "policy.megatron_cfg.peft.type=dora computes norms anew after each step"
    if peft.quantization is not None:
        return f"policy.megatron_cfg.peft.quantization={peft.quantization} makes weights dense in between"
    if peft.dropout > 0:
        return f"policy.megatron_cfg.peft.dropout={peft.dropout:g} draws masks anew"
    if peft.modules_to_save:
        return "modules train whole beside the adapters (policy.megatron_cfg.peft.modules_to_save)"
    return None
