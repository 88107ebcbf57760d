"""NeMo RL's keys that have no effect here.

Two kinds. *At its default only*: the key asks for something that this project does not do, so another value is
refused by name. *Any value*: the key cannot change what a run computes here (the table says why), so any value is
accepted. Either way the loader returns one notice that lists those that a recipe has
(`without_effect.py` applies the table).

Not tables of defaults of our own: the values are facts about NeMo RL's base recipes (several where those differ).
"""

from dataclasses import dataclass
from typing import Any


class Anything:
    """Marks a key whose value has no meaning here."""


ANY = Anything()


@dataclass(frozen=True)
class SameAs:
    """Marks a key that may only repeat another key's value."""

    path: str


@dataclass(frozen=True)
class Group:
    """Keys of one section that have no effect for one reason.

    keys: name below `section` -> accepted values, `ANY`, or (`SameAs`,). A name that ends in `.*` is a whole subtree.
    """

    section: str
    reason: str
    keys: dict[str, Any]


def _any(*names: str) -> dict[str, Any]:
    return dict.fromkeys(names, ANY)


_MEGATRON, _GENERATION = "policy.megatron_cfg", "policy.generation"
_MOE = "the router of a mixture-of-experts model works as published; leave it at the default"

TABLE: tuple[Group, ...] = (
    # The run's surroundings
    Group(
        "cluster",
        "torchrun decides how many processes run and where",
        _any("gpus_per_node", "num_nodes", "segment_size", "master_port_range_low", "master_port_range_high"),
    ),
    Group(
        "data_plane",
        "how rows travel between processes; here they stay in the trainer's",
        _any(
            "enabled",
            "observability.*",
            "backend",
            "claim_meta_poll_interval_s",
            "global_segment_size",
            "impl",
            "local_buffer_size",
            "num_storage_units",
            "storage_capacity",
        ),
    ),
    Group(
        "",
        "the algorithms are sft, dpo and grpo",
        {"on_policy_distillation": (None,)},
    ),
    Group(
        "reward_penalties",
        "use env.reward_functions (kind format or python)",
        {
            "penalize_duplicated_reasoning": (False,),
            "penalize_empty_final_answer": (False,),
            "penalize_malformed_think_tag": (False,),
            "penalize_unwanted_tokens": (False,),
            "token_ids": (None,),
        },
    ),
    # Checkpoints and logs
    Group(
        "checkpointing",
        "send SIGTERM to save and stop",
        {"checkpoint_must_save_by": (None,)},
    ),
    Group(
        "checkpointing",
        "weights are a distributed checkpoint plus hf_adapter/; conversion/ makes Hugging Face folders",
        {"model_save_format": (None, "safetensors"), "save_consolidated": (False,)},
    ),
    Group(
        "logger",
        "use logger.wandb_enabled or logger.tensorboard_enabled",
        {"mlflow_enabled": (False,), "swanlab_enabled": (False,)},
    ),
    Group("logger", "only read by loggers that this project lacks", _any("mlflow.*", "swanlab.*")),
    Group(
        "logger",
        "step time and peak memory are always in metrics.jsonl",
        _any("monitor_gpus", "gpu_monitoring.*", "wandb.log_nemo_gym_full_result_tables"),
    ),
    # Data
    Group(
        "data",
        "an answer stands behind the template's generation prompt, where the template has one",
        _any("add_generation_prompt"),
    ),
    Group("sft", "validation packs its rows as training does", _any("val_micro_batch_size")),
    Group("dpo", "validation packs its pairs as training does", _any("val_micro_batch_size")),
    Group("data", "data sets in a list are shuffled as one", {"use_multiple_dataloader": (False,)}),
    *(
        Group(
            f"data.{part}",
            "the form of the rows decides how they are read, env.reward_functions how they are rewarded",
            {"processor": (None, "sft_processor", "math_hf_data_processor"), "env_name": (None, "math")},
        )
        for part in ("default", "train", "validation")
    ),
    # GRPO
    Group("grpo.adv_estimator", "the baseline is always subtracted", {"minus_baseline": (True,)}),
    Group(
        "",
        "rollouts and training alternate: every answer comes from the newest weights, in the prompts' order",
        _any("async_rl.*"),
    ),
    Group("grpo", "rollouts have one turn", {"max_rollout_turns": (1,)}),
    Group(
        "grpo",
        "rollouts and training alternate: every answer comes from the newest weights, its age is 0",
        _any(
            "async_grpo.enabled",
            "async_grpo.in_flight_weight_updates",
            "async_grpo.max_generation_failures",
            "async_grpo.max_trajectory_age_steps",
            "async_grpo.recompute_kv_cache_after_weight_updates",
        ),
    ),
    Group(
        "grpo",
        "answers are rewarded by env.reward_functions",
        {
            "invalid_tool_call_advantage": (None,),
            "malformed_thinking_advantage": (None,),
        },
    ),
    # Model and batches
    Group("policy", "the router has no auxiliary loss here", _any("hf_config_overrides.router_aux_loss_coef")),
    Group(
        "policy",
        "where memory is, not what is computed; policy.dtensor_cfg.cpu_offload keeps optimizer state in CPU memory",
        _any("offload_optimizer_for_logprob", "refit_buffer_size_gb", "activation_checkpointing_enabled"),
    ),
    Group("policy.router_replay", "experts are chosen anew in training", {"enabled": (False,)}),
    Group("policy", "log-probabilities are computed in bounded chunks anyway", _any("logprob_chunk_size")),
    Group("policy.draft", "there is no draft model", {"enabled": (False,)}),
    Group(
        "policy.draft",
        "only read where policy.draft.enabled",
        _any("aux_layer_indices", "loss_weight", "model_name", "num_layers"),
    ),
    Group("policy.tokenizer", "use the tokenizer's own implementation", {"use_fastokens": (None, False)}),
    Group(
        "policy.sequence_packing",
        "the order of micro-batches and how they are fused do not change a step",
        _any("microbatch_order", "fuse_loss"),
    ),
    Group(
        "policy",
        "micro-batches are padded to policy.make_sequence_length_divisible_by and no further",
        _any("sequence_packing.sequence_length_round", "dynamic_batching.sequence_length_round"),
    ),
    # DTensor backend
    Group("policy.dtensor_cfg", "policy.megatron_cfg.enabled alone selects the backend", _any("enabled")),
    Group(
        "policy.dtensor_cfg",
        "there is one implementation: transformers + peft + FSDP2",
        _any(
            "_v2",
            "automodel_kwargs.backend.*",
            "automodel_kwargs.force_hf",
            "automodel_kwargs.attn_implementation",
            "automodel_kwargs.use_liger_kernel",
            "automodel_kwargs.use_sdpa_patching",
            "automodel_kwargs.use_hf_tp_plan",
            "automodel_kwargs.compile_config.*",
            "automodel_kwargs.activation_checkpointing",
            "clear_cache_every_n_steps",
            "moe_parallelizer.*",
        ),
    ),
    Group(
        "policy",
        "text models have no towers for images and sound, and all of the text model that is not adapted is frozen",
        {
            "dtensor_cfg.automodel_kwargs.freeze_config": (None, {}),
            "dtensor_cfg.automodel_kwargs.freeze_config.freeze_language_model": (False,),
            "megatron_cfg.freeze_config": (None, {}),
            "megatron_cfg.freeze_config.freeze_language_model": (False,),
            **_any(
                "dtensor_cfg.automodel_kwargs.freeze_config.freeze_vision_tower",
                "dtensor_cfg.automodel_kwargs.freeze_config.freeze_audio_tower",
                "megatron_cfg.freeze_config.freeze_vision_model",
                "megatron_cfg.freeze_config.freeze_vision_projection",
            ),
        },
    ),
    Group(
        "policy.dtensor_cfg",
        "tensor parallelism follows transformers' plan and FSDP shards over all data-parallel ranks; "
        "context parallelism needs policy.megatron_cfg",
        {
            "automodel_kwargs": (None, {}),
            "context_parallel_size": (1,),
            "custom_parallel_plan": (None,),
            **_any("dp_replicate_size", "expert_parallel_size"),
        },
    ),
    # Megatron backend
    Group(
        _MEGATRON,
        "stages exchange activations in policy.precision",
        {"pipeline_dtype": (SameAs("policy.precision"),)},
    ),
    Group(
        _MEGATRON,
        "memory and speed only; chosen by the runtime",
        _any(
            "attention_backend",
            "checkpoint.ckpt_assume_constant_structure",
            "defer_fp32_logits",
            "cuda_graph_warmup_steps",
            "empty_unused_memory_level",
            "use_gloo_process_groups",
            "distributed_data_parallel_config.data_parallel_sharding_strategy",
            "distributed_data_parallel_config.overlap_grad_reduce",
            "distributed_data_parallel_config.overlap_param_gather",
        ),
    ),
    Group(
        _MEGATRON,
        "weights are read from the Hugging Face folder at every start",
        _any("force_reconvert_from_hf", "converter_type"),
    ),
    Group(
        _MEGATRON,
        "gradients are accumulated and reduced, and optimizer state kept, in float32",
        {
            "distributed_data_parallel_config.grad_reduce_in_fp32": ANY,
            "gradient_accumulation_fusion": (False,),
            "optimizer.bf16": ANY,
            "optimizer.fp16": (False,),
            "optimizer.params_dtype": ("float32", "torch.float32"),
            "optimizer.use_precision_aware_optimizer": ANY,
        },
    ),
    Group(_MEGATRON, "the optimizer is adam", _any("optimizer.sgd_momentum")),
    Group(
        _MEGATRON,
        "optimizer state stays on the device; adapters' is small",
        {
            "optimizer.optimizer_cpu_offload": (False,),
            "optimizer.optimizer_offload_fraction": (0.0,),
            "optimizer.overlap_cpu_optimizer_d2h_h2d": (False,),
        },
    ),
    Group(
        _MEGATRON,
        "use activation_checkpointing to save memory, use_fused_linear_logprobs to save the logits'",
        {
            "cuda_graph_impl": (None, "none"),
            "cuda_graph_modules": (None, []),
            "distributed_data_parallel_config.use_custom_fsdp": (False,),
            "fine_grained_activation_offloading": (False,),
            "offload_modules": (None, []),
            "use_fused_weighted_squared_relu": (False,),
        },
    ),
    Group(_MEGATRON, "models are built as they were published", {"model_overrides": (None, {})}),
    Group(
        _MEGATRON,
        "weights are float32 or bfloat16 (policy.precision)",
        {"fp8_cfg": (None,), "fp8_cfg.enabled": (False,), "fp8_cfg.fp8_param": (False,)},
    ),
    Group(_MEGATRON, "only read where fp8_cfg.enabled", _any("fp8_cfg.fp8", "fp8_cfg.fp8_recipe")),
    Group(
        _MEGATRON,
        "multi-token prediction heads are not trained",
        {
            "mtp_detach_heads": (False,),
            "mtp_loss_scaling_factor": (0.0,),
            "mtp_num_layers": (None, 0),
            "mtp_use_repeated_layer": (False,),
        },
    ),
    Group(
        _MEGATRON,
        _MOE,
        {
            "freeze_moe_router": (False, True),
            "moe_router_bias_update_rate": (0.0, 1e-3),
            "moe_router_dtype": (None, "fp32", "fp64"),
            "moe_router_enable_expert_bias": (True,),
            "moe_router_load_balancing_type": ("none", "aux_loss"),
        },
    ),
    Group(
        _MEGATRON,
        "how tokens reach their experts, not what is computed",
        _any(
            "moe_enable_deepep",
            "moe_flex_dispatcher_backend",
            "moe_grouped_gemm",
            "moe_hybridep_num_sms",
            "moe_per_layer_logging",
            "moe_permute_fusion",
            "moe_shared_expert_overlap",
            "moe_token_dispatcher_type",
        ),
    ),
    # Rollouts
    Group(
        _GENERATION,
        "the engine runs in the trainer's processes, on their GPUs, and answers all prompts of a step before it trains",
        _any("colocated.enabled", "vllm_cfg.async_engine", "refit_transport", "use_async_rollouts"),
    ),
    Group(
        _GENERATION,
        "only read where the engine has processes of its own",
        _any(
            "colocated.resources.*",
            "port_range_high",
            "port_range_low",
            "refit_cfg.*",
            "real_quant_export_cpu_offload",
            "vllm_cfg.http_refit_api_key_env_var",
            "vllm_cfg.http_refit_server_port",
            "vllm_cfg.zmq_refit_server_port",
        ),
    ),
    Group(
        _GENERATION,
        "vLLM runs with tensor parallelism alone; further engine arguments go into vllm_kwargs",
        {
            "vllm_cfg.kv_cache_dtype": ("auto",),
            "vllm_cfg.num_first_layers_in_bf16": (0,),
            "vllm_cfg.num_last_layers_in_bf16": (0,),
            **_any(
                "vllm_cfg.enable_expert_parallel",
                "vllm_cfg.enable_prefix_caching",
                "vllm_cfg.expert_parallel_size",
                "vllm_cfg.pipeline_parallel_size",
            ),
        },
    ),
    Group(
        _GENERATION,
        "vLLM's weights are float32 or bfloat16 (vllm_cfg.precision)",
        {
            "vllm_cfg.is_mx": (False,),
            "vllm_cfg.quantization_ignored_layer_kws": (None, []),
            "vllm_cfg.use_deep_gemm": (False,),
        },
    ),
    Group(
        _GENERATION,
        "the rollout's log-probabilities are those of the distribution sampled from",
        {"vllm_cfg.logprobs_mode": ("processed_logprobs",)},
    ),
    Group(
        _GENERATION,
        "what the engine shows, and caches of images",
        _any(
            "vllm_cfg.enable_vllm_metrics_logger",
            "vllm_cfg.reset_encoder_cache_after_weight_update",
            "vllm_cfg.use_tqdm",
            "vllm_cfg.vllm_metrics_logger_interval",
        ),
    ),
    Group(
        f"{_GENERATION}.mcore_generation_config",
        "backend megatron generates on the training model itself, with policy.generation_batch_size rows at once",
        {
            "expose_http_server": (False,),
            "num_speculative_tokens": (0,),
            "parsers": (None, []),
            **_any(
                "block_size_tokens",
                "buffer_size_gb",
                "cuda_graph_impl",
                "enable_chunked_prefill",
                "enable_prefix_caching",
                "inference_cuda_graph_scope",
                "activation_checkpointing",
                "expert_model_parallel_size",
                "inference_grouped_gemm_backend",
                "kv_cache_management_mode",
                "sequence_parallel",
                "tensor_model_parallel_size",
                "transformer_impl",
                "unified_memory_level",
                "materialize_only_last_token_logits",
                "max_model_len",
                "max_tokens",
                "num_cuda_graphs",
                "refit_backend",
                "use_cuda_graphs_for_non_decode_steps",
            ),
        },
    ),
)

KNOWN_PATHS: tuple[str, ...] = tuple(
    (f"{group.section}.{name}" if group.section else name).removesuffix(".*") for group in TABLE for name in group.keys
)
"""Every path of the table, for suggestions."""
