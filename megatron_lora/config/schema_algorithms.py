"""The algorithms: `sft`, `dpo`, `grpo`."""

import math
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from megatron_lora.config.algorithm_section import RolloutSection, SupervisedSection
from megatron_lora.config.schema_base import (
    Float,
    Int,
    NonNegativeFloat,
    Period,
    PositiveFloat,
    PositiveInt,
    Section,
)
from megatron_lora.config.schema_loss import OF_DISTILLATION, written_otherwise

if TYPE_CHECKING:
    from megatron_lora.config.schema import Recipe


class SftConfig(SupervisedSection):
    """`sft`: supervised fine-tuning."""

    rows = "conversations"

    only_unmask_final: bool = Field(default=False, description="Only the last answer of a conversation carries loss.")

    @property
    def final_answer_only(self) -> bool:
        return self.only_unmask_final


class DpoConfig(SupervisedSection):
    """`dpo`: direct preference optimization (Rafailov et al. 2023)."""

    rows = "pairs"
    beta_key = "dpo.reference_policy_kl_penalty"

    max_num_steps: PositiveInt = Field(default=150, description="Optimizer steps, at most.")
    val_period: Period = Field(default=25, description="Steps between validations; 0 or -1: none.")
    val_global_batch_size: PositiveInt = Field(default=8, description="Pairs a validation batch.")
    loss_type: Literal["sigmoid", "ipo"] = Field(
        default="sigmoid", description="DPO's loss, or IPO's (Azar et al. 2023)."
    )
    label_smoothing: Float = Field(
        default=0.0, ge=0, lt=0.5, description="Assumed probability that a pair's order is wrong (sigmoid)."
    )
    reference_policy_kl_penalty: PositiveFloat = Field(default=0.05, description="Beta of the paper.")
    preference_loss_weight: NonNegativeFloat = Field(default=1.0, description="Weight of the preference loss.")
    sft_loss_weight: NonNegativeFloat = Field(default=0.0, description="Weight of an SFT loss on the chosen answers.")
    preference_average_log_probs: bool = Field(
        default=False, description="Divide an answer's log-probability by its tokens in the preference loss."
    )
    sft_average_log_probs: bool | None = Field(
        default=None, description="Likewise in the SFT loss; null: `preference_average_log_probs`."
    )
    precompute_reference_logprobs: bool = Field(
        default=False, description="Compute the reference's log-probabilities of all rows once, ahead of training."
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.sft_average_log_probs is None:
            self.sft_average_log_probs = self.preference_average_log_probs
        if self.label_smoothing and self.loss_type != "sigmoid":
            raise ValueError(f"label_smoothing={self.label_smoothing} needs loss_type=sigmoid, not {self.loss_type}")
        if not self.preference_loss_weight and not self.sft_loss_weight:
            raise ValueError("preference_loss_weight and sft_loss_weight are both 0; nothing would be trained")
        return self

    def has_reference(self, recipe: "Recipe") -> bool:
        return True

    @property
    def scores_reference_ahead(self) -> bool:
        return self.precompute_reference_logprobs


# Estimator -> (normalize_rewards, use_leave_one_out_baseline), where its name says them.
FIXED_BY_NAME: dict[str, tuple[bool | None, bool | None]] = {
    "rloo": (False, True),
    "dr_grpo": (False, False),
    "reinforce_plus_plus": (False, False),
    "gae": (False, False),
}
# What `grpo.adv_estimator` has for one name alone.
OF_GAE = ("gae_gamma", "gae_lambda", "whiten_rewards", "whiten_advantages")


class AdvantageConfig(Section):
    """`grpo.adv_estimator`."""

    name: Literal["grpo", "rloo", "dr_grpo", "reinforce_plus_plus", "gae"] = Field(
        default="grpo",
        description="`grpo`: relative to the group, as the next two keys say; `rloo`: reward less the mean of the "
        "others (Ahmadian et al. 2024); `dr_grpo`: less the group's mean (Liu et al. 2025); `reinforce_plus_plus`: "
        "that, then normalised over all tokens of the step (Hu et al. 2025); `gae`: PPO, each token's by the values of "
        "a critic (Schulman et al. 2016), which the section `critic` describes.",
    )
    normalize_rewards: bool | None = Field(
        default=None,
        description="`grpo`: divide by the group's standard deviation; null: `grpo.normalize_rewards`. The others do "
        "not.",
    )
    use_leave_one_out_baseline: bool | None = Field(
        default=None,
        description="`grpo`: each answer's baseline is the mean of the others; null: `grpo.use_leave_one_out_baseline`."
        " The others' names say it.",
    )
    minus_baseline: bool = Field(
        default=True,
        description="`reinforce_plus_plus`: subtract the group's mean reward first; off: one answer a "
        "prompt is enough.",
    )
    gae_gamma: Float = Field(default=1.0, ge=0, le=1, description="`gae`: discount of what comes a token later.")
    gae_lambda: Float = Field(
        default=1.0,
        ge=0,
        le=1,
        description="`gae`: weight of longer estimates; 1: the rewards that followed less the value (no bias), 0: the "
        "next token's value alone.",
    )
    whiten_rewards: bool = Field(
        default=False,
        description="`gae`: divide the tokens' rewards by their deviation over the step, and so the returns that the "
        "critic learns.",
    )
    whiten_advantages: bool = Field(
        default=True, description="`gae`: (A - mean) / deviation over all answer tokens of the step."
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        changed = [key for key in OF_GAE if getattr(self, key) != type(self).model_fields[key].default]
        if changed and self.name != "gae":
            raise ValueError(f"{changed[0]} is for name=gae, which has a critic; the name is {self.name}")
        if not self.minus_baseline and self.name != "reinforce_plus_plus":
            raise ValueError(
                f"minus_baseline=false is for name=reinforce_plus_plus; {self.name} always subtracts its baseline"
            )
        return self

    def fill(self, normalize_rewards: bool, use_leave_one_out_baseline: bool) -> None:
        """What the name decides, or else the section above."""
        normalizes, leaves_out = FIXED_BY_NAME.get(self.name, (self.normalize_rewards, self.use_leave_one_out_baseline))
        self.normalize_rewards = normalize_rewards if normalizes is None else normalizes
        self.use_leave_one_out_baseline = use_leave_one_out_baseline if leaves_out is None else leaves_out


class RewardShapingConfig(Section):
    """`grpo.reward_shaping`: DAPO's soft penalty on overlong answers (Yu et al. 2025, eq. 13)."""

    enabled: bool = Field(default=False, description="Penalise answers that come near the limit.")
    max_response_length: PositiveInt | None = Field(
        default=None, description="The limit, in tokens; null: `policy.max_total_sequence_length`."
    )
    overlong_buffer_length: PositiveInt = Field(
        default=128, description="Tokens before the limit where the penalty begins."
    )
    overlong_buffer_penalty: NonNegativeFloat = Field(default=1.0, description="Penalty at the limit.")
    stop_properly_penalty_coef: Float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="In place of the above: the rewards of answers cut off by the limit, times this.",
    )


class RewardScalingConfig(Section):
    """`grpo.reward_scaling`: rewards clamped to the source's range and mapped linearly onto the target's."""

    enabled: bool = Field(default=False, description="Scale rewards.")
    source_min: Float = Field(default=0.0, description="Least reward.")
    source_max: Float = Field(default=1.0, description="Greatest reward.")
    target_min: Float = Field(default=0.0, description="What the least becomes.")
    target_max: Float = Field(default=1.0, description="What the greatest becomes.")


class AsyncGrpoConfig(Section):
    """`grpo.async_grpo`: rollout servers answer the prompts of later steps while the policy trains."""

    enabled: bool = Field(default=False, description="Ask for answers ahead of their step.")
    max_trajectory_age_steps: Int = Field(
        default=1,
        ge=0,
        description="Versions of the weights that an answer may be behind those that train on it; 0: as without, but "
        "for what a step does after its refit.",
    )
    in_flight_weight_updates: bool = Field(
        default=False,
        description="Hand a new adapter over while servers answer with the one before; off: wait for their answers.",
    )


class GrpoConfig(RolloutSection):
    """`grpo`: group relative policy optimization (Shao et al. 2024) and its descendants."""

    beta_key = "loss_fn.reference_policy_kl_penalty"

    normalize_rewards: bool = Field(default=True, description="Divide advantages by the group's standard deviation.")
    use_leave_one_out_baseline: bool = Field(
        default=True, description="Each answer's baseline is the mean reward of the group's others; off: of all."
    )
    adv_estimator: AdvantageConfig = Field(
        default_factory=AdvantageConfig, description="How rewards become advantages."
    )
    use_dynamic_sampling: bool = Field(
        default=False,
        description="DAPO: drop groups whose rewards are all equal and sample more prompts in their place.",
    )
    batch_multiplier: PositiveFloat = Field(
        default=1, description="Dynamic sampling: prompts a generation batch = this x `num_prompts_per_step`."
    )
    dynamic_sampling_max_gen_batches: PositiveInt = Field(
        default=10, description="Dynamic sampling: generation batches a step, at most."
    )
    overlong_filtering: bool = Field(default=False, description="Answers cut off by the length limit carry no loss.")
    reward_shaping: RewardShapingConfig = Field(
        default_factory=RewardShapingConfig, description="Soft penalty on overlong answers."
    )
    reward_scaling: RewardScalingConfig = Field(
        default_factory=RewardScalingConfig, description="Rewards mapped onto another range."
    )
    advantage_clip_low: Float | None = Field(default=None, description="Advantages are at least this; null: no bound.")
    advantage_clip_high: Float | None = Field(default=None, description="Advantages are at most this; null: no bound.")
    seq_logprob_error_threshold: PositiveFloat | None = Field(
        default=None,
        description="Answers whose mean over tokens of exp(|trainer - rollout log-probability|) is above this carry "
        "no loss; null: all do.",
    )
    async_grpo: AsyncGrpoConfig = Field(
        default_factory=AsyncGrpoConfig, description="Generation that runs ahead of training."
    )
    skip_reference_policy_logprobs_calculation: bool = Field(
        default=False,
        description="On: refuse a KL penalty, which needs the reference's log-probabilities; without one they are "
        "never computed, whatever this says.",
    )

    @field_validator("async_grpo", mode="before")
    @classmethod
    def _synchronous(cls, value: Any) -> Any:
        """NeMo RL's null: not asynchronous."""
        return {} if value is None else value

    @model_validator(mode="after")
    def _check(self) -> Self:
        low, high = self.advantage_clip_low, self.advantage_clip_high
        if low is not None and high is not None and low > high:
            raise ValueError(f"advantage_clip_low={low} is above advantage_clip_high={high}; swap them")
        self.adv_estimator.fill(self.normalize_rewards, self.use_leave_one_out_baseline)
        if self.num_generations_per_prompt == 1 and self.adv_estimator.use_leave_one_out_baseline:
            raise ValueError(
                "num_generations_per_prompt=1 leaves no other answer for use_leave_one_out_baseline=true; "
                "use at least 2 generations"
            )
        if self.num_generations_per_prompt == 1 and self.use_dynamic_sampling:
            raise ValueError(
                "num_generations_per_prompt=1 has no groups of different rewards, which use_dynamic_sampling=true "
                "looks for; use at least 2 generations, or set it to false"
            )
        return self

    @property
    def trains_critic(self) -> bool:
        return self.adv_estimator.name == "gae"

    @property
    def prompts_a_batch(self) -> int:
        multiplier = self.batch_multiplier if self.use_dynamic_sampling else 1
        return math.ceil(self.num_prompts_per_step * multiplier)

    @property
    def in_flight(self) -> bool:
        return self.async_grpo.enabled and self.async_grpo.in_flight_weight_updates

    @property
    def oldest_answer(self) -> int:
        return self.async_grpo.max_trajectory_age_steps if self.async_grpo.enabled else -1

    def complete(self, recipe: "Recipe") -> None:
        super().complete(recipe)
        shaping, loss_fn = self.reward_shaping, recipe.loss_fn
        shaping.max_response_length = shaping.max_response_length or recipe.policy.max_total_sequence_length
        if shaping.enabled and shaping.overlong_buffer_length > shaping.max_response_length:
            raise ValueError(
                f"grpo.reward_shaping.overlong_buffer_length={shaping.overlong_buffer_length} is above "
                f"grpo.reward_shaping.max_response_length={shaping.max_response_length}; lower it"
            )
        batch = recipe.policy.train_global_batch_size
        updates = self.num_samples // batch
        if updates > 1 and loss_fn.force_on_policy_ratio:
            raise ValueError(
                "loss_fn.force_on_policy_ratio=true takes every update as the first, but "
                f"policy.train_global_batch_size={batch} makes {updates} of a step's {self.num_samples} samples; use "
                f"{self.num_samples}, or set it to false"
            )
        if self.adv_estimator.name == "dr_grpo" and loss_fn.length_normalization:
            raise ValueError(
                "grpo.adv_estimator.name=dr_grpo is one half of Dr. GRPO, the other is a loss that is not divided "
                "by answers' lengths: set loss_fn.length_normalization=false (the advantage alone is name=grpo "
                "with normalize_rewards=false and use_leave_one_out_baseline=false)"
            )

    def unread(self, name: str, resolved: dict[str, Any]) -> list[str]:
        """What says something else than the estimator's name, or is of another loss."""
        written = resolved[name].get("adv_estimator") or {}
        of_estimator = [
            f"{name}.adv_estimator.{key}"
            for key in ("normalize_rewards", "use_leave_one_out_baseline")
            if written.get(key) not in (None, getattr(self.adv_estimator, key))
        ]
        return of_estimator + written_otherwise(resolved, OF_DISTILLATION)

    def notices(self, resolved: dict[str, Any]) -> list[str]:
        controller = resolved.get("async_rl")
        if self.async_grpo.enabled or not isinstance(controller, dict):
            return []
        if controller.get("enabled") is not True and not controller.get("sampler"):
            return []
        return [
            "async_rl has no effect: rollouts and training alternate, every answer comes from the newest weights (age "
            "0), and a step takes the time of both; set grpo.async_grpo.enabled=true in its place"
        ]

    def has_reference(self, recipe: "Recipe") -> bool:
        return recipe.loss_fn.reference_policy_kl_penalty > 0
