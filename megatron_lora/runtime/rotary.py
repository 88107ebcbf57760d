"""Rotary embeddings of tokens whose positions do not begin at 0."""

from typing import Any

from torch import Tensor


def rotary_modules(chunk: Any) -> list[Any]:
    """The modules that give a chunk's layers their rotary embeddings: one for all, each layer's own (latent attention),
    or none (a hybrid)."""
    shared = getattr(chunk, "rotary_pos_emb", None)
    if shared is not None:
        return [shared]
    found = [getattr(layer.self_attention, "rotary_pos_emb", None) for layer in chunk.decoder.layers]
    return [module for module in found if module is not None]


def picked(embeddings: Any, positions: Tensor) -> Any:
    """What a rotary module gives for positions 0, 1, ..., at other positions instead. embeddings: [positions, 1, 1, d],
    behind another dimension where layers are of several kinds (Gemma 3), or beside a factor (latent attention)."""
    if isinstance(embeddings, tuple):
        return picked(embeddings[0], positions), *embeddings[1:]
    return embeddings.index_select(-4, positions)
