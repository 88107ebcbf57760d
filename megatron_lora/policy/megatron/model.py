"""A Megatron-Core model of a Hugging Face base: the only file that touches layer specs and provider settings."""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnBackend

from megatron_lora.config.schema import PolicyConfig
from megatron_lora.conversion.hf_model import HFModel
from megatron_lora.conversion.weight_source import WeightSource
from megatron_lora.errors import UserError
from megatron_lora.lora.arithmetic import TensorParallel
from megatron_lora.lora.layout import ModelSpec
from megatron_lora.lora.methods import ReadWeight
from megatron_lora.policy.backend import DTYPES
from megatron_lora.policy.fp8_base import fp8_names, gradient_format
from megatron_lora.policy.layout_checks import check_recomputed
from megatron_lora.policy.megatron.architecture import (
    apply_config,
    plain_config,
    replace_core_attention,
    set_numbers,
    usual_provider,
)
from megatron_lora.policy.megatron.base_weights import (
    Held,
    HeldExperts,
    all_dense,
    experts_in_four_bits,
    hold_stored,
    in_four_bits,
    in_fp8,
    load_base_weights,
    matrices_on_meta,
)
from megatron_lora.policy.megatron.packed import with_shared_prefixes
from megatron_lora.policy.quantization import FourBitSource, open_base
from megatron_lora.policy.shared_prefix import unshared_reason
from megatron_lora.runtime.native_layers import NativeAttention
from megatron_lora.runtime.transformer_engine import have_transformer_engine, import_bridge
from megatron_lora.runtime.world import World

FUSIONS = (
    "gradient_accumulation_fusion",
    "masked_softmax_fusion",
    "bias_dropout_fusion",
    "persist_layer_norm",
    "cross_entropy_loss_fusion",
)


@dataclass
class BaseModel:
    """This rank's part of a base. chunks: one GPTModel a (virtual) stage. weights: where its values came from, 4-bit
    ones in that form. rounded: the parameters that the model holds in FP8; what leaves the model is read from `weights`
    again in their place. expert_tp: ranks that share each expert's matrices. softcap: c, where logits x become
    c tanh(x / c). unshared_reason: why its attention takes no rows that share prefixes; None where it does."""

    chunks: list[GPTModel]
    shapes: ModelSpec
    config: Any
    tp: TensorParallel
    expert_tp: TensorParallel
    weights: WeightSource
    rounded: Collection[str]
    softcap: float | None
    unshared_reason: str | None

    @property
    def has_last_stage(self) -> bool:
        return bool(self.chunks[-1].post_process)


def build_base(
    policy: PolicyConfig,
    world: World,
    opened: tuple[HFModel, WeightSource] | None = None,
    *,
    changed: Callable[[ReadWeight], ReadWeight] | None = None,
) -> BaseModel:
    """Build the base in the recipe's layout and load its Hugging Face weights. opened: the base as `open_base` gives
    it, if it is open already. changed: what the model holds in the weights' place, given how they are read.

    Raises UserError for an architecture that megatron-bridge lacks, and for weights that are not this model's.
    """
    import_bridge()
    from megatron.bridge import AutoBridge

    model, weights = opened or open_base(policy)
    check_recomputed(policy, model.shapes, transformer_engine=have_transformer_engine())
    read = weights.read if changed is None else changed(weights.read)
    shapes = model.shapes
    with _bridge_errors(policy.model_name):
        if shapes.mixers:
            provider = usual_provider(model)
        else:
            provider = AutoBridge.from_hf_config(plain_config(model)).to_megatron_provider(load_weights=False)
    apply_config(provider, model)
    unshared = unshared_reason(
        policy,
        model_type=model.family,
        head_dim=shapes.head_dim,
        num_experts=shapes.num_experts,
        on_gpu=world.device.type == "cuda" and have_transformer_engine(),
    )
    _configure(provider, policy, world, shared=unshared is None)
    tp = TensorParallel(
        group=parallel_state.get_tensor_model_parallel_group(),  # type: ignore[arg-type]
        size=world.tp,
        rank=world.tp_rank,
        sequence_parallel=bool(provider.sequence_parallel),
    )
    held = _held(policy, weights, read, shapes, tp, world)
    # bridge prints the padded vocabulary, once a chunk
    with redirect_stdout(StringIO()), nullcontext() if held is None else matrices_on_meta():
        chunks = _provide_chunks(provider)
    set_numbers(chunks, model)
    for chunk in chunks:
        _set_norm_eps(chunk, provider.layernorm_epsilon)
        if provider.recompute_granularity == "full" and hasattr(chunk, "embedding"):
            # Recompute gives gradients only to inputs that want one; a frozen embedding's output would not.
            chunk.embedding.register_forward_hook(_require_grad)
    if held is not None:
        linears, experts = held
        hold_stored(chunks, linears, experts, shapes, tp, world.device)
    for chunk in chunks:
        # Megatron-Core makes routers, shared experts' gates and attention's sinks on the CPU.
        chunk.to(world.device)
    load_base_weights(chunks, read, shapes, world)
    return BaseModel(
        chunks=chunks,
        shapes=shapes,
        config=provider,
        tp=tp,
        expert_tp=TensorParallel(
            parallel_state.get_expert_tensor_parallel_group(),  # type: ignore[arg-type]
            size=world.etp,
            rank=world.etp_rank,
            sequence_parallel=False,
        ),
        weights=weights,
        rounded=fp8_names(shapes) if policy.in_fp8 else frozenset(),
        softcap=model.final_softcap,
        unshared_reason=unshared,
    )


