"""The model and how it is trained: `policy`."""

from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from megatron_lora.config.schema_base import KeywordArguments, NonNegativeFloat, Place, PositiveInt, Section
from megatron_lora.config.schema_dtensor import (
    DTensorConfig,
    TorchOptimizerConfig,
    TorchSchedulerConfig,
    check_schedulers,
)
from megatron_lora.config.schema_generation import GenerationConfig
from megatron_lora.config.schema_megatron import MegatronConfig


class TokenizerConfig(Section):
    """`policy.tokenizer`."""

    name: Place | None = Field(default=None, description="Hub name or local folder; null: `policy.model_name`.")
    chat_template: str | None = Field(
        default=None, description="A Jinja template or a path to one; null or `default`: the tokenizer's own."
    )
    chat_template_kwargs: KeywordArguments | None = Field(
        default=None, description="Further variables of the template, such as `enable_thinking`."
    )


class DynamicBatchingConfig(Section):
    """`policy.dynamic_batching`: rows of like length share a micro-batch."""

    enabled: bool = Field(default=False, description="Fill micro-batches by tokens instead of by rows.")
    train_mb_tokens: PositiveInt | None = Field(
        default=None,
        description="Tokens a micro-batch in training; null: max_total_sequence_length x train_micro_batch_size.",
    )
    logprob_mb_tokens: PositiveInt | None = Field(
        default=None,
        description="Tokens a micro-batch for log-probabilities; null: max_total_sequence_length x logprob_batch_size, "
        "and where that is null too, as many as training takes or more: nothing is kept for a backward pass.",
    )


class SequencePackingConfig(DynamicBatchingConfig):
    """`policy.sequence_packing`: rows sorted into few micro-batches."""

    algorithm: Literal[
        "modified_first_fit_decreasing", "first_fit_decreasing", "first_fit_shuffle", "concatenative"
    ] = Field(default="modified_first_fit_decreasing", description="How rows are sorted into micro-batches.")

    @field_validator("algorithm", mode="before")
    @classmethod
    def _short_name(cls, value: Any) -> Any:
        return "modified_first_fit_decreasing" if value == "modified_ffd" else value


