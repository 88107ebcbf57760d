"""Which keys of the recipe changed since a checkpoint, told in one line: those that leave the run's numbers alone, and
those that change it from here on."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_lora.config.loader import load_recipe, to_dict
from megatron_lora.config.schema import ALGORITHMS, Recipe
from megatron_lora.errors import UserError

LONGEST_VALUE = 60
# Keys without influence on what is learned: outputs, layout, memory and speed. All others have some.
HARMLESS = (
    r"logger\..*",
    r"checkpointing\..*",
    rf"({'|'.join(ALGORITHMS)})\.(val_.*|max_val_samples)",
    r"data\.(num_workers|validation.*)",
    r"env\.math\.num_workers",
    r"policy\.(train_micro_batch_size|logprob_batch_size|generation_batch_size|make_sequence_length_divisible_by)",
    r"policy\.(reference_weights|preload_to_shm)",
    r"policy\.(sequence_packing|dynamic_batching)\..*",
    r"policy\.megatron_cfg\.(enabled|.*_parallel.*|num_layers_in_.*|activation_checkpointing|recompute_.*)",
    r"policy\.megatron_cfg\.(.*fusion|use_fused_linear_logprobs|fused_linear_logprobs_chunk_size|checkpoint\..*)",
    r"policy\.megatron_cfg\.moe_(grouped_gemm|token_dispatcher_type|shared_expert_overlap|per_layer_logging)",
    r"policy\.megatron_cfg\.(freeze_moe_router|moe_router_enable_expert_bias|moe_router_bias_update_rate)",
    r"policy\.megatron_cfg\.(peft\.a2a_experimental|optimizer\.use_distributed_optimizer)",
    r"policy\.megatron_cfg\.peft\.lora_[AB]_init_method|policy\.dtensor_cfg\.lora_cfg\.lora_A_init",
    r"policy\.dtensor_cfg\.(tensor_parallel_size|sequence_parallel|activation_checkpointing|cpu_offload|compile)",
    r"policy\.dtensor_cfg\.lora_cfg\.use_triton",
    r"policy\.generation\.(refit|val_.*|vllm_cfg\.(tensor_parallel_size|gpu_memory_utilization|enforce_eager))",
)
# What the run does not read: the other backend's part of the recipe, and what `data.default` was merged into. Its
# folder
# may be moved.
NOT_COMPARED = (r"data\.default.*", r"checkpointing\.(checkpoint_dir|resume)")
UNREAD = {
    "megatron": (r"policy\.dtensor_cfg\..*", r"policy\.(optimizer|scheduler)(\..*)?", *NOT_COMPARED),
    "dtensor": (r"policy\.megatron_cfg\.(?!enabled|optimizer\.|scheduler\.).*", *NOT_COMPARED),
}


@dataclass(frozen=True)
class ChangedKeys:
    """`key old -> new` of each key that changed."""

    harmless: list[str] = field(default_factory=list)
    changing: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)

    def describe(self, step: int) -> str:
        """One line; "" where nothing changed."""
        groups = (
            ("without influence on the numbers", self.harmless),
            ("changing the run", self.changing),
            ("not taken over, torch's schedulers go on with what they were", self.unused),
        )
        parts = [f"{name}: {', '.join(keys)}" for name, keys in groups if keys]
        return f"keys changed since step {step}: {'; '.join(parts)}" if parts else ""


# What a torch scheduler keeps in its own state.
TORCH_SCHEDULE = (r"policy\.scheduler.*", r"policy\.optimizer\.kwargs\.lr")
# What shows in the prepared rows, where those were compared.
ROW_KEYS = (r"data\.(train\..*|add_bos|add_eos|add_generation_prompt|max_input_seq_length)", r"policy\.tokenizer\..*")


def changed_keys(before: Path, now: Recipe, compared: Sequence[str] = ()) -> ChangedKeys | None:
    """Compare the recipe with a checkpoint's config.yaml; None where this release cannot read that.

    compared: patterns of keys whose effect was compared itself and found to be the same.
    """
    try:
        old = load_recipe(before).resolved
    except UserError:
        return None
    groups = ChangedKeys()
    torch_schedule = now.policy.backend == "dtensor" and now.policy.scheduler is not None
    for key, was, value in differences(old, to_dict(now)):
        if not _fits(key, UNREAD[now.policy.backend]):
            group = groups.harmless if _fits(key, (*HARMLESS, *compared)) else groups.changing
            if torch_schedule and _fits(key, TORCH_SCHEDULE):
                group = groups.unused
            group.append(f"{key} {_show(was)} -> {_show(value)}")
    return groups


def algorithm_of(config: Path) -> str | None:
    """Of a checkpoint's config.yaml; None where this release cannot read that."""
    try:
        return load_recipe(config).recipe.algorithm
    except UserError:
        return None


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted path, old value, new value) of each key that both have with another value. What only one has is of
    another release, or of a section that one of two algorithms does not read."""
    for key in sorted(old.keys() & new.keys()):
        if isinstance(old[key], Mapping) and isinstance(new[key], Mapping):
            yield from differences(old[key], new[key], f"{prefix}{key}.")
        elif old[key] != new[key]:
            yield f"{prefix}{key}", old[key], new[key]


def _fits(key: str, patterns: Sequence[str]) -> bool:
    return any(re.fullmatch(pattern, key) for pattern in patterns)


def _show(value: Any) -> str:
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    return text if len(text) <= LONGEST_VALUE else text[: LONGEST_VALUE - 3] + "..."
