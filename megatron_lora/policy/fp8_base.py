"""Whether a run's base is held in FP8 (`policy.megatron_cfg.fp8_cfg`), which parts of it, and what that rules out."""

import torch

from megatron_lora.config.schema_policy import PolicyConfig
from megatron_lora.conversion.hf_model import HFModel
from megatron_lora.errors import UserError
from megatron_lora.lora.fp8 import MULTIPLE, check_card
from megatron_lora.lora.model_spec import LAYER, LinearSpec, ModelSpec, resolve

_KEY = "policy.megatron_cfg.fp8_cfg"
ENABLED = f"{_KEY}.enabled=true"


def check_fp8(policy: PolicyConfig, model: HFModel) -> list[str]:
    """Notices for the user. Raises UserError where the recipe or the model does not go with a base in FP8; by config
    alone."""
    if not policy.in_fp8:
        return []
    reason = _reason_of_adapter(policy) or _reason_of_model(policy, model)
    if reason is not None:
        raise UserError(f"{ENABLED}, but {reason}, or set {_KEY}.enabled=false")
    options = policy.megatron_cfg.fp8_cfg
    return [
        f"the base's linears are multiplied with in FP8 ({options.fp8}, scales {options.fp8_recipe}); exports and "
        "merged weights are of the base as its folder has it"
    ]


def check_fp8_card(policy: PolicyConfig, device: torch.device) -> None:
    """Raise UserError where the recipe asks for FP8 and this process's card has none."""
    if policy.in_fp8:
        check_card(device, ENABLED)


def _reason_of_adapter(policy: PolicyConfig) -> str | None:
    peft, key = policy.megatron_cfg.peft, "policy.megatron_cfg.peft"
    if not peft.enabled:
        return (
            f"{key}.enabled=false is full fine-tuning, and weights in FP8 take no gradient steps; train adapters "
            "(enabled=true)"
        )
    if policy.precision != "bfloat16":
        return f"policy.precision={policy.precision}, and products in FP8 have bfloat16 results; use bfloat16"
    if peft.type == "dora":
        return (
            f"{key}.type=dora divides by norms of the base's own rows, which the rounded ones differ from; use another "
            "type"
        )
    if peft.quantization is not None:
        return f"{key}.quantization={peft.quantization} holds the same weights in 4 bits; set it to null"
    if peft.init_lora_weights is not None:
        return (
            f"{key}.init_lora_weights={peft.init_lora_weights} changes the base's weights, and exports take them from "
            "its folder; leave it out"
        )
    return None


def _reason_of_model(policy: PolicyConfig, model: HFModel) -> str | None:
    name, tp = f"policy.model_name={policy.model_name}", policy.megatron_cfg.tensor_model_parallel_size
    if model.stored_four_bit:
        return f"{name} is stored in 4 bits; give it in bfloat16"
    if model.shapes.num_experts:
        return f"{name} has experts, whose products are not there in FP8; use a model without"
    for linear in _linears(model.shapes):
        sides = {"column": (tp, 1), "row": (1, tp), "replicated": (1, 1)}[linear.parallel]
        rows, columns = linear.out_features // sides[0], linear.in_features // sides[1]
        if rows % MULTIPLE or columns % MULTIPLE:
            of_rank = " on each tensor-parallel rank" if tp > 1 else ""
            return (
                f"{linear.kind} of {policy.model_name} has {rows} x {columns} values{of_rank}, and FP8 products take "
                f"multiples of {MULTIPLE}; use another model or tensor_model_parallel_size"
            )
    return None


def _linears(shapes: ModelSpec) -> list[LinearSpec]:
    """Those of layers. Embeddings, norms and head stay as they are."""
    return [linear for linear in shapes.linears if linear.name.startswith(LAYER) and not linear.experts]


def fp8_names(shapes: ModelSpec) -> frozenset[str]:
    """Megatron's names of the weights that a base in FP8 has so, of all layers."""
    return frozenset(
        f"{resolve(linear.name, layer)}.weight"
        for linear in _linears(shapes)
        for layer in range(shapes.num_layers)
        if linear.is_in(layer)
    )


def gradient_format(policy: PolicyConfig) -> torch.dtype:
    """In what the gradients of the linears' outputs are quantized."""
    return torch.float8_e5m2 if policy.megatron_cfg.fp8_cfg.fp8 == "hybrid" else torch.float8_e4m3fn