class RouterReplayConfig(Section):
    """`policy.router_replay`: the rollout engine's choice of experts in training."""

    enabled: bool = Field(
        default=False,
        description="The rollout engine reports the experts that it sent each token to; the trainer sends it to the "
        "same, and the log says how often it would have chosen others (`routing_mismatch`).",
    )
    observe_only: bool = Field(
        default=False, description="With `enabled`: compare and log alone; the trainer goes by its own choice."
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.observe_only and not self.enabled:
            raise ValueError("observe_only=true compares what the engine reports; set enabled=true as well")
        return self


class PolicyConfig(Section):
    """`policy`."""

    model_name: Place = Field(description="Hub name or local Hugging Face folder of the base model.")
    hf_config_overrides: KeywordArguments = Field(
        default_factory=dict,
        description="Fields that replace those of the model's config.json, such as `rope_scaling` (YaRN) and "
        "`max_position_embeddings`; merged exports and rollouts have them too.",
    )
    preload_to_shm: bool = Field(
        default=False,
        description="Copy the base's files into the host's shared memory (/dev/shm) once; every rank and rollout "
        "engine of the host reads them there.",
    )
    tokenizer: TokenizerConfig = Field(default_factory=TokenizerConfig, description="Tokenizer.")
    precision: Literal["float32", "bfloat16"] = Field(default="bfloat16", description="dtype of the model's weights.")
    train_global_batch_size: PositiveInt = Field(
        default=32, description="Rows (DPO: pairs) an optimizer step, over all ranks."
    )
    train_micro_batch_size: PositiveInt = Field(
        default=1, description="Rows (DPO: pairs) a forward pass where neither packing nor dynamic batching is on."
    )
    logprob_batch_size: PositiveInt | None = Field(
        default=None,
        description="Rows a forward pass for log-probabilities where neither packing nor dynamic batching is on; null: "
        "as many tokens as `train_micro_batch_size` of the longest rows have, or more.",
    )
    generation_batch_size: PositiveInt | None = Field(
        default=None,
        description="Answers that the `megatron` generation backend draws at once; null: as many as half of the "
        "GPU's free memory has caches for, 32 on a CPU.",
    )
    max_total_sequence_length: PositiveInt = Field(default=1024, description="Longest sequence, in tokens.")
    make_sequence_length_divisible_by: PositiveInt = Field(
        default=1, description="Micro-batches are padded to a multiple of this many tokens."
    )
    max_grad_norm: NonNegativeFloat | None = Field(
        default=1.0, description="Largest gradient norm; null or 0: no clipping."
    )
    sequence_packing: SequencePackingConfig = Field(
        default_factory=SequencePackingConfig, description="Rows sorted into the fewest micro-batches."
    )
    dynamic_batching: DynamicBatchingConfig = Field(
        default_factory=DynamicBatchingConfig, description="Rows of like length share a micro-batch."
    )
    shared_prefix: bool | Literal["auto"] = Field(
        default="auto",
        description="Whether rows that begin alike (the answers of a GRPO group, a DPO pair) send what they share "
        "through the model once; `auto`: where the layout and the model allow it.",
    )
    reference_policy: Literal["start", "base"] = Field(
        default="start",
        description="What DPO's and GRPO's KL term measures from where the run starts from `init_adapter`: `start`, "
        "the base with that adapter, or `base`, without it. Of any other run both are the same.",
    )
    reference_weights: Literal["cpu", "device"] = Field(
        default="cpu",
        description="Full fine-tuning with a reference (DPO, GRPO with a KL penalty): where its starting weights lie; "
        "`cpu`: swapped with the model's whenever the reference is asked; `device`: likewise, a second copy beside it.",
    )
    megatron_cfg: MegatronConfig = Field(default_factory=MegatronConfig, description="Megatron-Core backend.")
    dtensor_cfg: DTensorConfig = Field(default_factory=DTensorConfig, description="DTensor backend.")
    optimizer: TorchOptimizerConfig | None = Field(
        default=None,
        description="Torch optimizer of the DTensor backend; null: what `megatron_cfg.optimizer` and "
        "`megatron_cfg.scheduler` say.",
    )
    scheduler: list[TorchSchedulerConfig] | None = Field(
        default=None,
        description="Torch schedulers of the DTensor backend, used with `optimizer`; null: a constant rate.",
    )
    router_replay: RouterReplayConfig = Field(
        default_factory=RouterReplayConfig, description="The rollout engine's choice of experts in training."
    )
    generation: GenerationConfig = Field(default_factory=GenerationConfig, description="Rollouts (GRPO).")

    @field_validator("hf_config_overrides", mode="before")
    @classmethod
    def _none_is_empty(cls, value: Any) -> Any:
        return {} if value is None else value

    @field_validator("scheduler", mode="before")
    @classmethod
    def _one_scheduler_is_a_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, dict) else value

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.train_micro_batch_size > self.train_global_batch_size:
            raise ValueError(
                f"train_micro_batch_size={self.train_micro_batch_size} is above "
                f"train_global_batch_size={self.train_global_batch_size}; lower it"
            )
        if self.sequence_packing.enabled and self.dynamic_batching.enabled:
            raise ValueError("sequence_packing.enabled and dynamic_batching.enabled exclude each other; turn one off")
        self._check_init_adapter()
        if self.scheduler is not None:
            if self.optimizer is None and self.backend == "dtensor":
                raise ValueError("scheduler needs optimizer; set both, or neither to follow megatron_cfg")
            check_schedulers(self.scheduler)
        return self

    def _check_init_adapter(self) -> None:
        """The adapter to start from is read: it stands in the section of the backend that runs, with adapters on."""
        sections = {"megatron_cfg.peft": self.megatron_cfg.peft, "dtensor_cfg.lora_cfg": self.dtensor_cfg.lora_cfg}
        used = next(name for name, section in sections.items() if section is self.adapter)
        if self.adapter.init_adapter is not None and not self.adapter.enabled:
            raise ValueError(
                f"{used}.init_adapter={self.adapter.init_adapter!r} needs {used}.enabled=true: full fine-tuning "
                "reads no adapter; set enabled=true or init_adapter=null (to train on from the merged model, "
                "merge it with "
                "convert_lora_to_hf.py --mode merged and name the result in policy.model_name)"
            )
        for name, section in sections.items():
            if section.init_adapter is not None and self.adapter.init_adapter is None:
                raise ValueError(
                    f"{name}.init_adapter={section.init_adapter!r} is set, but megatron_cfg.enabled="
                    f"{str(self.megatron_cfg.enabled).lower()}, so {used}.init_adapter is what is read, and it is "
                    "null; set that one"
                )

    @model_validator(mode="after")
    def _fill(self) -> Self:
        """Values that follow from others, so that whoever reads the recipe finds a number."""
        if self.tokenizer.name is None:
            self.tokenizer.name = self.model_name
        if self.megatron_cfg.optimizer.clip_grad is None:
            self.megatron_cfg.optimizer.clip_grad = self.max_grad_norm or 0.0
        for packing in (self.sequence_packing, self.dynamic_batching):
            packing.train_mb_tokens = packing.train_mb_tokens or (
                self.max_total_sequence_length * self.train_micro_batch_size
            )
            if self.logprob_batch_size is not None:
                packing.logprob_mb_tokens = packing.logprob_mb_tokens or (
                    self.max_total_sequence_length * self.logprob_batch_size
                )
        self._fill_generation()
        return self

    def _fill_generation(self) -> None:
        generation = self.generation
        generation.max_new_tokens = generation.max_new_tokens or self.max_total_sequence_length
        generation.vllm_cfg.max_model_len = generation.vllm_cfg.max_model_len or self.max_total_sequence_length
        generation.vllm_cfg.precision = generation.vllm_cfg.precision or self.precision
        if generation.val_temperature is None:
            generation.val_temperature = generation.temperature
        if generation.val_top_p is None:
            generation.val_top_p = generation.top_p
        if generation.val_top_k is None:
            generation.val_top_k = generation.top_k

    @property
    def env_vars(self) -> dict[str, str]:
        """Environment variables of the backend that trains and of the engine that answers."""
        section = self.megatron_cfg if self.megatron_cfg.enabled else self.dtensor_cfg
        return {**self.generation.vllm_cfg.env_vars, **section.env_vars}

    @property
    def backend(self) -> Literal["megatron", "dtensor"]:
        """Which backend trains."""
        return "megatron" if self.megatron_cfg.enabled else "dtensor"

    @property
    def in_fp8(self) -> bool:
        """Whether the base's linears are held in FP8."""
        return self.backend == "megatron" and self.megatron_cfg.fp8_cfg.enabled

    @property
    def adapter(self):
        """The active backend's adapter section: `megatron_cfg.peft` or `dtensor_cfg.lora_cfg`."""
        return self.megatron_cfg.peft if self.megatron_cfg.enabled else self.dtensor_cfg.lora_cfg

    @property
    def reference_is_starting_adapter(self) -> bool:
        """Whether the reference policy is the base with the adapter of `init_adapter`, not the base alone."""
        return self.adapter.init_adapter is not None and self.reference_policy == "start"

    @property
    def adapter_section(self) -> str:
        """The key of `adapter`."""
        return "policy.megatron_cfg.peft" if self.megatron_cfg.enabled else "policy.dtensor_cfg.lora_cfg"

    @property
    def lora_plus_ratio(self) -> float | None:
        """LoRA+'s ratio of the adapters that train; None where all learn at one rate."""
        return self.adapter.lora_plus_ratio if self.adapter.enabled else None