def _held(
    policy: PolicyConfig,
    weights: WeightSource,
    read: ReadWeight,
    shapes: ModelSpec,
    tp: TensorParallel,
    world: World,
) -> tuple[Held, HeldExperts] | None:
    """The form of the linears that are no parameters of the model, and of experts; None where all are."""
    if policy.in_fp8:
        return in_fp8(read, shapes, world, gradient_format(policy)), all_dense
    if not isinstance(weights, FourBitSource):
        return None
    return in_four_bits(weights, shapes, tp, world.device), experts_in_four_bits(weights, shapes, world)


@contextmanager
def _bridge_errors(model_name: str) -> Iterator[None]:
    try:
        yield
    except (ValueError, KeyError, OSError) as error:
        raise UserError(
            f"policy.model_name={model_name!r} cannot be brought into Megatron: {str(error).strip().splitlines()[0]}; "
            "use a Llama, Qwen2, Qwen3, Mistral or Gemma 3 model"
        ) from error


def _configure(provider: Any, policy: PolicyConfig, world: World, *, shared: bool) -> None:
    """Set the provider from the recipe. Attributes are Megatron-Core's own (TransformerConfig). shared: its attention
    takes rows that share prefixes."""
    megatron = policy.megatron_cfg
    dtype = DTYPES[policy.precision]
    provider.tensor_model_parallel_size = megatron.tensor_model_parallel_size
    provider.pipeline_model_parallel_size = megatron.pipeline_model_parallel_size
    provider.virtual_pipeline_model_parallel_size = megatron.virtual_pipeline_model_parallel_size
    if (megatron.virtual_pipeline_model_parallel_size or 1) > 1:
        # With two stages, batched exchanges mix up what goes to the one peer in both directions.
        provider.overlap_p2p_comm, provider.batch_p2p_comm = True, False
    provider.num_layers_in_first_pipeline_stage = megatron.num_layers_in_first_pipeline_stage
    provider.num_layers_in_last_pipeline_stage = megatron.num_layers_in_last_pipeline_stage
    provider.context_parallel_size = megatron.context_parallel_size
    provider.expert_model_parallel_size = megatron.expert_model_parallel_size
    provider.expert_tensor_parallel_size = megatron.expert_tensor_parallel_size
    provider.sequence_parallel = megatron.sequence_parallel and megatron.tensor_model_parallel_size > 1
    provider.params_dtype = provider.pipeline_dtype = provider.autocast_dtype = dtype
    provider.bf16, provider.fp16 = dtype == torch.bfloat16, False
    provider.seq_length = policy.max_total_sequence_length
    provider.should_pad_vocab = True
    provider.make_vocab_size_divisible_by = 1
    # Losses are sums divided once by the global count (docs/architecture.md, the loss contract).
    provider.calculate_per_token_loss = True
    _configure_experts(provider, policy, world)
    provider.variable_seq_lengths = megatron.pipeline_model_parallel_size > 1
    provider.perform_initialization = False
    provider.hidden_dropout = provider.attention_dropout = 0.0
    _configure_kernels(provider, policy, world, shared=shared)
    if megatron.activation_checkpointing:
        provider.recompute_granularity = megatron.recompute_granularity
        if megatron.recompute_granularity == "full":
            provider.recompute_method, provider.recompute_num_layers = "uniform", 1
        else:
            provider.recompute_modules = megatron.recompute_modules or ["core_attn"]
    else:
        provider.recompute_granularity = None
    provider.finalize()


