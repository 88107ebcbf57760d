"""Router replay: tokens go to the experts that the rollout engine sent them to (Ma et al. 2025, "Stabilizing MoE
Reinforcement Learning by Aligning Training and Inference Routers"); weights of those experts and all gradients are the
trainer's own.

Megatron-Core's RouterReplay holds one micro-batch for the whole process; a pipeline has several in flight, and layers
that are recomputed in the backward pass come back to an older one. Here a micro-batch carries its experts with it:
`PackedSeqParams` is handed to every layer, also to one that is recomputed.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from megatron_lora.data.batch import MicroBatch
from megatron_lora.lora.arithmetic import TensorParallel
from megatron_lora.policy.megatron.router import Router

METRIC = "routing_mismatch"
# What a router asks where none of its own choice is wanted.
Choose = Callable[..., tuple[Tensor, Tensor]]


class ReplayedChoice:
    """One router's choice of experts, asked as Megatron-Core asks its RouterReplay.

    reported: [tokens, k] int64, the engine's choice for this rank's tokens of the present pass, -1 for a token that it
    says nothing of; None: of no token. counted: [2] choices that the engine reported, and those of them that the router
    would not have made; None while nothing is counted.
    """

    def __init__(self, *, replays: bool):
        self.replays = replays
        self.reported: Tensor | None = None
        self.counted: Tensor | None = None
        self.layer_number: int | None = None  # Megatron-Core sets it

    def get_replay_topk(
        self,
        scores: Tensor,
        topk: int,
        num_groups: int | None = None,
        group_topk: int | None = None,
        default_compute_topk: Choose | None = None,
    ) -> tuple[Tensor, Tensor]:
        """scores: [tokens, experts]. Returns the scores of each token's experts, and which they are: [tokens, k]."""
        assert default_compute_topk is not None
        values, own = default_compute_topk(scores, topk, num_groups=num_groups, group_topk=group_topk)
        reported = self.reported
        if reported is None:
            return values, own
        if reported.shape != own.shape:
            raise ValueError(f"the engine reported experts of shape {tuple(reported.shape)}, wanted {tuple(own.shape)}")
        known = reported >= 0
        if self.counted is not None:
            missed = known & (reported.unsqueeze(2) != own.unsqueeze(1)).all(2)
            self.counted += torch.stack([known.sum(), missed.sum()])
        if not self.replays:
            return values, own
        chosen = torch.where(known, reported, own)
        return scores.gather(1, chosen), chosen


class RouterReplay:
    """The choices of all routers on this rank. replays: False: they are compared with the engine's alone."""

    def __init__(self, chunks: Sequence[GPTModel], num_layers: int, *, replays: bool):
        self.num_layers = num_layers
        self.choices: dict[int, ReplayedChoice] = {}
        for layer in (module for chunk in chunks for module in chunk.modules()):
            router = getattr(getattr(layer, "mlp", None), "router", None)
            if isinstance(layer, TransformerLayer) and isinstance(router, Router):
                column = int(layer.layer_number) - 1
                choice = self.choices[column] = ReplayedChoice(replays=replays)
                router.router_replay = choice  # type: ignore[assignment]
                layer.register_forward_pre_hook(partial(_take_reported, choice, column), with_kwargs=True)
        routers = sum(isinstance(module, Router) for chunk in chunks for module in chunk.modules())
        assert len(self.choices) == routers, f"{routers} routers, of which {len(self.choices)} stand in layers' MLPs"

    def begin(self, device: torch.device) -> None:
        """Count from here on."""
        for choice in self.choices.values():
            choice.counted = torch.zeros(2, dtype=torch.int64, device=device)

    def metrics(self, device: torch.device) -> dict[str, float]:
        """What was counted since `begin`, on every rank: the mean over layers of the part of the engine's choices that
        the trainer would not have made; 0 where the engine reported none. Collective."""
        layers = torch.zeros(self.num_layers, 2, dtype=torch.int64, device=device)
        for column, choice in self.choices.items():
            assert choice.counted is not None
            layers[column] += choice.counted
            choice.counted = None
        dist.all_reduce(layers)
        compared, missed = layers[layers[:, 0] > 0].double().unbind(1)
        return {METRIC: float((missed / compared).mean()) if compared.numel() else 0.0}


def _take_reported(choice: ReplayedChoice, column: int, layer: Any, arguments: Any, options: dict[str, Any]) -> None:
    """Before a layer's forward pass, the first or one that recomputes it."""
    experts = getattr(options.get("packed_seq_params"), "routed_experts", None)
    choice.reported = None if experts is None else experts[:, column].long()


def local_experts(batch: MicroBatch, mine: Tensor | None, tp: TensorParallel) -> Tensor | None:
    """The experts of the tokens that this rank routes. mine: the tokens of a context-parallel rank."""
    experts = batch.routed_experts
    if experts is None:
        return None
    if mine is not None:
        experts = experts[mine]
    return experts.chunk(tp.size)[tp.rank] if tp.sequence_parallel else experts
