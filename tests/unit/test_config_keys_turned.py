"""Every key of the schema changes something: here by what is built from the recipe, or by a test of another file,
which is named. Keys of losses, rewards, sampling and rows are turned in test_config_keys_matter.py, keys without any
effect are in config/unimplemented.py and named in a notice. A new key has to be put into one of the tables.
"""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from test_config_keys_matter import CASES, DATA, OTHER_FORMS

from megatron_lora.config.schema import Recipe
from megatron_lora.config.schema_tree import section_of, walk_fields
from tests.support.from_recipe import (
    LORA,
    MEGATRON,
    PEFT,
    Keys,
    advantages,
    answered,
    built,
    configured,
    counted,
    criticized,
    divided,
    engine,
    laid_out,
    optimized,
    planned,
    prompts_read,
    run,
    validated,
    written,
)
from tests.support.models import save_model
from tests.support.reference import save_adapter

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Two small bases, an adapter of the first, and a process group of one rank."""
    folder = tmp_path_factory.mktemp("models")
    save_model(folder / "dense", "qwen3", intermediate_size=128)
    save_model(folder / "other", "llama2")
    save_model(folder / "experts", "qwen3_moe")
    save_adapter(folder / "dense", folder / "adapter")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield folder
    dist.destroy_process_group()


# Key -> (what else has to be set for it to matter, its other value).
Turns = dict[str, tuple[Keys, Any]]
DECAYING = {f"{MEGATRON}.scheduler.lr_decay_style": "linear"}
WARM = {f"{MEGATRON}.scheduler.lr_warmup_iters": 4}
HEAVIER = {
    f"{MEGATRON}.scheduler.weight_decay_incr_style": "linear",
    f"{MEGATRON}.scheduler.start_weight_decay": 0.1,
    f"{MEGATRON}.scheduler.end_weight_decay": 0.2,
}
NAMED = {"policy.optimizer.kwargs": {"lr": 0.1}}
OPTIMIZER: Turns = {
    f"{MEGATRON}.optimizer.lr": ({}, 0.1),
    f"{MEGATRON}.optimizer.min_lr": (DECAYING, 1e-6),
    f"{MEGATRON}.optimizer.weight_decay": ({}, 0.5),
    f"{MEGATRON}.optimizer.adam_beta1": ({}, 0.5),
    f"{MEGATRON}.optimizer.adam_beta2": ({}, 0.5),
    f"{MEGATRON}.optimizer.adam_eps": ({}, 0.5),
    f"{MEGATRON}.optimizer.clip_grad": ({}, 0.5),
    f"{MEGATRON}.scheduler.lr_decay_style": ({}, "cosine"),
    f"{MEGATRON}.scheduler.lr_decay_iters": (DECAYING, 5),
    f"{MEGATRON}.scheduler.lr_warmup_iters": ({}, 4),
    f"{MEGATRON}.scheduler.lr_warmup_init": (WARM, 1e-6),
    f"{MEGATRON}.scheduler.start_weight_decay": (HEAVIER, 0.15),
    f"{MEGATRON}.scheduler.end_weight_decay": (HEAVIER, 0.3),
    f"{MEGATRON}.scheduler.weight_decay_incr_style": (HEAVIER, "cosine"),
    "policy.max_grad_norm": ({}, 0.5),
    "policy.optimizer.name": (NAMED, "torch.optim.SGD"),
    "policy.optimizer.kwargs": ({}, {"lr": 0.2}),
    "policy.scheduler": (
        NAMED,
        [{"name": "torch.optim.lr_scheduler.LinearLR", "kwargs": {"start_factor": 0.1, "total_iters": 5}}],
    ),
    f"{PEFT}.lora_plus_ratio": ({f"{MEGATRON}.enabled": True, f"{PEFT}.enabled": True}, 4.0),
    f"{LORA}.lora_plus_ratio": ({f"{LORA}.enabled": True}, 4.0),
}
WHICH: Turns = {
    "enabled": ({}, False),
    "type": ({}, "dora"),
    "target_modules": ({}, ["linear_qkv"]),
    "exclude_modules": ({}, ["linear_qkv"]),
    "modules_to_save": ({}, ["embed_tokens"]),
    "dim": ({}, 2),
    "alpha": ({}, 2),
    "use_rslora": ({}, True),
    "init_lora_weights": ({}, "pissa"),
    "rank_pattern": ({}, {"linear_qkv": 2}),
    "alpha_pattern": ({}, {"linear_qkv": 2.0}),
    "init_adapter": ({}, "adapter"),
}
EXPERTS = {"policy.model_name": "experts", f"{PEFT}.target_modules": ["linear_fc1"]}
PLANNED: Turns = {f"{PEFT}.{name}": turn for name, turn in WHICH.items()} | {
    f"{PEFT}.share_expert_adapters": (EXPERTS, True),
    f"{PEFT}.normalize_moe_lora": (EXPERTS, True),
}
IN_FOUR_BITS = {f"{LORA}.quantization": "nf4", f"{LORA}.lora_dtype": "float32"}
BUILT: Turns = {
    f"{LORA}.{name}": ({f"{LORA}.match_all_linear": False} if name == "target_modules" else {}, turn[1])
    for name, turn in WHICH.items()
} | {
    f"{LORA}.match_all_linear": ({f"{LORA}.target_modules": ["linear_qkv"]}, False),
    f"{LORA}.dora_cached_norms": ({f"{LORA}.type": "dora"}, False),
    f"{LORA}.dropout": ({}, 0.5),
    f"{LORA}.dropout_position": ({f"{LORA}.dropout": 0.5}, "pre"),
    f"{LORA}.lora_A_init": ({}, "normal"),
    f"{LORA}.use_triton": ({}, False),
    f"{LORA}.quantization": ({f"{LORA}.lora_dtype": "float32"}, "nf4"),
    "policy.model_name": ({}, "other"),
    "policy.hf_config_overrides": ({}, {"rms_norm_eps": 0.25}),
    "policy.precision": ({}, "bfloat16"),
    "policy.dtensor_cfg.activation_checkpointing": ({}, True),
    "policy.dtensor_cfg.cpu_offload": ({}, True),
    "policy.dtensor_cfg.compile": ({}, True),
}
PACKING, DYNAMIC = "policy.sequence_packing", "policy.dynamic_batching"
BATCHES: Turns = {
    "policy.train_micro_batch_size": ({}, 4),
    "policy.logprob_batch_size": ({}, 3),
    "policy.max_total_sequence_length": ({f"{PACKING}.enabled": True}, 300),
    "policy.make_sequence_length_divisible_by": ({}, 64),
    f"{PACKING}.enabled": ({f"{PACKING}.train_mb_tokens": 400}, True),
    f"{PACKING}.train_mb_tokens": ({f"{PACKING}.enabled": True}, 400),
    f"{PACKING}.logprob_mb_tokens": ({f"{PACKING}.enabled": True}, 900),
    f"{PACKING}.algorithm": ({f"{PACKING}.enabled": True, f"{PACKING}.train_mb_tokens": 400}, "concatenative"),
    f"{DYNAMIC}.enabled": ({f"{DYNAMIC}.train_mb_tokens": 400}, True),
    f"{DYNAMIC}.train_mb_tokens": ({f"{DYNAMIC}.enabled": True}, 400),
    f"{DYNAMIC}.logprob_mb_tokens": ({f"{DYNAMIC}.enabled": True}, 900),
}
ON, STAGES = {f"{MEGATRON}.enabled": True}, {f"{MEGATRON}.pipeline_model_parallel_size": 2}
LAYOUT: Turns = {
    f"{MEGATRON}.enabled": ({}, True),
    f"{MEGATRON}.tensor_model_parallel_size": (ON, 2),
    f"{MEGATRON}.pipeline_model_parallel_size": (ON, 2),
    f"{MEGATRON}.virtual_pipeline_model_parallel_size": (ON | STAGES, 3),
    f"{MEGATRON}.num_layers_in_first_pipeline_stage": (ON | STAGES, 9),
    f"{MEGATRON}.num_layers_in_last_pipeline_stage": (ON | STAGES, 9),
    f"{MEGATRON}.context_parallel_size": (ON, 2),
    f"{MEGATRON}.expert_model_parallel_size": (ON, 2),
    f"{MEGATRON}.expert_tensor_parallel_size": (ON, 3),
    f"{MEGATRON}.cuda_graph_impl": (ON | {f"{MEGATRON}.tensor_model_parallel_size": 2}, "local"),
    f"{MEGATRON}.sequence_parallel": (ON | {f"{MEGATRON}.tensor_model_parallel_size": 2}, True),
    "policy.dtensor_cfg.tensor_parallel_size": ({}, 2),
    "policy.dtensor_cfg.sequence_parallel": ({"policy.dtensor_cfg.tensor_parallel_size": 2}, True),
}
FEW = {"grpo.num_prompts_per_step": 32, "grpo.max_num_steps": 100}
COUNTED: Turns = {
    f"{name}.{key}": ({f"{name}.max_num_steps": 12}, value)
    for name in ("sft", "dpo", "grpo", "distillation")
    for key, value in (("max_num_epochs", 2), ("max_num_steps", 3), ("seed", 3))
} | {
    "policy.train_global_batch_size": (FEW, 128),
    "grpo.num_prompts_per_step": (FEW, 64),
    "grpo.num_generations_per_prompt": (FEW, 32),
    "distillation.num_prompts_per_step": ({"distillation.max_num_steps": 100}, 64),
    "distillation.num_generations_per_prompt": ({"distillation.max_num_steps": 100}, 4),
    "grpo.batch_multiplier": (FEW | {"grpo.use_dynamic_sampling": True}, 0.25),
    "grpo.use_dynamic_sampling": (FEW | {"grpo.batch_multiplier": 0.25}, True),
}
SAVING = "checkpointing"
LOOP: Turns = {
    f"{name}.{key}": ({f"{name}.val_period": 5}, value)
    for name in ("sft", "dpo", "grpo", "distillation")
    for key, value in (("val_period", 3), ("val_at_start", True), ("val_at_end", True))
} | {
    "grpo.val_start_at": ({"grpo.val_period": 5}, 6),
    "distillation.val_start_at": ({"distillation.val_period": 5}, 6),
    f"{SAVING}.enabled": ({}, False),
    f"{SAVING}.save_period": ({}, 5),
    f"{SAVING}.checkpoint_must_save_by": ({}, "00:00:00:00"),
}
RECOMPUTED = {f"{MEGATRON}.activation_checkpointing": True}
CONFIGURED: Turns = {
    f"{MEGATRON}.activation_checkpointing": ({}, True),
    f"{MEGATRON}.recompute_granularity": (RECOMPUTED, "selective"),
    f"{MEGATRON}.recompute_modules": (RECOMPUTED | {f"{MEGATRON}.recompute_granularity": "selective"}, ["mlp"]),
    f"{MEGATRON}.moe_router_dtype": ({}, "fp64"),
    f"{MEGATRON}.moe_router_load_balancing_type": ({}, "aux_loss"),
    f"{MEGATRON}.moe_aux_loss_coeff": ({}, 0.5),
    f"{MEGATRON}.moe_grouped_gemm": ({}, False),
    f"{MEGATRON}.moe_permute_fusion": ({}, False),
    f"{MEGATRON}.moe_token_dispatcher_type": ({}, "allgather"),
    f"{MEGATRON}.moe_shared_expert_overlap": ({}, True),
    f"{MEGATRON}.apply_rope_fusion": ({}, False),
    f"{MEGATRON}.bias_activation_fusion": ({}, False),
}
VLLM, SERVERS = "policy.generation.vllm_cfg", "policy.generation.servers"
AWAY = {"policy.generation.colocated.enabled": False}
ENGINE: Turns = {
    f"{VLLM}.tensor_parallel_size": ({}, 2),
    f"{VLLM}.gpu_memory_utilization": ({}, 0.3),
    f"{VLLM}.max_model_len": ({}, 64),
    f"{VLLM}.enforce_eager": ({}, True),
    f"{VLLM}.precision": ({}, "bfloat16"),
    f"{VLLM}.env_vars": ({}, {"A": "1"}),
    "policy.dtensor_cfg.env_vars": ({}, {"A": "1"}),
    f"{MEGATRON}.env_vars": ({f"{MEGATRON}.enabled": True}, {"A": "1"}),
    "policy.generation.vllm_kwargs": ({}, {"seed": 3}),
    f"{SERVERS}.urls": ({}, ["http://b:1"]),
    f"{SERVERS}.shared_folder": ({}, "/elsewhere"),
    f"{SERVERS}.timeout_seconds": ({}, 5.0),
    f"{SERVERS}.requests_at_once": ({}, 3),
}
ADVANTAGES: Turns = {
    "grpo.normalize_rewards": ({}, False),
    "grpo.use_leave_one_out_baseline": ({}, False),
    "grpo.advantage_clip_low": ({}, -0.1),
    "grpo.advantage_clip_high": ({}, 0.1),
}
CRITIC: Turns = {
    "critic.optim.lr": ({}, 0.1),
    "critic.optim.min_lr": (DECAYING, 1e-6),
    "critic.optim.weight_decay": ({}, 0.5),
    "critic.max_grad_norm": ({}, 0.5),
    "critic.cliprange_value": ({}, None),
    "critic.warmup_steps": ({}, 3),
}
PROMPTS: Turns = {
    "grpo.max_val_samples": ({}, 3),
    "grpo.val_batch_size": ({}, 3),
    "distillation.max_val_samples": ({"distillation.val_period": 3}, 3),
    "distillation.val_batch_size": ({"distillation.val_period": 3}, 3),
    "data.shuffle": ({}, False),
}
WRITTEN: Turns = {
    f"{SAVING}.save_optimizer": ({}, False),
    f"{SAVING}.keep_top_k": ({}, 1),
    f"{SAVING}.metric_name": ({}, "val:accuracy"),
    f"{SAVING}.higher_is_better": ({}, True),
    f"{MEGATRON}.checkpoint.async_save": ({}, True),
}
VALIDATED: Turns = {
    f"{name}.{key}": ({f"{name}.val_batches": 3}, 2)
    for name in ("sft", "dpo")
    for key in ("val_batches", "val_global_batch_size")
}
OBSERVED: list[tuple[Callable[[Path, Keys], Any], Turns]] = [
    (optimized, OPTIMIZER),
    (planned, PLANNED),
    (built, BUILT),
    (divided, BATCHES),
    (laid_out, LAYOUT),
    (counted, COUNTED),
    (run, LOOP),
    (configured, CONFIGURED),
    (engine, ENGINE),
    (advantages, ADVANTAGES),
    (criticized, CRITIC),
    (prompts_read, PROMPTS),
    (written, WRITTEN),
    (validated, VALIDATED),
    (answered, {"grpo.val_num_generations_per_prompt": ({}, 3)}),
    (answered, {"distillation.val_num_generations_per_prompt": ({}, 3)}),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("observe", "key", "turn"),
    [(observe, key, turn) for observe, table in OBSERVED for key, turn in table.items()],
    ids=[key for _, table in OBSERVED for key in table],
)
def test_another_value_builds_something_else(observe: Any, key: str, turn: tuple[Keys, Any], folder: Path):
    context, value = turn
    before = observe(folder, context)
    assert observe(folder, context | {key: value}) != before, f"{key} changes nothing"


@pytest.mark.slow
@pytest.mark.parametrize("observe", [observe for observe, _ in OBSERVED], ids=lambda observe: observe.__name__)
def test_the_same_recipe_builds_the_same(observe: Any, folder: Path):
    assert observe(folder, {}) == observe(folder, {})


# What takes a run, files or a server to show: file below tests/ -> keys, whose last names stand there.
SHOWN = {
    "unit/test_data_templates.py": "sft.only_unmask_final policy.tokenizer.chat_template_kwargs "
    "data.add_bos data.add_eos",
    "unit/test_data_dataset.py": "policy.tokenizer.chat_template data.num_workers",
    "unit/test_grpo_parts.py": "grpo.stop_at_validation_metric grpo.stop_at_validation_threshold "
    "data.max_input_seq_length "
    "grpo.skip_reference_policy_logprobs_calculation policy.generation.colocated.enabled policy.generation.backend",
    "end_to_end/test_grpo.py": "grpo.overlong_filtering grpo.seq_logprob_error_threshold "
    "grpo.dynamic_sampling_max_gen_batches policy.generation.refit logger.num_val_samples_to_print",
    "unit/test_distillation.py": "distillation.max_rollout_turns distillation.stop_at_validation_metric "
    "distillation.stop_at_validation_threshold teacher.adapter teacher.urls teacher.model_name teacher.timeout_seconds "
    "teacher.requests_at_once distillation.topk_logits_k loss_fn.kl_type loss_fn.mixed_kl_weight "
    "loss_fn.zero_outside_topk",
    "unit/test_rollout_ahead.py": "grpo.async_grpo.enabled grpo.async_grpo.max_trajectory_age_steps "
    "grpo.async_grpo.in_flight_weight_updates",
    "unit/test_rollout_servers.py": "policy.generation.servers.start_timeout_seconds",
    "unit/test_preload.py": "policy.preload_to_shm",
    "unit/test_environments.py": "env.environment.path env.environment.kwargs env.environment.timeout_seconds "
    "env.environment.max_result_tokens grpo.max_rollout_turns",
    "end_to_end/test_dpo.py": "dpo.precompute_reference_logprobs",
    "unit/test_rewards_runner.py": "env.math.num_workers",
    "unit/test_rewards_calling.py": "env.math.math_verify_impl",
    "distributed/backends_checks.py": "policy.reference_policy policy.reference_weights",
    "distributed/test_rollout_native.py": "policy.generation_batch_size",
    "distributed/test_megatron_shared_prefix.py": "policy.shared_prefix",
    "distributed/megatron_build.py": "policy.megatron_cfg.use_fused_linear_logprobs "
    "policy.megatron_cfg.fused_linear_logprobs_chunk_size",
    "distributed/test_megatron_adapters.py": "policy.megatron_cfg.peft.dropout "
    "policy.megatron_cfg.peft.dropout_position policy.megatron_cfg.peft.quantization "
    "policy.megatron_cfg.peft.double_quantization policy.megatron_cfg.peft.lora_dtype "
    "policy.megatron_cfg.peft.a2a_experimental policy.megatron_cfg.peft.lora_A_init_method "
    "policy.megatron_cfg.peft.lora_B_init_method policy.megatron_cfg.recompute_adapter_inputs",
    "distributed/policy_checks.py": "policy.megatron_cfg.peft.dora_cached_norms",
    "distributed/test_megatron_parity.py": "policy.megatron_cfg.optimizer.use_distributed_optimizer",
    "unit/test_router_replay.py": "policy.router_replay.enabled policy.router_replay.observe_only",
    "unit/test_router_keys.py": "policy.megatron_cfg.freeze_moe_router "
    "policy.megatron_cfg.moe_router_bias_update_rate policy.megatron_cfg.moe_router_enable_expert_bias",
    "distributed/test_megatron_router.py": "policy.megatron_cfg.moe_per_layer_logging",
    "unit/test_fp8.py": "policy.megatron_cfg.fp8_cfg.enabled policy.megatron_cfg.fp8_cfg.fp8 "
    "policy.megatron_cfg.fp8_cfg.fp8_recipe",
    "unit/test_four_bit.py": "policy.dtensor_cfg.lora_cfg.double_quantization policy.dtensor_cfg.lora_cfg.lora_dtype",
    "unit/test_tokenizer_files.py": "policy.tokenizer.name",
    "unit/test_run_folder.py": "checkpointing.checkpoint_dir checkpointing.resume",
    "unit/test_watch.py": "timeouts.training_seconds timeouts.slow_seconds",
    "unit/test_metrics.py": "logger.log_dir logger.wandb_enabled logger.wandb.project logger.wandb.name "
    "logger.tensorboard_enabled logger.tensorboard.log_dir logger.trackio_enabled logger.trackio.project "
    "logger.trackio.name logger.trackio.space_id logger.swanlab_enabled logger.swanlab.project logger.swanlab.name "
    "logger.mlflow_enabled logger.mlflow.experiment_name logger.mlflow.run_name logger.mlflow.tracking_uri",
}
# Keys of peft and Megatron that have one value here.
ONE_VALUE = {f"{PEFT}.bias", f"{LORA}.bias", f"{MEGATRON}.optimizer.optimizer"}


def test_every_key_is_turned_or_shown():
    turned = {key for _, table in OBSERVED for key in table}
    turned |= {f"{section}.{key}" for section, _, table, _, _ in CASES for key in table}
    rows = {f"data.{part}.{key}" for part in ("train", "validation", "default") for key in {*DATA, *OTHER_FORMS}}
    shown = {key for keys in SHOWN.values() for key in keys.split()}
    keys = {path for path, field in walk_fields(Recipe) if section_of(field.annotation) is None}
    known = turned | rows | shown | ONE_VALUE | {"policy.scheduler", "env.reward_functions"}
    assert keys - known == set(), "a new key: turn it in a table, or name the test that shows what it does"
    assert (shown | ONE_VALUE) - keys == set() and not shown & turned
    for place, names in SHOWN.items():
        text = (ROOT / "tests" / place).read_text()
        missing = [key for key in names.split() if not re.search(rf"\b{key.rpartition('.')[2]}\b", text)]
        assert not missing, f"tests/{place} says nothing of {missing}"
