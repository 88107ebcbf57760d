"""Rollouts: `policy.generation`."""

from typing import Literal

from pydantic import Field, field_validator

from megatron_lora.config.rollout_engines import BACKENDS, EngineFacts
from megatron_lora.config.schema_base import (
    Environment,
    Float,
    Int,
    KeywordArguments,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    Section,
)

TopP = Float


class VllmConfig(Section):
    """`policy.generation.vllm_cfg`."""

    tensor_parallel_size: PositiveInt | None = Field(
        default=None,
        description="Ranks that share each layer's matrices in vLLM; null: as few as the model fits on, so that there "
        "are as many engines as can be.",
    )
    gpu_memory_utilization: Float = Field(
        default=0.6, gt=0, le=1, description="Part of a GPU's memory that vLLM may take while it generates."
    )
    max_model_len: PositiveInt | None = Field(
        default=None, description="Longest sequence; null: `policy.max_total_sequence_length`."
    )
    enforce_eager: bool = Field(default=False, description="Generate without CUDA graphs.")
    env_vars: Environment = Field(
        default_factory=dict,
        description="Environment variables that are set before vLLM is imported; those of the shell win.",
    )
    precision: Literal["float32", "bfloat16"] | None = Field(
        default=None, description="dtype of vLLM's weights; null: `policy.precision`."
    )


class ColocatedConfig(Section):
    """`policy.generation.colocated`."""

    enabled: bool = Field(
        default=True,
        description="Answer in the trainer's processes, on their GPUs; false: by the servers of `servers.urls`.",
    )


class ServersConfig(Section):
    """`policy.generation.servers`: rollouts by vLLM servers with GPUs of their own."""

    urls: list[str] = Field(
        default_factory=list, description="Servers, as http://host:port; `megatron-lora serve` starts one."
    )
    shared_folder: str | None = Field(
        default=None,
        description="Folder that trainer and servers see under this name, for new weights; null: in the run's folder.",
    )
    timeout_seconds: PositiveFloat = Field(
        default=600.0, description="A server that takes longer for a prompt's answers is left out."
    )
    start_timeout_seconds: NonNegativeFloat = Field(
        default=0.0, description="A run waits so long at its start for servers that do not answer yet."
    )
    requests_at_once: PositiveInt = Field(
        default=64,
        description="Prompts that a server is asked at once; of proofs and validation as many beside those ahead.",
    )


class GenerationConfig(Section):
    """`policy.generation`."""

    backend: Literal["vllm", "megatron"] = Field(
        default="vllm", description="Who generates: vLLM in the trainer's processes, or the training model itself."
    )
    refit: Literal["adapter", "merge", "auto"] = Field(
        default="auto",
        description="What goes to vLLM after a step: the adapter, or merged weights; `auto` measures both at start.",
    )
    max_new_tokens: PositiveInt | None = Field(
        default=None, description="Longest answer, in tokens; null: `policy.max_total_sequence_length`."
    )
    temperature: NonNegativeFloat = Field(default=1.0, description="Sampling temperature; 0: the most likely token.")
    top_p: TopP = Field(
        default=1.0, gt=0, le=1, description="Sample from the most likely tokens of this total probability."
    )
    top_k: Int | None = Field(default=None, description="Sample from this many most likely tokens; null or -1: all.")
    val_temperature: NonNegativeFloat | None = Field(default=None, description="At validation; null: `temperature`.")
    val_top_p: TopP | None = Field(default=None, gt=0, le=1, description="At validation; null: `top_p`.")
    val_top_k: Int | None = Field(default=None, description="At validation; null: `top_k`.")
    stop_token_ids: list[Int] | None = Field(default=None, description="Further token ids that end an answer.")
    stop_strings: list[str] | None = Field(default=None, description="Texts that end an answer.")
    colocated: ColocatedConfig = Field(default_factory=ColocatedConfig, description="Where answers are drawn.")
    servers: ServersConfig = Field(default_factory=ServersConfig, description="Rollout servers.")
    vllm_cfg: VllmConfig = Field(default_factory=VllmConfig, description="vLLM's engine.")
    vllm_kwargs: KeywordArguments = Field(default_factory=dict, description="Further arguments of vLLM's engine.")

    @field_validator("stop_strings")
    @classmethod
    def _no_empty_stop(cls, value: list[str] | None) -> list[str] | None:
        if value is not None and "" in value:
            raise ValueError('an empty text ends every answer before its first token; take "" out of the list')
        return value

    @property
    def engine(self) -> EngineFacts:
        """Who answers; where `colocated.enabled` is false and `backend` cannot, who would without it."""
        inside, outside = BACKENDS[self.backend]
        return inside if self.colocated.enabled or outside is None else outside

    @property
    def longest_sequence(self) -> int | None:
        """The engine's own limit of prompt and answer, in tokens; None: `policy.max_total_sequence_length` alone."""
        return self.vllm_cfg.max_model_len if self.engine.own_length else None
