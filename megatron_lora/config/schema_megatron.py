"""The Megatron-Core backend: `policy.megatron_cfg`."""

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from megatron_lora.config.schema_adapters import PeftConfig
from megatron_lora.config.schema_base import (
    Environment,
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Section,
)

# What Megatron-Core's selective recompute knows.
RecomputeModule = Literal[
    "core_attn", "layernorm", "mlp", "mla_up_proj", "moe", "moe_act", "shared_experts", "gdn_norm_out"
]

# What makes the input of a linear that may have an adapter.
AdapterInput = Literal["layernorm", "activation"]


def _empty(value: Any) -> Any:
    """NeMo RL's null for a section that is off."""
    return {} if value is None else value


class MegatronOptimizerConfig(Section):
    """`policy.megatron_cfg.optimizer`."""

    optimizer: Literal["adam"] = Field(default="adam", description="AdamW (decoupled weight decay).")
    lr: PositiveFloat = Field(default=5e-6, description="Highest learning rate.")
    min_lr: NonNegativeFloat = Field(default=0.0, description="Learning rate that a decaying schedule ends at.")
    weight_decay: NonNegativeFloat = Field(default=0.01, description="Weight decay of the trainable weights.")
    adam_beta1: Fraction = Field(default=0.9, description="Decay of the first moment.")
    adam_beta2: Fraction = Field(default=0.98, description="Decay of the second moment.")
    adam_eps: PositiveFloat = Field(default=1e-8, description="Added to the root of the second moment.")
    clip_grad: NonNegativeFloat | None = Field(
        default=None, description="Largest gradient norm; 0: no clipping; null: `policy.max_grad_norm`."
    )
    use_distributed_optimizer: bool = Field(
        default=True, description="Split the optimizer's state over data-parallel ranks."
    )

    @model_validator(mode="after")
    def _rates_in_order(self) -> Self:
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr={self.min_lr} is above lr={self.lr}; lower min_lr or raise lr")
        return self


class MegatronSchedulerConfig(Section):
    """`policy.megatron_cfg.scheduler`: the learning rate and weight decay of each step."""

    lr_decay_style: Literal["constant", "linear", "cosine"] = Field(
        default="constant", description="From `optimizer.lr` to `optimizer.min_lr` after warmup."
    )
    lr_decay_iters: PositiveInt | None = Field(
        default=None, description="Step at which `min_lr` is reached; null: the run's last step."
    )
    lr_warmup_iters: NonNegativeInt = Field(
        default=0, description="Steps of linear warmup from `lr_warmup_init` to `lr`."
    )
    lr_warmup_init: NonNegativeFloat = Field(default=0.0, description="Learning rate at the start of warmup.")
    start_weight_decay: NonNegativeFloat | None = Field(
        default=None, description="Weight decay at the first step; null: `optimizer.weight_decay`."
    )
    end_weight_decay: NonNegativeFloat | None = Field(
        default=None, description="Weight decay at the last step; null: `optimizer.weight_decay`."
    )
    weight_decay_incr_style: Literal["constant", "linear", "cosine"] = Field(
        default="constant", description="From `start_weight_decay` to `end_weight_decay`."
    )

    @model_validator(mode="after")
    def _decays_after_warmup(self) -> Self:
        if self.lr_decay_iters is not None and self.lr_decay_iters <= self.lr_warmup_iters:
            raise ValueError(
                f"lr_decay_iters={self.lr_decay_iters} is not above lr_warmup_iters={self.lr_warmup_iters}: the "
                "warmup would end after the decay; raise it, set it to null (the run's last step) or lower the other"
            )
        return self


class MegatronCheckpointConfig(Section):
    """`policy.megatron_cfg.checkpoint`."""

    async_save: bool = Field(default=False, description="Write checkpoints in the background while training goes on.")


