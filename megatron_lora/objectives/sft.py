"""Supervised fine-tuning: the mean negative log-likelihood of the answers' tokens."""

import torch
from torch import Tensor

from megatron_lora.data.batch import MicroBatch
from megatron_lora.objectives.base import CountsTargets, LossSum


class SFTObjective(CountsTargets):
    """Cross entropy over target tokens."""

    def __call__(self, logps: Tensor, batch: MicroBatch) -> LossSum:
        return LossSum(loss=-torch.where(batch.target_mask, logps, torch.zeros_like(logps)).sum())
