"""What keys of other projects are called here (TRL, peft, transformers, verl, ms-swift, Automodel)."""

from typing import Any

from megatron_lora.config.schema import ALGORITHMS
from megatron_lora.config.schema_algorithms import DpoConfig

# Name there -> key here. {backend}, {adapter}: the backend's section and that of its adapters; {algorithm}: sft, ...
_NAMES = {
    "r": "{adapter}.dim",
    "rank": "{adapter}.dim",
    "lora_r": "{adapter}.dim",
    "lora_rank": "{adapter}.dim",
    "lora_alpha": "{adapter}.alpha",
    "lora_dropout": "{adapter}.dropout",
    "lora_target_modules": "{adapter}.target_modules",
    "target_modules": "{adapter}.target_modules",
    "lora_adapter_path": "{adapter}.init_adapter",
    "adapters": "{adapter}.init_adapter",
    "use_lora": "{adapter}.enabled",
    "use_dora": "{adapter}.type",
    "loraplus_lr_ratio": "{adapter}.lora_plus_ratio",
    "lorap_lr_ratio": "{adapter}.lora_plus_ratio",
    "peft_type": "{adapter}.type",
    "lora": "{adapter}",
    "lr": "policy.megatron_cfg.optimizer.lr",
    "learning_rate": "policy.megatron_cfg.optimizer.lr",
    "min_lr": "policy.megatron_cfg.optimizer.min_lr",
    "weight_decay": "policy.megatron_cfg.optimizer.weight_decay",
    "adam_beta1": "policy.megatron_cfg.optimizer.adam_beta1",
    "adam_beta2": "policy.megatron_cfg.optimizer.adam_beta2",
    "adam_epsilon": "policy.megatron_cfg.optimizer.adam_eps",
    "lr_scheduler_type": "policy.megatron_cfg.scheduler.lr_decay_style",
    "warmup_steps": "policy.megatron_cfg.scheduler.lr_warmup_iters",
    "lr_warmup_steps": "policy.megatron_cfg.scheduler.lr_warmup_iters",
    "max_grad_norm": "policy.max_grad_norm",
    "clip_grad": "policy.max_grad_norm",
    "grad_clip": "policy.max_grad_norm",
    "max_steps": "{algorithm}.max_num_steps",
    "total_training_steps": "{algorithm}.max_num_steps",
    "train_iters": "{algorithm}.max_num_steps",
    "num_train_epochs": "{algorithm}.max_num_epochs",
    "num_epochs": "{algorithm}.max_num_epochs",
    "total_epochs": "{algorithm}.max_num_epochs",
    "epochs": "{algorithm}.max_num_epochs",
    "seed": "{algorithm}.seed",
    "eval_steps": "{algorithm}.val_period",
    "test_freq": "{algorithm}.val_period",
    "global_batch_size": "policy.train_global_batch_size",
    "train_batch_size": "policy.train_global_batch_size",
    "batch_size": "policy.train_global_batch_size",
    "gradient_accumulation_steps": "policy.train_global_batch_size",
    "per_device_train_batch_size": "policy.train_micro_batch_size",
    "micro_batch_size": "policy.train_micro_batch_size",
    "use_shm": "policy.preload_to_shm",
    "max_length": "policy.max_total_sequence_length",
    "max_seq_length": "policy.max_total_sequence_length",
    "max_seq_len": "policy.max_total_sequence_length",
    "seq_length": "policy.max_total_sequence_length",
    "packing": "policy.sequence_packing.enabled",
    "bf16": "policy.precision",
    "fp16": "policy.precision",
    "dtype": "policy.precision",
    "torch_dtype": "policy.precision",
    "model": "policy.model_name",
    "model_path": "policy.model_name",
    "model_name_or_path": "policy.model_name",
    "pretrained_model_name_or_path": "policy.model_name",
    "chat_template": "policy.tokenizer.chat_template",
    "gradient_checkpointing": "{backend}.activation_checkpointing",
    "enable_gradient_checkpointing": "{backend}.activation_checkpointing",
    "tp": "{tensor_parallel}",
    "tp_size": "{tensor_parallel}",
    "tensor_parallel": "{tensor_parallel}",
    "tensor_parallel_size": "{tensor_parallel}",
    "pp": "policy.megatron_cfg.pipeline_model_parallel_size",
    "pp_size": "policy.megatron_cfg.pipeline_model_parallel_size",
    "pipeline_parallel_size": "policy.megatron_cfg.pipeline_model_parallel_size",
    "cp": "policy.megatron_cfg.context_parallel_size",
    "cp_size": "policy.megatron_cfg.context_parallel_size",
    "output_dir": "checkpointing.checkpoint_dir",
    "save_dir": "checkpointing.checkpoint_dir",
    "checkpoint_dir": "checkpointing.checkpoint_dir",
    "save_steps": "checkpointing.save_period",
    "save_freq": "checkpointing.save_period",
    "save_interval": "checkpointing.save_period",
    "save_total_limit": "checkpointing.keep_top_k",
    "dataset": "data.train.dataset_name",
    "dataset_name": "data.train.dataset_name",
    "train_files": "data.train.data_path",
    "val_files": "data.validation.data_path",
    "beta": "{beta}",
    "kl_coef": "{beta}",
    "kl_loss_coef": "{beta}",
    "label_smoothing": "dpo.label_smoothing",
    "loss_type": "dpo.loss_type",
    "num_generations": "grpo.num_generations_per_prompt",
    "rollout_n": "grpo.num_generations_per_prompt",
    "temperature": "policy.generation.temperature",
    "top_p": "policy.generation.top_p",
    "top_k": "policy.generation.top_k",
    "max_completion_length": "policy.generation.max_new_tokens",
    "max_new_tokens": "policy.generation.max_new_tokens",
    "max_response_length": "policy.generation.max_new_tokens",
    "gpu_memory_utilization": "policy.generation.vllm_cfg.gpu_memory_utilization",
    "vllm_gpu_memory_utilization": "policy.generation.vllm_cfg.gpu_memory_utilization",
    "reward_funcs": "env.reward_functions",
    "trackio_space_id": "logger.trackio.space_id",
    "run_name": "logger.wandb.name",
    "mlflow_tracking_uri": "logger.mlflow.tracking_uri",
    "experiment_name": "logger.mlflow.experiment_name",
    "project": "logger.wandb.project",
    "lora_bias": "{adapter}.bias",
    "modules_to_save": "{adapter}.modules_to_save",
    "use_rslora": "{adapter}.use_rslora",
    "rank_pattern": "{adapter}.rank_pattern",
    "alpha_pattern": "{adapter}.alpha_pattern",
    "load_in_4bit": "{adapter}.quantization",
    "quant_method": "{adapter}.quantization",
    "quant_bits": "{adapter}.quantization",
    "vllm_server_base_url": "policy.generation.servers.urls",
    "vllm_mode": "policy.generation.colocated.enabled",
    "use_vllm": "policy.generation.backend",
    "default_local_dir": "checkpointing.checkpoint_dir",
    "project_name": "logger.wandb.project",
    # verl, AReaL, torchtune, ms-swift, Automodel
    "path": "policy.model_name",
    "tokenizer_path": "policy.tokenizer.name",
    "n": "grpo.num_generations_per_prompt",
    "n_samples": "grpo.num_generations_per_prompt",
    "grpo_samples": "grpo.num_generations_per_prompt",
    "ppo_mini_batch_size": "policy.train_global_batch_size",
    "ppo_micro_batch_size_per_gpu": "policy.train_micro_batch_size",
    "local_batch_size": "policy.train_micro_batch_size",
    "max_prompt_length": "data.max_input_seq_length",
    "max_generated_tokens": "policy.generation.max_new_tokens",
    "clip_ratio": "loss_fn.ratio_clip_max",
    "clip_ratio_low": "loss_fn.ratio_clip_min",
    "clip_ratio_high": "loss_fn.ratio_clip_max",
    "clip_ratio_c": "loss_fn.ratio_clip_c",
    "eps_clip": "loss_fn.ratio_clip_max",
    "epsilon_high": "loss_fn.ratio_clip_max",
    "max_head_offpolicyness": "grpo.async_grpo.max_trajectory_age_steps",
    "kl_ctl": "loss_fn.reference_policy_kl_penalty",
    "kl_coeff": "loss_fn.reference_policy_kl_penalty",
    "loss_agg_mode": "loss_fn.token_level_loss",
    "total_train_epochs": "{algorithm}.max_num_epochs",
    "max_epochs": "{algorithm}.max_num_epochs",
    "max_steps_per_epoch": "{algorithm}.max_num_steps",
    "adapter_load": "{adapter}.init_adapter",
    "lr_warmup_fraction": "policy.megatron_cfg.scheduler.lr_warmup_iters",
    "recompute_granularity": "{backend}.activation_checkpointing",
    "precompute_ref_log_probs": "dpo.precompute_reference_logprobs",
    "ckpt_every_steps": "checkpointing.save_period",
    "val_every_steps": "{algorithm}.val_period",
    "adv_estimator": "grpo.adv_estimator.name",
    "gamma": "grpo.adv_estimator.gae_gamma",
    "lam": "grpo.adv_estimator.gae_lambda",
    "critic_warmup": "critic.warmup_steps",
    "scale_rewards": "grpo.normalize_rewards",
    "norm_adv_by_std_in_grpo": "grpo.normalize_rewards",
    "use_kl_loss": "loss_fn.reference_policy_kl_penalty",
    "train_type": "{adapter}.enabled",
    "epsilon": "loss_fn.ratio_clip_max",
    "save": "checkpointing.checkpoint_dir",
    "resume": "checkpointing.resume",
    "optim": "policy.megatron_cfg.optimizer",
    "warmup_ratio": "policy.megatron_cfg.scheduler.lr_warmup_iters",
    "save_strategy": "checkpointing.save_period",
    "eval_strategy": "{algorithm}.val_period",
    "bnb_4bit_quant_type": "{adapter}.quantization",
    "split_dataset_ratio": "data.train.split_validation_size",
    "dataset_num_proc": "data.num_workers",
    "rpo_alpha": "dpo.sft_loss_weight",
    "mask_truncated_completions": "grpo.overlong_filtering",
    "importance_sampling_level": "loss_fn.sequence_level_importance_ratios",
    "delta": "loss_fn.ratio_clip_c",
    "vllm_tensor_parallel_size": "policy.generation.vllm_cfg.tensor_parallel_size",
    "log_completions": "logger.num_val_samples_to_print",
}
_UPLOAD = (
    "a finished run is uploaded by `megatron-lora export --adapter-ckpt STEP_DIR --hf-ckpt-path OUT --push-to-hub "
    "OWNER/NAME`"
)
# What other projects have as a key and this one elsewhere.
_ELSEWHERE = {
    "defaults": "a recipe's file names the ones below it; no override does",
    "hydra": "there is no Hydra here: the run's folder is checkpointing.checkpoint_dir, sweeps are a shell's loop",
    "report_to": "each tracker has a key of its own: logger.wandb_enabled, tensorboard_enabled, trackio_enabled, "
    "swanlab_enabled, mlflow_enabled",
    "betas": "there are two keys: policy.megatron_cfg.optimizer.adam_beta1 and adam_beta2",
    "resume_from_checkpoint": "the same command goes on from the newest step in checkpointing.checkpoint_dir "
    "(checkpointing.resume=false: refuse a folder that holds a run)",
    "push_to_hub": _UPLOAD,
    "hub_model_id": _UPLOAD,
    "hub_strategy": _UPLOAD,
    "hub_token": _UPLOAD,
    "hub_private_repo": _UPLOAD,
    "push_to_hub_model_id": _UPLOAD,
    "assistant_only_loss": "always so: only the answers' tokens carry loss (sft.only_unmask_final: only the last's)",
    "completion_only_loss": "always so: only the answers' tokens carry loss",
    "logging_steps": "every step is logged, in metrics.jsonl and in each tracker",
    "ref_model": "the reference is what the run starts from: the base, or the base with "
    "init_adapter (policy.reference_policy=base: without it)",
    "num_iterations": "a step's answers are trained on once, in grpo.num_prompts_per_step x "
    "grpo.num_generations_per_prompt / policy.train_global_batch_size updates",
    "steps_per_generation": "policy.train_global_batch_size below grpo.num_prompts_per_step x "
    "grpo.num_generations_per_prompt makes several updates of a step's answers",
    "entropy_coeff": "there is no entropy bonus here",
    "neftune_noise_alpha": "there is no noise on embeddings here",
    "deepspeed": "layouts are keys of policy.megatron_cfg (Megatron-Core) and policy.dtensor_cfg (FSDP2)",
    "fsdp": "layouts are keys of policy.megatron_cfg (Megatron-Core) and policy.dtensor_cfg (FSDP2)",
    "merge_lora": "`megatron-lora merge --adapter-ckpt STEP_DIR --hf-ckpt-path OUT` merges a step's adapter",
}
_NO_OWN_MODEL = (
    "the critic is a second adapter and a value head on the policy's own frozen base, no model of its own (docs/ppo.md)"
)
# The same of keys, with all below them, whose last names mean something else in other sections.
_ELSEWHERE_BY_PATH = {"critic.model_name": _NO_OWN_MODEL, "critic.model": _NO_OWN_MODEL}


