"""What runs inside a `vllm serve` started by `megatron-lora serve`: methods of its workers, called over HTTP.

vLLM puts this class under its worker class (`--worker-extension-cls`). Arguments arrive as texts; results are JSON.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from megatron_lora.policy.checksums import to_numbers
from megatron_lora.policy.weights_check import known_fingerprint
from megatron_lora.rollout import vllm_worker


class ServerWorker:
    """Mixed into vLLM's worker."""

    def engine_facts(self) -> list[Any]:
        """[the base's fingerprint ("": its files are not here), the largest rank of an adapter (0: it takes none)]."""
        worker: Any = self
        adapters = worker.lora_config
        return [known_fingerprint(worker.model_config.model) or "", adapters.max_lora_rank if adapters else 0]

    def held_numbers(self, kind: str) -> list[list[Any]]:
        """[name, first row, first column, checksum] of what this rank holds; kind: `adapter` or `merge`."""
        with torch.no_grad():
            pieces = vllm_worker.adapter_pieces(self) if kind == "adapter" else vllm_worker.weight_pieces(self)
            return [[*key, value] for key, value in to_numbers(pieces).items()]

    def reload_from(self, folder: str) -> bool:
        """Replace every weight by those of the safetensors files in a folder (`folder_of_weights`)."""
        with torch.no_grad():
            vllm_worker.remove_adapter(self)
            vllm_worker.reload_weights(self, _tensors(Path(folder)))
        self._has_other_weights = True
        return True

    def restore_base(self) -> bool:
        """Hold the model folder's weights again, where a run has replaced them; whether one had."""
        replaced = getattr(self, "_has_other_weights", False)
        if replaced:
            with torch.no_grad():
                vllm_worker.reload_weights(self, None)
            self._has_other_weights = False
        return replaced


def _tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():
                yield name, file.get_tensor(name)
