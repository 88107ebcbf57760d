"""Whether a run's base is held in other than its own form, what that rules out, and its weights in 4 bits."""

from collections.abc import Sequence

from torch import Tensor

from megatron_lora.config.schema_policy import PolicyConfig
from megatron_lora.conversion.experts import packed_rows
from megatron_lora.conversion.four_bit_folder import FourBitFolder, QuantizedWeights
from megatron_lora.conversion.hf_model import QUANTIZATION, HFModel
from megatron_lora.conversion.inventory import open_model
from megatron_lora.conversion.model_names import ModelParameter, fused_rows, shard_parameter
from megatron_lora.conversion.safetensors_io import SafetensorsFolder
from megatron_lora.conversion.weight_source import WeightSource
from megatron_lora.errors import UserError
from megatron_lora.lora.four_bit import FourBitMatrix, check_blocks, layer_linears, stack_rows, weight_names
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
        if model.shapes.num_experts and policy.backend != "megatron":
            raise UserError(
                f"policy.model_name={policy.model_name} has experts, and transformers multiplies with one dense tensor "
                f"of all of a layer's: the DTensor backend holds none in 4 bits; set policy.megatron_cfg.enabled="
                f"true, or give the model in bfloat16 and set {section}.quantization=null"
            )
        linears = layer_linears(model.shapes)
        check_blocks([linear for linear in linears if not linear.experts], *_tensor_parallel(policy))
        if adapter.quantization is not None:
            _check_experts(policy, model.shapes)
    return notices + check_fp8(policy, model)


def _check_experts(policy: PolicyConfig, shapes: ModelSpec) -> None:
    size = policy.megatron_cfg.expert_tensor_parallel_size
    experts = [linear for linear in layer_linears(shapes) if linear.experts]
    check_blocks(experts, size, "policy.megatron_cfg.expert_tensor_parallel_size")


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
    if isinstance(weights, FourBitFolder):
        # transformers 5 leaves experts dense, older ones have them in 4 bits.
        if any(".experts." in name for name in weights.four_bit):
            _check_experts(policy, model.shapes)
        return weights
    if adapter.quantization is None:
        return weights
    return QuantizedWeights(
        weights, weight_names(model.shapes), adapter.quantization, double=adapter.double_quantization
    )


def local_matrix(
    entry: ModelParameter, weights: WeightSource, shapes: ModelSpec, tp_rank: int, tp_size: int
) -> FourBitMatrix | None:
    """A tensor-parallel rank's part of a fused linear (of one expert, an expert-tensor-parallel rank's), on the CPU;
    None for one that is dense. Raises UserError where only some of its Hugging Face linears are in 4 bits."""
    if not isinstance(weights, FourBitSource) or not _all_in_four_bits(weights, entry.hf_names, entry.name):
        return None
    parts = [weights.read_four_bit(name) for name in entry.hf_names]
    whole = stack_rows([part for part in parts if part is not None])
    order = fused_rows(entry, shapes)
    if entry.tp_axis == 0:
        local: Tensor = shard_parameter(entry, order, tp_rank, tp_size, order.numel() // tp_size, shapes)
        return whole.rows(local)
    columns = entry.shape[1] // tp_size
    return whole.columns(tp_rank * columns, (tp_rank + 1) * columns)


def local_experts(
    entries: Sequence[ModelParameter],
    numbers: Sequence[int],
    weights: WeightSource,
    shapes: ModelSpec,
    etp_rank: int,
    etp_size: int,
) -> FourBitMatrix | None:
    """The parts that a rank holds of one linear of its experts, rows of one expert after those of the other, on the
    CPU; None where they are dense. entries: of each expert, or the one of all. numbers: of the rank's experts in the
    layer. Raises UserError where only some are in 4 bits."""
    names = [name for entry in entries for name in entry.hf_names]
    if not isinstance(weights, FourBitSource) or not _all_in_four_bits(weights, names, "a layer's experts"):
        return None
    if entries[0].packed is not None:
        whole = weights.read_four_bit(names[0])
        assert whole is not None
        return whole.rows(packed_rows(shapes.linear(entries[0].packed), numbers))
    matrices = [local_matrix(entry, weights, shapes, etp_rank, etp_size) for entry in entries]
    return stack_rows([matrix for matrix in matrices if matrix is not None])


def _all_in_four_bits(weights: FourBitSource, names: Sequence[str], what: str) -> bool:
    """Whether they are, False where none is. Raises UserError for some."""
    dense = [name for name in names if name not in weights.four_bit]
    if dense and len(dense) < len(names):
        raise UserError(
            f"{weights.folder} holds {', '.join(dense[:3])} dense and the other parts of {what} in 4 bits; they are "
            "one linear here: quantize the base without such exceptions (llm_int8_skip_modules)"
        )
    return not dense
