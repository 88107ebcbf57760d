"""The clipped policy-gradient loss of GRPO and its relatives (PPO, DAPO, Dr. GRPO, GSPO, CISPO, REINFORCE)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_lora.data.batch import MicroBatch, Row
from megatron_lora.objectives.base import LossSum
from megatron_lora.objectives.grpo_config import GRPOConfig
from megatron_lora.objectives.kl import kl_estimate

POSITIVE_NLL_FIELD = "positive_nll_weight"


def clipped_policy_loss(
    log_ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float, dual_clip: float | None = None
) -> Tensor:
    """-min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) of each token, r = exp(log_ratio) (PPO, Schulman 2017, eq. 7).

    Different bounds are DAPO's clip-higher (Yu et al. 2025, eq. 10). dual_clip c: where A < 0 the objective is kept
    from falling below c A (Ye et al. 2020, arXiv:1912.09729). Shapes are equal; returns that shape.
    """
    ratio = log_ratio.exp()
    loss = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip_low, 1 + clip_high))
    if dual_clip is None:
        return loss
    return torch.where(advantages < 0, torch.minimum(loss, -advantages * dual_clip), loss)


@dataclass
class _Tokens:
    """A micro-batch's tokens, each field [T] and 0 where no target is: log-probabilities in nats, advantages.

    old: the trainer's as training on the answers starts; ratio_old: those that the ratio is to; rollout: the engine's,
    as it drew them; reference: the adapter-off model's.
    mask: [T] bool. row: [T]. lengths: [rows], target tokens of each row.
    """

    logps: Tensor
    old: Tensor
    ratio_old: Tensor
    advantages: Tensor
    rollout: Tensor | None
    reference: Tensor | None
    mask: Tensor
    row: Tensor
    lengths: Tensor

    def row_mean(self, values: Tensor) -> Tensor:
        """Mean of `values` [T] over each row's targets, spread to its tokens again: [T]."""
        sums = values.new_zeros(self.lengths.numel()).index_add(0, self.row, values * self.mask)
        return (sums / self.lengths.clamp(min=1))[self.row]

    def row_sum(self, values: Tensor) -> Tensor:
        """Sum of `values` [T] over each row's targets, spread to its tokens: [T]."""
        return self.row_mean(values) * self.lengths[self.row]


