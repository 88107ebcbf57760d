"""The head of a critic on the last pipeline stage, the same on every tensor-parallel rank."""

import torch
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor, nn

from megatron_lora.lora.arithmetic import TensorParallel


class ValueHead(nn.Module):
    """hidden [t, 1, h] -> a value of each target [N] fp32. weight: [1, h], of the factors' dtype.

    Every rank computes every value, so each has the whole gradient of the weight and of its own tokens: none is summed
    over tensor-parallel ranks.
    """

    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, hidden: Tensor, sources: Tensor | None, tp: TensorParallel) -> Tensor:
        """hidden: this rank's rows under sequence parallelism. sources [N]: which of the T tokens of all ranks each
        value is asked for behind; None: behind each."""
        if tp.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False, group=tp.group)
        hidden = hidden.squeeze(1)
        if sources is not None:
            hidden = hidden.index_select(0, sources)
        return torch.nn.functional.linear(hidden.float(), self.weight.float()).squeeze(1)
