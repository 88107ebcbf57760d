"""NeMo RL's keys without effect: the model and the two backends that train it."""

from megatron_lora.config.unimplemented_kinds import ANY, Group, SameAs, any_value

_MEGATRON = "policy.megatron_cfg"

TABLE: tuple[Group, ...] = (
    # Model and batches
    Group(
        "policy",
        "where memory is, not what is computed; policy.dtensor_cfg.cpu_offload keeps optimizer state in CPU memory",
        any_value("offload_optimizer_for_logprob", "refit_buffer_size_gb", "activation_checkpointing_enabled"),
    ),
    Group(
        "policy",
        "a base whose folder holds it quantized is not read; give it in bfloat16 or float32",
        {"dequantize_base_checkpoint": (False,)},
    ),
    Group("policy", "quantization-aware training is not offered", {"quant_cfg": (None,)}),
    Group(
        "policy",
        "only read where policy.quant_cfg",
        any_value(
            "disable_modelopt_layer_spec",
            "quant_batch_size",
            "quant_calib_data",
            "quant_calib_size",
            "quant_sequence_length",
        ),
    ),
    Group("policy", "log-probabilities are computed in bounded chunks anyway", any_value("logprob_chunk_size")),
    Group("policy.draft", "there is no draft model", {"enabled": (False,)}),
    Group(
        "policy.draft",
        "only read where policy.draft.enabled",
        any_value("aux_layer_indices", "loss_weight", "model_name", "num_layers"),
    ),
    Group("policy.tokenizer", "use the tokenizer's own implementation", {"use_fastokens": (None, False)}),
    Group(
        "policy.sequence_packing",
        "the order of micro-batches and how they are fused do not change a step",
        any_value("microbatch_order", "fuse_loss"),
    ),
    Group(
        "policy",
        "micro-batches are padded to policy.make_sequence_length_divisible_by and no further",
        any_value("sequence_packing.sequence_length_round", "dynamic_batching.sequence_length_round"),
    ),
    # DTensor backend
    Group("policy.dtensor_cfg", "policy.megatron_cfg.enabled alone selects the backend", any_value("enabled")),
    Group(
        "policy.dtensor_cfg",
        "there is one implementation: transformers + peft + FSDP2",
        any_value(
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
            **any_value(
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
            **any_value("dp_replicate_size", "expert_parallel_size"),
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
        any_value(
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
        any_value("force_reconvert_from_hf", "converter_type"),
    ),
    Group(
        _MEGATRON,
        "gradients are accumulated and reduced, and optimizer state kept, in float32",
        {
            "distributed_data_parallel_config.grad_reduce_in_fp32": ANY,
            "optimizer.bf16": ANY,
            "optimizer.fp16": (False,),
            "optimizer.use_precision_aware_optimizer": ANY,
        },
    ),
    Group(
        _MEGATRON,
        "frozen weights, experts' too, have no gradients to accumulate; those of factors are added up in float32",
        {"gradient_accumulation_fusion": ANY},
    ),
    Group(
        _MEGATRON,
        "weights are in policy.precision, master weights and moments in float32",
        {"optimizer.params_dtype": ("float32", "torch.float32", "bfloat16", "torch.bfloat16")},
    ),
    Group(_MEGATRON, "the optimizer is adam", any_value("optimizer.sgd_momentum")),
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
        "weights in FP8 are frozen: they are quantized once and held in nothing else",
        any_value("fp8_cfg.fp8_param"),
    ),
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
        "only read where moe_token_dispatcher_type is flex",
        any_value("moe_enable_deepep", "moe_flex_dispatcher_backend", "moe_hybridep_num_sms"),
    ),
)
