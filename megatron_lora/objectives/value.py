"""The loss of a critic: squared error to the returns, clipped around the values that the advantages were taken from."""

import torch
from torch import Tensor

from megatron_lora.data.batch import MicroBatch
from megatron_lora.objectives.base import CountsTargets, LossSum

VALUES, RETURNS = "values", "returns"


class ValueObjective(CountsTargets):
    """0.5 max((V - R)^2, (clip(V, V_old - c, V_old + c) - R)^2) of each target token; counts target tokens.

    The clipped form is that of OpenAI's PPO code, TRL and verl: as with PPO's ratio (Schulman et al. 2017, eq. 7), the
    larger error counts, so that a step beyond the range gains nothing. clip: c, None for the plain squared error.

    Called with the critic's values in the place of log-probabilities: values[t], of the state in front of targets[t].
    Token fields of the batch, each [T]: "values" (V_old), "returns".
    """

    def __init__(self, clip: float | None = None):
        self.clip = clip

    def __call__(self, logps: Tensor, batch: MicroBatch) -> LossSum:
        mask, returns, old = batch.target_mask, batch.token_fields[RETURNS], batch.token_fields[VALUES]
        values = torch.where(mask, logps, torch.zeros_like(logps))
        errors = (values - returns).square()
        clipped = torch.zeros_like(mask)
        if self.clip is not None:
            others = (torch.clamp(values, old - self.clip, old + self.clip) - returns).square()
            clipped = others > errors
            errors = torch.maximum(errors, others)
        zero = torch.zeros_like(errors)
        metrics = {
            "value_clip_fraction": torch.where(mask, clipped.to(errors.dtype), zero).sum(),
            "value_mean": values.sum(),
            "return_mean": torch.where(mask, returns, zero).sum(),
        }
        loss = 0.5 * torch.where(mask, errors, zero).sum()
        return LossSum(loss=loss, metrics={name: value.detach() for name, value in metrics.items()})
