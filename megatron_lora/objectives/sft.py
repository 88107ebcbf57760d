"""Supervised fine-tuning: the mean negative log-likelihood of the answers' tokens."""

import torch
from torch import Tensor

from megatron_lora.data.batch import MicroBatch, Row
from megatron_lora.objectives.base import LossSum


class SFTObjective:
    """Cross entropy over target tokens; counts tokens."""

    def count(self, rows: list[Row]) -> float:
        return float(sum(row.num_targets for row in rows))

    def __call__(self, logps: Tensor, batch: MicroBatch) -> LossSum:
        return LossSum(loss=-torch.where(batch.target_mask, logps, torch.zeros_like(logps)).sum())