def _configure_experts(provider: Any, policy: PolicyConfig, world: World) -> None:
    megatron = policy.megatron_cfg
    provider.moe_token_dispatcher_type = megatron.moe_token_dispatcher_type
    provider.moe_shared_expert_overlap = megatron.moe_shared_expert_overlap
    provider.moe_grouped_gemm = megatron.moe_grouped_gemm
    fused = world.device.type == "cuda" and have_transformer_engine() and policy.precision == "bfloat16"
    provider.moe_permute_fusion = fused and megatron.moe_permute_fusion
    provider.moe_router_fusion = False
    provider.moe_router_dtype = megatron.moe_router_dtype
    provider.moe_router_load_balancing_type = megatron.moe_router_load_balancing_type
    if megatron.moe_aux_loss_coeff is not None:
        provider.moe_aux_loss_coeff = megatron.moe_aux_loss_coeff


def _configure_kernels(provider: Any, policy: PolicyConfig, world: World, *, shared: bool) -> None:
    fused = world.device.type == "cuda" and have_transformer_engine()
    for name in FUSIONS:
        setattr(provider, name, False)
    provider.use_cpu_initialization = world.device.type == "cpu"
    provider.apply_rope_fusion = fused and policy.megatron_cfg.apply_rope_fusion and policy.precision == "bfloat16"
    # Of the activations only this one has a fused kernel in Megatron-Core that is the same function.
    fusable = provider.activation_func is torch.nn.functional.silu
    provider.bias_activation_fusion = (
        fusable and world.device.type == "cuda" and policy.megatron_cfg.bias_activation_fusion
    )
    # Whatever fused attention Transformer Engine finds; bridge asks for the flash-attn package in some families.
    provider.attention_backend = AttnBackend.auto
    # Megatron-Core has no such kernel for experts with biases.
    provider.bias_dropout_fusion = world.device.type == "cuda" and not (
        provider.num_moe_experts and provider.add_bias_linear
    )
    windows_over_ranks = provider.window_size is not None and policy.megatron_cfg.context_parallel_size > 1
    if fused and (policy.precision == "float32" or windows_over_ranks):
        # Transformer Engine's fused attention has no fp32, and no windows where keys are passed around; ours has.
        replace_core_attention(provider, lambda _: NativeAttention)
    elif fused and shared:
        replace_core_attention(provider, with_shared_prefixes)


def _provide_chunks(provider: Any) -> list[GPTModel]:
    provider._pg_collection = ProcessGroupCollection.use_mpu_process_groups()
    stages = provider.virtual_pipeline_model_parallel_size
    if not stages or stages == 1:
        return [
            provider.provide(
                pre_process=parallel_state.is_pipeline_first_stage(),
                post_process=parallel_state.is_pipeline_last_stage(),
            )
        ]
    chunks = []
    rank = parallel_state.get_pipeline_model_parallel_rank()
    first, last = rank == 0, rank == parallel_state.get_pipeline_model_parallel_world_size() - 1
    for stage in range(stages):
        chunk = provider.provide(
            pre_process=first and stage == 0, post_process=last and stage == stages - 1, vp_stage=stage
        )
        chunk.vp_stage = stage
        chunks.append(chunk)
    return chunks


def _set_norm_eps(chunk: GPTModel, eps: float) -> None:
    """megatron-bridge builds the norms behind Gemma's row-parallel linears with a default eps, not the model's."""
    for module in chunk.modules():
        norm = getattr(module, "post_layernorm", None)
        if norm is not None:
            norm.eps = eps


def _require_grad(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
    return output.requires_grad_() if torch.is_grad_enabled() and not output.requires_grad else output
