"""The experts to which an engine sent each token, as `Sample` holds them."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_lora.data.packing import NOT_REPORTED
from megatron_lora.rollout.generator import RolloutError


def reported_experts(found: Any, num_tokens: int) -> Tensor:
    """[num_tokens, layers, k] int16 of what vLLM says of an answer and its prompt.

    found: [tokens, layers, k] integers, of all but what was drawn last, which the model has not read yet; a layer
    without experts has zeros. Raises RolloutError where it says nothing, or names an expert twice for a token: a buffer
    that nobody filled.
    """
    if found is None:
        raise RolloutError("vLLM did not report the experts of an answer (policy.router_replay.enabled)")
    experts = torch.from_numpy(np.asarray(found).astype(np.int16))
    if not num_tokens - 1 <= len(experts) <= num_tokens:
        raise RolloutError(f"vLLM reported the experts of {len(experts)} tokens of an answer, wanted {num_tokens - 1}")
    routed = experts.flatten(2).any(2).any(0)
    ordered = experts[:, routed].sort(2).values
    if not bool(routed.any()) or bool((ordered[..., 1:] == ordered[..., :-1]).any()):
        raise RolloutError("vLLM reported the same expert twice for a token: it did not record what its layers chose")
    rest = experts.new_full((num_tokens - len(experts), *experts.shape[1:]), NOT_REPORTED)
    return torch.cat([experts, rest])
