"""Per-token estimates of the KL divergence between the policy and a reference."""

from typing import Literal

import torch
from torch import Tensor

KLType = Literal["k1", "k2", "k3"]


def kl_estimate(
    logps: Tensor,
    reference_logps: Tensor,
    kl_type: KLType = "k3",
    input_clamp: float | None = None,
    output_clamp: float | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """KL(policy || reference) estimated at sampled tokens (Schulman 2020, "Approximating KL divergence").

    With x = log(pi_ref / pi) in nats: k1 = -x, k2 = x^2 / 2, k3 = exp(x) - 1 - x. x is clamped to +-input_clamp and
    the (weighted) estimate to +-output_clamp. weights: importance weights that multiply the estimate; where the input
    clamp bites they are detached, so that a clamped token carries no gradient at all.

    logps, reference_logps, weights: same shape, fp32, nats. Returns that shape. Raises ValueError for another kl_type.
    """
    log_ratio = reference_logps - logps
    if input_clamp is not None:
        clamped = log_ratio.clamp(-input_clamp, input_clamp)
        if weights is not None:
            weights = torch.where(clamped == log_ratio, weights, weights.detach())
        log_ratio = clamped
    if kl_type == "k1":
        estimate = -log_ratio
    elif kl_type == "k2":
        estimate = log_ratio.square() / 2
    elif kl_type == "k3":
        estimate = torch.expm1(log_ratio) - log_ratio
    else:
        raise ValueError(f"kl_type must be k1, k2 or k3, got {kl_type!r}")
    if weights is not None:
        estimate = weights * estimate
    if output_clamp is not None:
        estimate = estimate.clamp(-output_clamp, output_clamp)
    return estimate