def elsewhere(path: str) -> str | None:
    """Where this project has what another has under the last name of `path`, and what is no key here."""
    for key, place in _ELSEWHERE_BY_PATH.items():
        if path == key or path.startswith(f"{key}."):
            return place
    return _ELSEWHERE.get(path.rpartition(".")[2].replace("-", "_"))


def algorithm_of(recipe: dict[str, Any]) -> str | None:
    """The algorithm whose section an unchecked recipe has, None where it has none or several."""
    present = [name for name in ALGORITHMS if recipe.get(name) is not None]
    return present[0] if len(present) == 1 else None


def key_here(path: str, recipe: dict[str, Any]) -> str | None:
    """The key of this project that another project calls as the last name of `path`, None where none is known.
    recipe: unchecked; its algorithm and its backend decide, unless the path names a backend."""
    name = path.rpartition(".")[2]
    key = _NAMES.get(name.replace("-", "_"))
    algorithm = algorithm_of(recipe) or "sft"
    if key is None or not is_read(key, algorithm):
        return None
    is_megatron = _value(recipe, "policy", "megatron_cfg", "enabled") is True or path.startswith("policy.megatron_cfg.")
    is_megatron = is_megatron and not path.startswith("policy.dtensor_cfg.")
    backend = "policy.megatron_cfg" if is_megatron else "policy.dtensor_cfg"
    return key.format(
        algorithm=algorithm,
        backend=backend,
        adapter=f"{backend}.peft" if is_megatron else f"{backend}.lora_cfg",
        tensor_parallel=f"{backend}.tensor_model_parallel_size" if is_megatron else f"{backend}.tensor_parallel_size",
        beta=ALGORITHMS[algorithm].beta_key or DpoConfig.beta_key,
    )


def is_read(key: str, algorithm: str) -> bool:
    """Whether a run of this algorithm reads the key: not where it stands in a section that only others have."""
    mine = {algorithm, *ALGORITHMS[algorithm].own_sections}
    others = {part for name, section in ALGORITHMS.items() for part in (name, *section.own_sections)} - mine
    return not any(key == part or key.startswith(f"{part}.") for part in others)


def _value(recipe: Any, *path: str) -> Any:
    for part in path:
        recipe = recipe.get(part) if isinstance(recipe, dict) else None
    return recipe
