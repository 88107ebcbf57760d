"""The loss on answers that were drawn: `loss_fn`."""

from collections.abc import Collection
from typing import Any, Literal

from pydantic import Field

from megatron_lora.config.schema_base import Float, NonNegativeFloat, PositiveFloat, Section

# Which keys distillation has to itself, and which it reads besides; the rest is for losses that have rewards.
OF_DISTILLATION = ("kl_type", "mixed_kl_weight", "zero_outside_topk")
READ_BY_DISTILLATION = (*OF_DISTILLATION, "ratio_clip_min", "ratio_clip_max", "ratio_clip_c")


class LossFnConfig(Section):
    """`loss_fn`: the loss of GRPO, and of distillation (`kl_type` and the two keys behind it, and the clips)."""

    ratio_clip_min: Float = Field(default=0.2, ge=0, le=1, description="The ratio is clipped at 1 - this.")
    ratio_clip_max: NonNegativeFloat = Field(default=0.2, description="The ratio is clipped at 1 + this.")
    ratio_clip_c: Float | None = Field(
        default=None, gt=1, description="Dual clip: bound of the loss where the advantage is negative; null: none."
    )
    token_level_loss: bool = Field(
        default=True, description="Mean over all answer tokens; off: mean over answers' means."
    )
    length_normalization: bool = Field(
        default=True,
        description="Off (Dr. GRPO): an answer's sum over tokens is divided by the constant "
        "`policy.generation.max_new_tokens`, mean over answers; `token_level_loss` then has no say.",
    )
    sequence_level_importance_ratios: bool = Field(
        default=False, description="GSPO: one ratio an answer, the geometric mean over its tokens."
    )
    reference_policy_kl_penalty: NonNegativeFloat = Field(
        default=0.01, description="Weight of the KL term; 0: no reference."
    )
    reference_policy_kl_type: Literal["k1", "k2", "k3"] = Field(default="k3", description="Estimator of the KL term.")
    kl_input_clamp_value: PositiveFloat | None = Field(
        default=20.0, description="Log-ratios are clamped to +-this before the estimator; null: not."
    )
    kl_output_clamp_value: PositiveFloat | None = Field(
        default=10.0, description="The estimate is clamped to +-this; null: not."
    )
    use_kl_in_reward: bool = Field(
        default=False, description="Subtract the KL term from the advantages, not from the loss."
    )
    use_on_policy_kl_approximation: bool = Field(
        default=False, description="Weigh the KL estimate by the ratio to the policy that sampled."
    )
    disable_ppo_ratio: bool = Field(default=False, description="REINFORCE: no ratio, and so no clipping.")
    force_on_policy_ratio: bool = Field(
        default=False, description="Take the ratio as 1, with the gradient of the policy."
    )
    use_cispo: bool = Field(
        default=False, description="CISPO: the clipped ratio, without gradient, weighs the log-likelihood."
    )
    positive_example_nll_weight: NonNegativeFloat = Field(
        default=0.0, description="Weight of a likelihood loss on answers of positive advantage."
    )
    use_importance_sampling_correction: bool = Field(
        default=False,
        description="Weigh tokens by trainer / rollout probability; of answers asked ahead that is the decoupled PPO "
        "objective (AReaL).",
    )
    proximal_policy: Literal["trainer", "rollout"] = Field(
        default="trainer",
        description="Policy that the ratio is to: the trainer's as training on the answers starts, or the one that "
        "drew them, with the rollout's own log-probabilities.",
    )
    truncated_importance_sampling_type: Literal["tis", "seq-tis", "icepop", "seq-mask-tis"] | None = Field(
        default=None,
        description="Bound those weights: clamp them (tis), clamp an answer's product and weigh all its tokens by it "
        "(seq-tis), drop tokens outside (icepop), or drop answers whose geometric mean is outside (seq-mask-tis).",
    )
    truncated_importance_sampling_ratio: PositiveFloat | None = Field(
        default=None, description="Upper bound of the weights."
    )
    truncated_importance_sampling_ratio_min: NonNegativeFloat | None = Field(
        default=None, description="Lower bound of the weights; null: none."
    )
    kl_type: Literal["forward", "reverse", "mixed"] = Field(
        default="reverse",
        description="Of distillation: D(teacher || policy), D(policy || teacher), or a weighted sum of both; all but "
        "reverse take `distillation.topk_logits_k`.",
    )
    mixed_kl_weight: Float = Field(default=0.5, ge=0, le=1, description="Of `kl_type: mixed`: the forward part's.")
    zero_outside_topk: bool = Field(
        default=False,
        description="The policy's probabilities of the teacher's most likely tokens are those of the whole "
        "vocabulary, and the teacher gives all others a log-probability of -100; off: of these tokens alone.",
    )


def written_otherwise(resolved: dict[str, Any], keys: Collection[str]) -> list[str]:
    """Those of `loss_fn`'s keys that were written, dotted, with another value than the default."""
    written, fields = resolved.get("loss_fn") or {}, LossFnConfig.model_fields
    return [
        f"loss_fn.{key}"
        for key, value in written.items()
        if key in keys and key in fields and value != fields[key].get_default(call_default_factory=True)
    ]
