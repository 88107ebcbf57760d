"""Which metrics a recipe's runs log, by kind of line, so that `checkpointing.metric_name` is checked before weights
load."""

import difflib

from megatron_lora.config.schema import Recipe
from megatron_lora.errors import UserError

COUNTS = ("num_target_tokens", "step_time_seconds", "tokens_per_second")
TRAIN = ("loss", "grad_norm", "lr", "num_tokens", "peak_memory_gib", *COUNTS)
DPO = ("preference_loss", "sft_loss", "accuracy", "rewards_chosen", "rewards_rejected", "reward_margin")
ANSWERS = ("reward", "reward_std", "reward_errors", "unrewarded", "response_length", "truncated_share", "num_samples",
           "num_turns", "environment_errors", "environment_tokens")  # fmt: skip
GENERATION = ("adapter_version", "generation_seconds", "generation_tokens_per_second")
GRPO_VALIDATION = ("accuracy", "pass_k", "num_tokens", "step_time_seconds", "tokens_per_second", *ANSWERS, *GENERATION)
# Some of these are logged under some settings only.
GRPO_TRAIN = (
    *TRAIN, *ANSWERS, *GENERATION, "generation_batches", "dropped_groups", "num_updates", "zero_variance_groups",
    "policy_loss", "positive_nll_loss", "advantage_abs", "probs_ratio", "probs_ratio_clamped", "clip_fraction", "kl",
    "rollout_logprob_error", "token_mult_prob_error", "gen_kl_error", "policy_kl_error", "approx_entropy",
    "sampling_importance_ratio", "is_oob_ratio", "max_seq_prob_error", "masked_by_logprob_error", "reward_seconds",
    "sleep_seconds", "scoring_seconds", "training_seconds", "refit_seconds", "refit_bytes", "refit_proof_seconds",
    "scoring_model_tokens", "training_model_tokens", "refit_probe_error", "refit_probe_tolerance",
    "refit_wait_seconds", "rollout_wait_seconds", "stale_samples",
    "staleness_mean", "staleness_max",
)  # fmt: skip


def metric_names(recipe: Recipe, kind: str) -> list[str]:
    """Names of the numbers in a recipe's lines of this kind ("train", "validation")."""
    rewards = [f"reward_{entry.name or entry.kind}" for entry in recipe.env.reward_functions]
    oldest = recipe.grpo.async_grpo.max_trajectory_age_steps if recipe.grpo is not None else -1
    ages = [f"staleness_share_{age}" for age in range(oldest + 1)]
    names = {
        ("sft", "train"): TRAIN,
        ("sft", "validation"): ("loss", *COUNTS),
        ("dpo", "train"): (*TRAIN, *DPO),
        ("dpo", "validation"): ("loss", *COUNTS, *DPO),
        ("grpo", "train"): (*GRPO_TRAIN, *rewards, *ages),
        ("grpo", "validation"): (*GRPO_VALIDATION, *rewards),
    }
    return sorted(names[recipe.algorithm, kind])


def check_metric_name(recipe: Recipe, *, has_validation: bool) -> list[str]:
    """Notices; raises UserError for a `checkpointing.metric_name` that no line of this recipe has."""
    checkpointing = recipe.checkpointing
    if checkpointing.metric is None or not checkpointing.enabled:
        return []
    kind, name = checkpointing.metric
    names = metric_names(recipe, kind)
    short = {"train": "train", "validation": "val"}
    if name not in names and "metric_name" not in checkpointing.model_fields_set:
        return [
            f"checkpointing.metric_name is not set, and {recipe.algorithm.upper()} logs no {name}: the latest are kept"
        ]
    if name not in names:
        other = "validation" if kind == "train" else "train"
        near = [f"{short[kind]}:{found}" for found in difflib.get_close_matches(name, names, n=1, cutoff=0.5)]
        if not near and name in metric_names(recipe, other):
            near = [f"{short[other]}:{name}"]
        advice = f"did you mean {near[0]}?" if near else "name one of them, or null to keep the latest checkpoints"
        raise UserError(
            f"checkpointing.metric_name={checkpointing.metric_name!r}: no {kind} line of {recipe.algorithm.upper()} "
            f"has {name!r}; {advice} It has {', '.join(names)}"
        )
    if kind == "validation" and not _validates(recipe, has_validation):
        return [
            f"checkpointing.metric_name={checkpointing.metric_name!r}, but this run has no validation: the latest "
            "checkpoints are kept"
        ]
    return []


def check_stop_metric(recipe: Recipe, *, has_validation: bool) -> None:
    """Raises UserError for a `grpo.stop_at_validation_metric` that no validation of this run logs."""
    name = recipe.grpo.stop_at_validation_metric if recipe.grpo is not None else None
    if name is None:
        return
    if not _validates(recipe, has_validation):
        raise UserError(
            f"grpo.stop_at_validation_metric={name!r}, but this run has no validation; set data.validation (or "
            "data.train.split_validation_size) and grpo.val_period"
        )
    names = metric_names(recipe, "validation")
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
        advice = f"did you mean {near[0]}?" if near else f"it has {', '.join(names)}"
        raise UserError(f"grpo.stop_at_validation_metric={name!r}: validation does not log it; {advice}")


def _validates(recipe: Recipe, has_validation: bool) -> bool:
    section = recipe.sft or recipe.dpo or recipe.grpo
    assert section is not None
    return has_validation and (section.val_period > 0 or section.val_at_start or section.val_at_end)