class GRPOObjective:
    """Clipped policy gradient with a KL term; counts tokens (`config.counts_tokens`) or sequences.

    Token fields of the batch, each [T] and shifted like the targets: "advantages"; "old_logps", "rollout_logps",
    "reference_logps" as far as `required_token_fields` names them ("rollout_logps" and "reference_logps" also give
    metrics where present). Rows without a target token (overlong-filtered, masked, padding) neither add nor count.
    With positive_example_nll_weight, call `set_positive_example_weights` on the global batch's rows first.

    Sequence-level forms read whole rows: `logps` holds a row's every token, also under context parallelism.

    on_policy: the first update on answers of the policy as it is. The old policy of the ratio is then this very forward
    pass, so the ratio is exactly 1; so it is of all else where "old_logps" is missing, and a missing "reference_logps"
    says that the policy still is its reference.
    """

    def __init__(self, config: GRPOConfig, *, on_policy: bool = False):
        self.config = config
        self.on_policy = on_policy

    @property
    def required_token_fields(self) -> frozenset[str]:
        """The token fields that this configuration cannot do without."""
        config = self.config
        fields = {"advantages"}
        to_rollout = config.proximal_policy == "rollout"
        if not (self.on_policy or config.force_on_policy_ratio or to_rollout) and (
            not config.disable_ppo_ratio or config.use_importance_sampling_correction
        ):
            fields.add("old_logps")
        on_policy_kl = config.kl_in_loss and config.use_on_policy_kl_approximation
        if config.use_importance_sampling_correction or on_policy_kl or to_rollout:
            fields.add("rollout_logps")
        if config.kl_in_loss and not self.on_policy:
            fields.add("reference_logps")
        return frozenset(fields)

    def count(self, rows: list[Row]) -> float:
        """Target tokens of `rows`, or the rows that have any, as `config.counts_tokens` says."""
        if self.config.counts_tokens:
            return float(sum(row.num_targets for row in rows))
        return float(sum(row.num_targets > 0 for row in rows))

    def __call__(self, logps: Tensor, batch: MicroBatch) -> LossSum:
        tokens = self._select(logps, batch)
        log_ratio = self._log_ratio(tokens)
        weights, out_of_bounds = self._importance_weights(tokens)
        policy_loss = self._policy_loss(tokens, log_ratio)
        loss = policy_loss if weights is None else weights * policy_loss
        kl = self._kl(tokens) if self.config.kl_in_loss else None
        if kl is not None:
            loss = loss + self.config.reference_policy_kl_penalty * kl

        metrics = self._metrics(tokens, log_ratio.detach(), weights, out_of_bounds, kl)
        metrics["policy_loss"] = self._reduce(policy_loss, tokens)
        loss_sum = self._reduce(loss, tokens)
        if self.config.positive_example_nll_weight > 0:
            nll = (-tokens.logps * batch.row_fields[POSITIVE_NLL_FIELD].to(logps.dtype)[tokens.row]).sum()
            loss_sum = loss_sum + self.config.positive_example_nll_weight * nll
            metrics["positive_nll_loss"] = nll
        return LossSum(loss=loss_sum, metrics={name: value.detach() for name, value in metrics.items()})

    def _select(self, logps: Tensor, batch: MicroBatch) -> _Tokens:
        missing = sorted(self.required_token_fields - batch.token_fields.keys())
        if missing:
            raise ValueError(f"GRPO needs the token fields {missing}, the batch has {sorted(batch.token_fields)}")

        def masked(values: Tensor) -> Tensor:
            return torch.where(batch.target_mask, values.to(logps.dtype), torch.zeros_like(logps))

        def field(name: str) -> Tensor | None:
            return masked(batch.token_fields[name]) if name in batch.token_fields else None

        current = masked(logps)
        as_it_is = current.detach()
        old = None if self.config.force_on_policy_ratio else field("old_logps")
        old = as_it_is if old is None else old
        reference = field("reference_logps")
        if reference is None and self.config.kl_in_loss:
            reference = as_it_is
        rollout = field("rollout_logps")
        ratio_old = as_it_is if self.on_policy else old
        if self.config.proximal_policy == "rollout":
            assert rollout is not None
            ratio_old = rollout
        return _Tokens(
            logps=current,
            old=old,
            ratio_old=ratio_old,
            advantages=masked(batch.token_fields["advantages"]),
            rollout=rollout,
            reference=reference,
            mask=batch.target_mask,
            row=batch.row_of_token,
            lengths=logps.new_zeros(batch.num_rows).index_add(0, batch.row_of_token, batch.target_mask.to(logps.dtype)),
        )

    def _log_ratio(self, tokens: _Tokens) -> Tensor:
        """log(pi / pi_old) [T]; a sequence's mean at each of its tokens for GSPO (Zheng et al. 2025, eq. 7)."""
        log_ratio = tokens.logps - tokens.ratio_old
        return tokens.row_mean(log_ratio) if self.config.sequence_level_importance_ratios else log_ratio

    def _policy_loss(self, tokens: _Tokens, log_ratio: Tensor) -> Tensor:
        config, advantages = self.config, tokens.advantages
        if config.force_on_policy_ratio:  # the ratio is 1 and carries the gradient of log pi, token by token
            return -advantages * (tokens.logps - tokens.logps.detach()).exp()
        if config.disable_ppo_ratio:  # REINFORCE (Ahmadian et al. 2024, arXiv:2402.14740)
            return -advantages * tokens.logps
        if config.use_cispo:  # MiniMax-M1 2025, eq. 4
            ratio = log_ratio.exp().clamp(1 - config.ratio_clip_min, 1 + config.ratio_clip_max)
            return -advantages * ratio.detach() * tokens.logps
        return clipped_policy_loss(
            log_ratio, advantages, config.ratio_clip_min, config.ratio_clip_max, config.ratio_clip_c
        )

    def _kl(self, tokens: _Tokens) -> Tensor:
        """KL to the reference at each token [T].

        The tokens are samples of the policy, so the gradient of a KL estimate needs the score function's term too
        (Tang and Munos 2025, "On a few pitfalls in KL divergence gradient estimation for RL"): a weight of value 1
        whose gradient is that of log pi; or pi / pi_rollout itself, which also corrects for who sampled.
        """
        config = self.config
        assert tokens.reference is not None
        if config.use_on_policy_kl_approximation:
            assert tokens.rollout is not None
            weights = torch.nan_to_num((tokens.logps - tokens.rollout).exp(), nan=0.0, posinf=0.0)
        else:
            weights = (tokens.logps - tokens.logps.detach()).exp()
        return kl_estimate(
            tokens.logps,
            tokens.reference,
            config.reference_policy_kl_type,
            config.kl_input_clamp_value,
            config.kl_output_clamp_value,
            weights,
        )

    def _importance_weights(self, tokens: _Tokens) -> tuple[Tensor | None, Tensor | None]:
        """Weights pi_old / pi_rollout [T] that correct for the engine's rounding and for the versions that the answers
        are behind, truncated as configured, and which tokens were out of bounds [T]. (None, None) where the correction
        is off. Times the clipped loss they are the decoupled objective (Fu et al. 2025, AReaL, eq. 5): its proximal
        policy is the trainer's as training on the answers starts, its behaviour policy the rollout's."""
        config = self.config
        if not config.use_importance_sampling_correction:
            return None, None
        assert tokens.rollout is not None
        log_weight = (tokens.old - tokens.rollout).detach()
        if config.sequence_level_importance_ratios or config.truncated_importance_sampling_type == "seq-tis":
            log_weight = tokens.row_sum(log_weight)
        weights = torch.nan_to_num(log_weight.exp(), nan=0.0, posinf=0.0)
        kind, high, low = (
            config.truncated_importance_sampling_type,
            config.truncated_importance_sampling_ratio,
            config.truncated_importance_sampling_ratio_min,
        )
        if kind is None:
            return weights, None
        low = 0.0 if low is None else low
        assert high is not None
        judged = weights
        if kind == "seq-mask-tis":  # a sequence's geometric mean decides for all its tokens
            judged = tokens.row_mean(torch.nan_to_num(log_weight, nan=0.0, posinf=0.0, neginf=0.0)).exp()
        out_of_bounds = (judged < low) | (judged > high)
        if kind in (
            "tis",
            "seq-tis",
        ):  # Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL
            # training"; an answer's product may be beyond what fp32 holds
            return torch.where(log_weight > 80, high, weights).clamp(low, high), out_of_bounds | (log_weight > 80)
        return torch.where(out_of_bounds, torch.zeros_like(weights), weights), out_of_bounds

    def _reduce(self, values: Tensor, tokens: _Tokens, metric: bool = False) -> Tensor:
        """The sum of `values` [T] that `count` turns into the configured mean. Metrics are never divided by
        constant_length: they stay means over a sequence's own tokens."""
        values = torch.where(tokens.mask, values, torch.zeros_like(values))
        if self.config.counts_tokens:
            return values.sum()
        if self.config.constant_length is not None and not metric:  # Dr. GRPO (Liu et al. 2025)
            return values.sum() / self.config.constant_length
        return (values / tokens.lengths.clamp(min=1)[tokens.row]).sum()

    @torch.no_grad()
    def _metrics(
        self,
        tokens: _Tokens,
        log_ratio: Tensor,
        weights: Tensor | None,
        out_of_bounds: Tensor | None,
        kl: Tensor | None,
    ) -> dict[str, Tensor]:
        config, advantages = self.config, tokens.advantages
        values: dict[str, Tensor] = {"advantage_abs": advantages.abs()}
        if not config.disable_ppo_ratio:
            ratio = log_ratio.exp()
            low, high = 1 - config.ratio_clip_min, 1 + config.ratio_clip_max
            clipped = ((ratio < low) & (advantages < 0)) | ((ratio > high) & (advantages > 0))
            values |= {"probs_ratio": ratio, "probs_ratio_clamped": ratio.clamp(low, high)}
            values["clip_fraction"] = clipped.to(ratio.dtype)
        if kl is not None:
            values["kl"] = kl
        elif tokens.reference is not None:
            values["kl"] = kl_estimate(tokens.logps, tokens.reference, config.reference_policy_kl_type)
        if tokens.rollout is not None:
            values |= _mismatch(tokens.logps, tokens.old, tokens.rollout)
        if weights is not None:
            values["sampling_importance_ratio"] = weights
        if out_of_bounds is not None:
            values["is_oob_ratio"] = out_of_bounds.to(tokens.logps.dtype)
        return {name: self._reduce(value, tokens, metric=True) for name, value in values.items()}


