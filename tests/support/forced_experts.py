"""transformers' experts at somebody else's choice: what router replay is measured against."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from megatron_lora.data.batch import Row


def routed_at_random(rows: Sequence[Row], layers: int, experts: int, chosen: int, seed: int) -> list[Row]:
    """The rows with experts drawn for each token but the last of each row, and none for the first row."""
    draw = torch.Generator().manual_seed(seed)
    found = [rows[0]]
    for row in rows[1:]:
        scores = torch.rand(len(row), layers, experts, generator=draw)
        routed = scores.topk(chosen).indices.to(torch.int16)
        routed[-1] = -1
        found.append(replace(row, routed_experts=routed))
    return found


def routers(model: torch.nn.Module) -> list[Any]:
    """Of each layer, in order."""
    return [module for module in model.modules() if type(module).__name__ == "Qwen3MoeTopKRouter"]


@contextmanager
def forced_experts(
    model: torch.nn.Module, rows: Sequence[Row], missed: list[Tensor] | None = None, *, forces: bool = True
) -> Iterator[None]:
    """Within it a padded batch of the rows goes to the rows' experts, where they name any. missed: takes for each layer
    and pass whether each choice ([choices] bool) is not among the model's own. forces: False: that alone."""
    routed = [row.routed_experts for row in rows]
    shape = next((experts.shape[1:] for experts in routed if experts is not None), None)
    if shape is None:
        yield
        return
    nothing = torch.full((1, *shape), -1, dtype=torch.int16)
    filled = [
        nothing.expand(len(row), *shape) if experts is None else experts
        for row, experts in zip(rows, routed, strict=True)
    ]
    batch = pad_sequence(filled, batch_first=True, padding_value=-1).flatten(0, 1).long()

    def force(layer: int) -> Any:
        def hook(router: Any, _: Any, output: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
            logits, weights, own = output
            wanted = batch[:, layer]
            known = wanted >= 0
            chosen = torch.where(known, wanted, own)
            if missed is not None:
                missed.append((wanted[:, :, None] != own[:, None]).all(2)[known])
            if not forces:
                return output
            picked = logits.softmax(-1, dtype=torch.float).gather(1, chosen)
            if router.norm_topk_prob:
                picked = picked / picked.sum(-1, keepdim=True)
            return logits, picked.to(weights.dtype), chosen

        return hook

    hooks = [router.register_forward_hook(force(layer)) for layer, router in enumerate(routers(model))]
    assert len(hooks) == shape[0]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
