"""What is kept of merged weights on their way to an engine: how many bytes, and the columns that are read back."""

import torch
from torch import Tensor

from megatron_lora.policy.checksums import checksum, digest, join_ranks, to_numbers
from megatron_lora.rollout import vllm_worker
from megatron_lora.rollout.generator import Handover


class SentWeights:
    """Weights in the engine's dtype, noted one by one."""

    def __init__(self, dtype: torch.dtype, device: torch.device):
        self.dtype, self.device = dtype, device
        self._pieces: dict[tuple[str, int, int], Tensor] = {}
        self._columns: dict[str, dict[int, Tensor]] = {}
        self._num_bytes = 0

    def note(self, name: str, tensor: Tensor) -> Tensor:
        """The tensor as it is sent. name: Hugging Face's."""
        tensor = tensor.to(device=self.device, dtype=self.dtype)
        self._num_bytes += tensor.numel() * tensor.element_size()
        if name.startswith("model.layers.") and name.endswith("_proj.weight"):
            read_back = vllm_worker.is_read_back(name)
            columns = vllm_worker.sampled_columns(tensor.shape[1])
            # There are many experts: one column of each.
            self._columns[name] = {c: tensor[:, c] + 0.0 for c in (columns if read_back else columns[-1:])}
            for column, values in self._columns[name].items() if read_back else ():
                self._pieces[name, 0, column] = checksum(values[:, None], 0, column)
        return tensor

    def handover(self) -> Handover:
        """Of all that were noted."""
        return Handover(self._num_bytes, digest("merge", join_ranks([to_numbers(self._pieces)])), self._columns)
