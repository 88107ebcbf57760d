"""NeMo RL's keys without effect: the run's surroundings, checkpoints and logs, data, the algorithms."""

from megatron_lora.config.unimplemented_kinds import Group, any_value

TABLE: tuple[Group, ...] = (
    # The run's surroundings
    Group(
        "cluster",
        "torchrun decides how many processes run and where",
        any_value("gpus_per_node", "num_nodes", "segment_size", "master_port_range_low", "master_port_range_high"),
    ),
    Group(
        "data_plane",
        "how rows travel between processes; here they stay in the trainer's",
        any_value(
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
        "on-policy distillation is the section distillation, with a teacher",
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
        "weights are a distributed checkpoint plus hf_adapter/; conversion/ makes Hugging Face folders",
        {"model_save_format": (None, "safetensors"), "save_consolidated": (False,)},
    ),
    Group("logger", "no files are sent to MLflow", any_value("mlflow.artifact_location")),
    Group(
        "logger",
        "step time and peak memory are always in metrics.jsonl",
        any_value("monitor_gpus", "gpu_monitoring.*", "wandb.log_nemo_gym_full_result_tables"),
    ),
    # Data
    Group(
        "data",
        "an answer stands behind the template's generation prompt, where the template has one",
        any_value("add_generation_prompt"),
    ),
    Group("sft", "validation packs its rows as training does", any_value("val_micro_batch_size")),
    Group("dpo", "validation packs its pairs as training does", any_value("val_micro_batch_size")),
    Group("data", "data sets in a list are shuffled as one", {"use_multiple_dataloader": (False,)}),
    *(
        Group(
            f"data.{part}",
            "the form of the rows decides how they are read, env.reward_functions how they are rewarded",
            {"processor": (None, "sft_processor", "math_hf_data_processor"), "env_name": (None, "math")},
        )
        for part in ("default", "train", "validation")
    ),
    Group("env", "only read by an environment of that name, which is refused (data.*.env_name)", any_value("dapo.*")),
    # GRPO
    Group(
        "grpo.adv_estimator",
        "estimators of advantages from a value model, a teacher or several rewards at once are not offered",
        {"reward_weights": (None,)},
    ),
    Group(
        "",
        "answers are asked ahead as grpo.async_grpo says, in the prompts' order",
        any_value("async_rl.*"),
    ),
    Group(
        "grpo.async_grpo",
        "an answer is drawn by one version of the weights, and keys and values of another never serve it",
        any_value("recompute_kv_cache_after_weight_updates"),
    ),
    Group(
        "grpo.async_grpo",
        "a server that fails is left out and its prompts are asked elsewhere, as often as it takes; with none left the "
        "run ends",
        any_value("max_generation_failures"),
    ),
    Group(
        "grpo",
        "answers are rewarded by env.reward_functions",
        {
            "invalid_tool_call_advantage": (None,),
            "malformed_thinking_advantage": (None,),
        },
    ),
)