class Fp8Config(Section):
    """`policy.megatron_cfg.fp8_cfg`: the frozen base's linears in FP8, under adapters in `policy.precision`."""

    enabled: bool = Field(
        default=False,
        description="Multiply with the frozen linears of attention and MLP in FP8, quantized once when they are "
        "loaded; needs adapters and a GPU that has FP8. Exports and merged weights are of the base as its folder has "
        "it.",
    )
    fp8: Literal["e4m3", "hybrid"] = Field(
        default="e4m3", description="Format of weights, activations and gradients; `hybrid`: gradients in e5m2."
    )
    fp8_recipe: str = Field(
        default="rowwise",
        description="How scales are found. `rowwise`, one a row of each matrix, is the only one where `enabled`; NeMo "
        "RL's others (`blockwise`, `tensorwise`, `delayed`, `mxfp8`) are refused there.",
    )

    @model_validator(mode="after")
    def _one_scale_a_row(self) -> Self:
        if self.enabled and self.fp8_recipe != "rowwise":
            raise ValueError(
                f"fp8_recipe={self.fp8_recipe} is a way of scaling that is not there: the frozen base has one scale a "
                "row; use fp8_recipe=rowwise, or set enabled=false"
            )
        return self


class MegatronConfig(Section):
    """`policy.megatron_cfg`."""

    enabled: bool = Field(default=False, description="Train with Megatron-Core; off: `policy.dtensor_cfg` trains.")
    tensor_model_parallel_size: PositiveInt = Field(
        default=1, description="Ranks that share each layer's matrices (TP)."
    )
    pipeline_model_parallel_size: PositiveInt = Field(default=1, description="Ranks that share the layers (PP).")
    virtual_pipeline_model_parallel_size: PositiveInt | None = Field(
        default=None, description="Pieces of the model that each pipeline rank holds (VPP); null: 1."
    )
    num_layers_in_first_pipeline_stage: PositiveInt | None = Field(
        default=None, description="Layers on the first pipeline rank; null: an even share."
    )
    num_layers_in_last_pipeline_stage: PositiveInt | None = Field(
        default=None, description="Layers on the last pipeline rank; null: an even share."
    )
    context_parallel_size: PositiveInt = Field(default=1, description="Ranks that share each sequence (CP).")
    expert_model_parallel_size: PositiveInt = Field(default=1, description="Ranks that share the experts (EP).")
    expert_tensor_parallel_size: PositiveInt = Field(
        default=1, description="Ranks that share each expert's matrices (ETP)."
    )
    sequence_parallel: bool = Field(
        default=False, description="Split activations outside the matrices over TP ranks; without effect at TP=1."
    )
    activation_checkpointing: bool = Field(
        default=False, description="Recompute activations in the backward pass instead of keeping them."
    )
    recompute_granularity: Literal["full", "selective"] = Field(
        default="full", description="With `activation_checkpointing`: whole layers, or only `recompute_modules`."
    )
    recompute_modules: list[RecomputeModule] | None = Field(
        default=None, description="What selective recompute repeats, in Megatron's names; null: `[core_attn]`."
    )
    recompute_adapter_inputs: list[AdapterInput] = Field(
        default=["layernorm"],
        description="Inputs of adapted linears that are computed again in the backward pass from what is kept in any "
        "case, and not kept themselves: outputs of norms (`layernorm`) and of the MLP's activation (`activation`); "
        "without `activation_checkpointing`, too. Full fine-tuning keeps them.",
    )
    env_vars: Environment = Field(
        default_factory=dict,
        description="Environment variables that are set before this backend is imported; those of the shell win.",
    )
    apply_rope_fusion: bool = Field(default=True, description="Fused rotary embedding on a GPU.")
    bias_activation_fusion: bool = Field(default=True, description="Fused bias and activation of the MLP on a GPU.")
    cuda_graph_impl: Literal["none", "local"] | None = Field(
        default=None,
        description="`local`: on a GPU a micro-batch's forward and backward pass are one CUDA graph each, so that "
        "small kernels do not wait for the host; null: where the layout and the adapter allow it and no vLLM shares "
        "the GPU.",
    )
    freeze_moe_router: bool | None = Field(
        default=None,
        description="Whether a router's own weights stay as they are. Beside adapters they do, like the rest of the "
        "base, with any value; true: `peft` may not name it.",
    )
    moe_router_dtype: Literal["fp32", "fp64"] | None = Field(
        default="fp32", description="In what a router computes; null: in `policy.precision`."
    )
    moe_router_load_balancing_type: Literal["none", "aux_loss"] = Field(
        default="none",
        description="`aux_loss`: the routers' auxiliary loss (Fedus et al. 2021) of each micro-batch is added to the "
        "training loss.",
    )
    moe_aux_loss_coeff: NonNegativeFloat | None = Field(
        default=None,
        description="What the auxiliary loss is multiplied by; null: `router_aux_loss_coef` of config.json, else "
        "0.001.",
    )
    moe_per_layer_logging: bool = Field(
        default=False, description="The auxiliary loss of each layer among the metrics too."
    )
    moe_router_bias_update_rate: NonNegativeFloat = Field(
        default=0.0,
        description="How fast the bias by which some routers choose experts follows their load; such a model takes 0 "
        "alone, since no adapter's file holds the bias.",
    )
    moe_router_enable_expert_bias: bool | None = Field(
        default=None, description="Whether the model's router has such a bias; null: whatever it has."
    )
    moe_grouped_gemm: bool = Field(
        default=True, description="Products of all of a rank's experts in one kernel; false: one after the other."
    )
    moe_permute_fusion: bool = Field(
        default=True, description="Fused sorting of tokens by expert, on a GPU in bfloat16."
    )
    moe_token_dispatcher_type: Literal["alltoall", "allgather", "flex"] = Field(
        default="alltoall",
        description="How tokens reach experts of other ranks: each where it is needed, or all everywhere. `flex` "
        "(DeepEP, HybridEP) is not there: models with experts are refused with it.",
    )
    moe_shared_expert_overlap: bool = Field(
        default=False, description="Compute shared experts while tokens travel to the others (`alltoall`)."
    )
    use_fused_linear_logprobs: bool = Field(
        default=False, description="Log-probabilities straight from hidden states, in chunks; full logits never exist."
    )
    fused_linear_logprobs_chunk_size: PositiveInt = Field(default=256, description="Tokens a chunk of the above.")
    fp8_cfg: Annotated[Fp8Config, BeforeValidator(_empty)] = Field(
        default_factory=Fp8Config, description="The frozen base in FP8."
    )
    peft: PeftConfig = Field(default_factory=PeftConfig, description="Adapters.")
    optimizer: MegatronOptimizerConfig = Field(default_factory=MegatronOptimizerConfig, description="Optimizer.")
    scheduler: MegatronSchedulerConfig = Field(default_factory=MegatronSchedulerConfig, description="Schedules.")
    checkpoint: MegatronCheckpointConfig = Field(
        default_factory=MegatronCheckpointConfig, description="How checkpoints are written."
    )

    @model_validator(mode="after")
    def _complete(self) -> Self:
        self.sequence_parallel = self.sequence_parallel and self.tensor_model_parallel_size > 1
        schedule, rate = self.scheduler, self.optimizer.lr
        if schedule.lr_warmup_iters and schedule.lr_warmup_init > rate:
            raise ValueError(
                f"scheduler.lr_warmup_init={schedule.lr_warmup_init} is above optimizer.lr={rate}; lower it"
            )
        if schedule.start_weight_decay is None:
            schedule.start_weight_decay = self.optimizer.weight_decay
        if schedule.end_weight_decay is None:
            schedule.end_weight_decay = self.optimizer.weight_decay
        start, end = schedule.start_weight_decay, schedule.end_weight_decay
        if schedule.weight_decay_incr_style == "constant" and start != end:
            raise ValueError(
                f"scheduler.weight_decay_incr_style=constant, but start_weight_decay={start} and "
                f"end_weight_decay={end}; make them equal or use linear or cosine"
            )
        return self

    @property
    def balances_experts(self) -> bool:
        """Whether routers' auxiliary loss is added, where the model has experts."""
        return self.moe_router_load_balancing_type == "aux_loss" and self.moe_aux_loss_coeff != 0

    @property
    def model_parallel_size(self) -> int:
        """Ranks that hold one copy of the model and one sequence: TP x PP x CP."""
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.context_parallel_size
