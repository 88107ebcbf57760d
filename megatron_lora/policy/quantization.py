"""Whether a run's base is held in other than its own form, what that rules out, and its weights in 4 bits."""

from torch import Tensor

from megatron_lora.config.schema_policy import PolicyConfig
from megatron_lora.conversion.four_bit_folder import FourBitFolder, QuantizedWeights
from megatron_lora.conversion.hf_model import QUANTIZATION, HFModel
from megatron_lora.conversion.inventory import open_model
from megatron_lora.conversion.model_names import ModelParameter, fused_rows, shard_parameter
from megatron_lora.conversion.safetensors_io import SafetensorsFolder
from megatron_lora.conversion.weight_source import WeightSource
from megatron_lora.errors import UserError
from megatron_lora.lora.four_bit import FourBitMatrix, check_blocks, stack_rows, weight_names
from megatron_lora.lora.model_spec import ModelSpec
from megatron_lora.policy.fp8_base import check_fp8
from megatron_lora.policy.preload import base_folder

FourBitSource = FourBitFolder | QuantizedWeights


def check_quantization(policy: PolicyConfig, model: HFModel) -> list[str]:
    """Notices for the user. Raises UserError for a base in 4 bits or FP8 that the recipe cannot be run on; by config
    alone."""
    adapter, section = policy.adapter, policy.adapter_section
    notices = []
    if model.stored_four_bit:
        name = f"policy.model_name={policy.model_name}"
        stored = model.content[QUANTIZATION]
        kind, double = stored.get("bnb_4bit_quant_type", "fp4"), bool(stored.get("bnb_4bit_use_double_quant"))
        if not adapter.enabled:
            raise UserError(
                f"{name} is stored in 4 bits, and {section}.enabled=false is full fine-tuning: 4-bit weights take no "
                "gradient steps; train adapters (enabled=true), or give the model in bfloat16"
            )
        if adapter.lora_dtype is None:
            raise UserError(
                f"{name} is stored in 4 bits, and {section}.lora_dtype is null: the adapters' dtype follows the base "
                "weights', and those have none in 4 bits; set lora_dtype to bfloat16 or float32 (DTensor backend: "
                "float32)"
            )
        if adapter.quantization not in (None, kind) or (adapter.double_quantization and not double):
            raise UserError(
                f"{name} is stored in 4 bits ({kind}, bnb_4bit_use_double_quant={double}) and trained on as it is; "
                f"{section} asks for quantization={adapter.quantization}, double_quantization="
                f"{adapter.double_quantization}; set quantization=null, or give the model in bfloat16"
            )
        if adapter.init_lora_weights is not None:
            raise UserError(
                f"{name} is stored in 4 bits, where the change that {section}.init_lora_weights="
                f"{adapter.init_lora_weights} makes to the weights would be lost; leave it out, or give the model in "
                "bfloat16"
            )
        notices.append(f"the base is stored in 4 bits ({kind}) and used as it is")
    if model.stored_four_bit or adapter.quantization is not None:
        if model.shapes.num_experts:
            raise UserError(
                f"policy.model_name={policy.model_name} has experts, whose weights are not held in 4 bits yet; give "
                f"the model in bfloat16 and set {section}.quantization=null"
            )
        check_blocks(model.shapes, *_tensor_parallel(policy))
    return notices + check_fp8(policy, model)


def _tensor_parallel(policy: PolicyConfig) -> tuple[int, str]:
    if policy.backend == "megatron":
        key = "policy.megatron_cfg.tensor_model_parallel_size"
        return policy.megatron_cfg.tensor_model_parallel_size, key
    return policy.dtensor_cfg.tensor_parallel_size, "policy.dtensor_cfg.tensor_parallel_size"


def open_base(policy: PolicyConfig) -> tuple[HFModel, WeightSource]:
    """The recipe's base, its linears in the form that the run holds them in. Raises UserError as `open_model` and
    `check_quantization` do."""
    folder = base_folder(policy)
    model, weights = open_model(policy.model_name, folder, policy.hf_config_overrides)
    check_quantization(policy, model)
    return model, _as_held(policy, model, weights)


def _as_held(policy: PolicyConfig, model: HFModel, weights: SafetensorsFolder | FourBitFolder) -> WeightSource:
    adapter = policy.adapter
    if adapter.quantization is None or isinstance(weights, FourBitFolder):
        return weights
    return QuantizedWeights(
        weights, weight_names(model.shapes), adapter.quantization, double=adapter.double_quantization
    )


def local_matrix(
    entry: ModelParameter, weights: WeightSource, shapes: ModelSpec, tp_rank: int, tp_size: int
) -> FourBitMatrix | None:
    """A tensor-parallel rank's part of a fused linear, on the CPU; None for one that is dense. Raises UserError where
    only some of its Hugging Face linears are in 4 bits."""
    if not isinstance(weights, FourBitSource):
        return None
    dense = [name for name in entry.hf_names if name not in weights.four_bit]
    if len(dense) == len(entry.hf_names):
        return None
    if dense:
        raise UserError(
            f"{weights.folder} holds {', '.join(dense)} dense and the other parts of {entry.name} in 4 bits; they are "
            "one linear here: quantize the base without such exceptions (llm_int8_skip_modules)"
        )
    parts = [weights.read_four_bit(name) for name in entry.hf_names]
    whole = stack_rows([part for part in parts if part is not None])
    order = fused_rows(entry, shapes)
    if entry.tp_axis == 0:
        local: Tensor = shard_parameter(entry, order, tp_rank, tp_size, order.numel() // tp_size, shapes)
        return whole.rows(local)
    columns = entry.shape[1] // tp_size
    return whole.columns(tp_rank * columns, (tp_rank + 1) * columns)