def _mismatch(logps: Tensor, old: Tensor, rollout: Tensor) -> dict[str, Tensor]:
    """How far trainer and rollout engine disagree at each token, and the entropy as sampled by the engine, [T] each."""
    error = old - rollout
    return {
        "rollout_logprob_error": error.abs(),
        "token_mult_prob_error": error.abs().exp(),
        "gen_kl_error": kl_estimate(rollout, old),
        "policy_kl_error": kl_estimate(old, rollout),
        "approx_entropy": -(logps - rollout).exp() * logps,
    }


def set_positive_example_weights(rows: list[Row], objective: GRPOObjective) -> None:
    """Prepare the likelihood term on correct answers (VAPO, Yuan et al. 2025, eq. 10) for one global batch.

    The term is a mean over the tokens of the rows with row_fields["reward"] > 0, a number other than the loss's
    count, so each row gets row_fields["positive_nll_weight"]: count / tokens of correct rows, or 0. `rows`: every row
    of the global batch, on every rank the same.
    """
    num_positive = sum(row.num_targets for row in rows if row.row_fields["reward"] > 0)
    weight = objective.count(rows) / num_positive if num_positive else 0.0
    for row in rows:
        row.row_fields[POSITIVE_NLL_FIELD] = weight if row.row_fields["reward"] > 0 else 0.0
