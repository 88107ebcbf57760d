"""The switches of the clipped policy-gradient loss: NeMo RL's `loss_fn:` keys, checked against each other."""

from dataclasses import dataclass, fields
from typing import Any, Literal

from megatron_lora.errors import UserError
from megatron_lora.objectives.kl import KLType

TruncationType = Literal["tis", "seq-tis", "icepop", "seq-mask-tis"]
TRUNCATIONS: tuple[TruncationType, ...] = ("tis", "seq-tis", "icepop", "seq-mask-tis")


@dataclass(frozen=True)
class GRPOConfig:
    """NeMo RL's `loss_fn:` keys with its defaults, and this project's `proximal_policy` and `constant_length`.

    ratio_clip_min, ratio_clip_max: the ratio is clipped to [1 - min, 1 + max]; ratio_clip_c: dual clip, above 1.
    token_level_loss: mean over all target tokens; otherwise a mean over each sequence, then over sequences.
    constant_length: tokens by which each sequence's sum is divided in place of its own length, before the mean over
    sequences (Dr. GRPO); token_level_loss then has no say.
    proximal_policy: whose log-probabilities the ratio is to: the trainer's as training on the answers starts, or the
    rollout's. kl_*_clamp_value: nats. truncated_importance_sampling_ratio(_min): bounds of pi_trainer / pi_rollout.
    Raises UserError where two keys contradict each other.
    """

    proximal_policy: Literal["trainer", "rollout"] = "trainer"
    disable_ppo_ratio: bool = False
    token_level_loss: bool = True
    sequence_level_importance_ratios: bool = False
    ratio_clip_min: float = 0.2
    ratio_clip_max: float = 0.2
    ratio_clip_c: float | None = None
    reference_policy_kl_penalty: float = 0.01
    reference_policy_kl_type: KLType = "k3"
    kl_input_clamp_value: float | None = 20.0
    kl_output_clamp_value: float | None = 10.0
    use_kl_in_reward: bool = False
    use_importance_sampling_correction: bool = False
    truncated_importance_sampling_type: TruncationType | None = None
    truncated_importance_sampling_ratio: float | None = None
    truncated_importance_sampling_ratio_min: float | None = None
    use_on_policy_kl_approximation: bool = False
    force_on_policy_ratio: bool = False
    use_cispo: bool = False
    positive_example_nll_weight: float = 0.0
    constant_length: int | None = None

    @classmethod
    def from_config(cls, loss_fn: Any, max_new_tokens: int) -> "GRPOConfig":
        """From the recipe's `loss_fn` section; max_new_tokens is the constant of `length_normalization: false`.

        A truncation ratio without a type means `tis`, as in recipes older than the other types.
        """
        values = {f.name: getattr(loss_fn, f.name) for f in fields(cls) if f.name != "constant_length"}
        if values["truncated_importance_sampling_ratio"] is not None:
            values["truncated_importance_sampling_type"] = values["truncated_importance_sampling_type"] or "tis"
        return cls(**values, constant_length=None if loss_fn.length_normalization else max_new_tokens)

    def __post_init__(self) -> None:
        self._check_ranges()
        self._check_ratio_forms()
        self._check_truncation()

    @property
    def kl_in_loss(self) -> bool:
        """Whether the loss has a KL term (and so needs the reference's log-probabilities)."""
        return self.reference_policy_kl_penalty != 0 and not self.use_kl_in_reward

    @property
    def corrects_rollout(self) -> bool:
        """Whether the loss knows that another policy than the trainer's drew the answers."""
        return self.use_importance_sampling_correction or self.proximal_policy == "rollout"

    @property
    def counts_tokens(self) -> bool:
        """Whether the loss is a mean over tokens; otherwise over sequences."""
        return self.token_level_loss and self.constant_length is None

    def _check_ranges(self) -> None:
        if not 0 <= self.ratio_clip_min <= 1 or self.ratio_clip_max < 0:
            raise UserError(
                f"loss_fn.ratio_clip_min={self.ratio_clip_min} must be in [0, 1] and "
                f"loss_fn.ratio_clip_max={self.ratio_clip_max} not negative; 0.2 is usual for both"
            )
        if self.ratio_clip_c is not None and self.ratio_clip_c <= 1:
            raise UserError(f"loss_fn.ratio_clip_c={self.ratio_clip_c} must be above 1 (3 is usual), or null for none")
        if self.reference_policy_kl_type not in ("k1", "k2", "k3"):
            raise UserError(f"loss_fn.reference_policy_kl_type={self.reference_policy_kl_type!r}: use k1, k2 or k3")
        for name in ("reference_policy_kl_penalty", "positive_example_nll_weight"):
            if getattr(self, name) < 0:
                raise UserError(f"loss_fn.{name}={getattr(self, name)} must not be negative; 0 turns it off")
        for name in ("kl_input_clamp_value", "kl_output_clamp_value", "constant_length"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise UserError(f"loss_fn.{name}={value} must be above 0, or null for none")

    def _check_ratio_forms(self) -> None:
        if self.sequence_level_importance_ratios and self.counts_tokens:
            raise UserError("loss_fn.sequence_level_importance_ratios=true (GSPO) needs loss_fn.token_level_loss=false")
        if self.disable_ppo_ratio and self.ratio_clip_c is not None:
            raise UserError(
                f"loss_fn.ratio_clip_c={self.ratio_clip_c} clips a ratio that loss_fn.disable_ppo_ratio=true removes; "
                "set one of them to its default"
            )
        for name in ("use_importance_sampling_correction", "disable_ppo_ratio", "force_on_policy_ratio"):
            if self.proximal_policy == "rollout" and getattr(self, name):
                raise UserError(
                    f"loss_fn.proximal_policy=rollout corrects by the ratio to the policy that drew the answers and "
                    f"does not go with loss_fn.{name}=true; set one of them to its default"
                )
        if not self.use_cispo:
            return
        for name, clash in {
            "disable_ppo_ratio": self.disable_ppo_ratio,
            "force_on_policy_ratio": self.force_on_policy_ratio,
            "sequence_level_importance_ratios": self.sequence_level_importance_ratios,
            "ratio_clip_c": self.ratio_clip_c is not None,
            "token_level_loss=false": not self.counts_tokens,
        }.items():
            if clash:
                raise UserError(
                    f"loss_fn.use_cispo=true does not go with loss_fn.{name}: CISPO weights each token's "
                    "log-likelihood by its clipped ratio; set one of them to its default"
                )

    def _check_truncation(self) -> None:
        kind, high, low = (
            self.truncated_importance_sampling_type,
            self.truncated_importance_sampling_ratio,
            self.truncated_importance_sampling_ratio_min,
        )
        if kind is None:
            if high is not None or low is not None:
                raise UserError(
                    "loss_fn.truncated_importance_sampling_ratio has no effect without "
                    "loss_fn.truncated_importance_sampling_type; set it to "
                    f"one of {', '.join(TRUNCATIONS)}"
                )
            return
        if kind not in TRUNCATIONS:
            raise UserError(
                f"loss_fn.truncated_importance_sampling_type={kind!r} is unknown; use one of {', '.join(TRUNCATIONS)}"
            )
        if not self.use_importance_sampling_correction:
            raise UserError(
                f"loss_fn.truncated_importance_sampling_type={kind} needs "
                "loss_fn.use_importance_sampling_correction=true"
            )
        if high is None or high <= 0:
            raise UserError(f"loss_fn.truncated_importance_sampling_ratio={high} must be above 0 for {kind}")
        if low is None and kind in ("icepop", "seq-mask-tis"):
            raise UserError(f"loss_fn.truncated_importance_sampling_ratio_min must be set for {kind}")
        if low is not None and low > high:
            raise UserError(
                f"loss_fn.truncated_importance_sampling_ratio_min={low} must not exceed "
                f"loss_fn.truncated_importance_sampling_ratio={high}"
            )
        if kind in ("seq-tis", "seq-mask-tis") and self.sequence_level_importance_ratios:
            raise UserError(
                f"loss_fn.truncated_importance_sampling_type={kind} judges answers by tokens' weights and does not go "
                "with loss_fn.sequence_level_importance_ratios=true, which weighs whole answers; use tis or icepop"
            )
