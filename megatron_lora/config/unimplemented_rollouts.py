"""NeMo RL's keys without effect: the engines that answer."""

from megatron_lora.config.unimplemented_kinds import Group, any_value

_GENERATION = "policy.generation"

TABLE: tuple[Group, ...] = (
    # Rollouts
    Group(
        _GENERATION,
        "the engine runs in the trainer's processes, on their GPUs, and answers all prompts of a step before it trains",
        any_value("vllm_cfg.async_engine", "refit_transport", "use_async_rollouts"),
    ),
    Group(
        _GENERATION,
        "only read where the engine has processes of its own",
        any_value(
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
            **any_value(
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
        "only read by engines that this project lacks",
        any_value("dynamo_cfg.*", "sglang_cfg.*", "trtllm_cfg.*", "trtllm_kwargs.*"),
    ),
    Group(_GENERATION, "rollouts are not quantized", {"quant_cfg": (None,), "real_quant": (False,)}),
    Group(_GENERATION, "only read where policy.generation.quant_cfg", any_value("real_quant_ignore")),
    Group(
        _GENERATION,
        "the rollout's log-probabilities are those of the distribution sampled from",
        {"vllm_cfg.logprobs_mode": ("processed_logprobs",)},
    ),
    Group(
        _GENERATION,
        "what the engine shows, and caches of images",
        any_value(
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
            **any_value(
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
                "moe_router_dtype",
                "moe_router_group_topk",
                "moe_router_num_groups",
                "num_cuda_graphs",
                "refit_backend",
                "use_cuda_graphs_for_non_decode_steps",
            ),
        },
    ),
)
