"""The router of a mixture-of-experts layer: Megatron-Core's, its auxiliary loss summed as every loss here is.

Load balancing (Fedus et al. 2021, eq. 4, for several experts a token, as Megatron-Core computes it): a micro-batch of T
tokens adds coefficient * E * sum over experts of f P in each layer, f being the part of its choices that an expert gets
(they sum to 1) and P its mean probability. Micro-batches are weighted by their tokens, so that the step's loss is the
mean over its tokens; padding counts in none of it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.moe.moe_utils import (
    MoEAuxLossAutoScaler,
    get_tokens_per_expert_and_token_count,
    switch_load_balancing_loss_func,
)
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from megatron_lora.data.batch import MicroBatch
from megatron_lora.lora.router_adapter import RouterAdapter

METRIC = "load_balancing_loss"


class Router(TopKRouter):
    """balancing: the sum over this rank's training passes of the auxiliary loss times the micro-batch's tokens, this
    rank's share of it (its tokens of a sequence that ranks share). adapter: put in later."""

    balancing: Tensor | None = None

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        self.adapter: RouterAdapter | None = None

    def gating(self, input: Tensor) -> Tensor:
        if self.weight.dtype == torch.float32 and self.config.moe_router_dtype != "fp64":
            # Megatron-Core asks Transformer Engine, whose fp32 products are TF32: 1e-3 off, which is more than what
            # often lies between two experts.
            logits = F.linear(input, self.weight, self.bias)
        else:
            logits = super().gating(input)
        if self.adapter is None or not self.adapter.enabled:
            return logits
        return logits + self.adapter(input, logits.dtype)

    def _apply_aux_loss(
        self, probs: Tensor, scores_for_aux_loss: Tensor, routing_map: Tensor, with_padding_mask: bool = False
    ) -> Tensor:
        coefficient = self.get_aux_loss_coeff("aux_loss")
        if coefficient == 0:
            return probs
        assert with_padding_mask and self.balancing is not None
        per_expert, _, tokens = get_tokens_per_expert_and_token_count(
            routing_map=routing_map, reduce_group=self.tp_cp_group, topk=self.topk, with_padding_mask=True
        )
        total: Any = tokens
        loss = switch_load_balancing_loss_func(
            probs=scores_for_aux_loss,
            tokens_per_expert=per_expert,
            # A rank with nothing but padding has none.
            total_num_tokens=total.clamp(min=1),
            topk=self.topk,
            num_experts=per_expert.numel(),
            moe_aux_loss_coeff=coefficient,
        )
        weighted = loss * total
        self.balancing += weighted.detach()
        return MoEAuxLossAutoScaler.apply(probs, weighted)  # type: ignore[return-value]

    def _apply_expert_bias(self, routing_map: Tensor, padding_mask: Tensor | None = None) -> None:
        """The bias that experts are chosen by is the base's and stays: nothing is counted for it."""


class SoftmaxAndBiasRouter(Router):
    """Ernie 4.5's: experts are chosen by a softmax over all of them plus the bias, and weighed by the softmax over the
    chosen. Megatron-Core adds a bias to sigmoids alone."""

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        self.score_function = "softmax"
        # As transformers has it.
        self.expert_bias = self.expert_bias.unsqueeze(0)

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> Any:
        replayed = self.router_replay
        self.router_replay = _ChoiceByBias(self.expert_bias, replayed)  # type: ignore[assignment]
        try:
            return super().routing(logits, padding_mask)
        finally:
            self.router_replay = replayed


@dataclass(frozen=True)
class _ChoiceByBias:
    """A choice of experts, asked as Megatron-Core asks its RouterReplay. within: another one, which is given the scores
    that experts are chosen by."""

    bias: Tensor
    within: Any

    def get_replay_topk(
        self, scores: Tensor, topk: int, num_groups: int | None, group_topk: int | None, compute_topk: Any
    ) -> tuple[Tensor, Tensor]:
        """scores: the router's logits [tokens, experts]. Returns those of each token's experts, and which these are."""
        biased = scores.softmax(-1, dtype=torch.float32) + self.bias
        if self.within is None:
            _, chosen = compute_topk(biased, topk, num_groups=num_groups, group_topk=group_topk)
        else:
            _, chosen = self.within.get_replay_topk(biased, topk, num_groups, group_topk, compute_topk)
        return scores.gather(1, chosen), chosen


class BalancingLoss:
    """The routers' auxiliary loss of a step, over all layers and ranks. per_layer: its metrics have each layer's."""

    def __init__(self, chunks: Sequence[GPTModel], config: Any, *, per_layer: bool):
        self.routers = [module for chunk in chunks for module in chunk.modules() if isinstance(module, Router)]
        self.config = config
        self.per_layer = per_layer
        self.num_tokens = 1

    def begin(self, num_tokens: int, device: torch.device) -> None:
        """Before a step's first micro-batch. num_tokens: of the global batch, without padding."""
        self.num_tokens = num_tokens
        # Megatron's schedules ask for it; they would have gradients divided by the count of tokens afterwards. Of the
        # shape that they give it elsewhere: it is copied into one tensor.
        scale = torch.full((1,), 1.0 / num_tokens, device=device)
        self.config.moe_grad_scale_func = lambda: scale
        for router in self.routers:
            router.balancing = torch.zeros((), dtype=torch.float64, device=device)

    def metrics(self, device: torch.device) -> dict[str, float]:
        """What the step's passes have added to the loss, on every rank."""
        layers = torch.zeros(self.config.num_layers, dtype=torch.float64, device=device)
        for router in self.routers:
            number: Any = router.layer_number
            assert router.balancing is not None
            layers[number - 1] += router.balancing
        dist.all_reduce(layers)
        values: list[float] = (layers / self.num_tokens).tolist()
        found: dict[str, float] = {METRIC: sum(values)}
        if self.per_layer:
            found |= {f"{METRIC}_layer_{number}": value for number, value in enumerate(values)}
        return found


def padding_mask(batch: MicroBatch, mine: Tensor | None, model: Any, *, tp_rank: int, tp_size: int) -> Tensor:
    """[1, tokens] True where a token is padding, in the form in which a stage takes it. mine: the tokens of a
    context-parallel rank. tp_size: of the ranks that share a sequence, 1 without sequence parallelism."""
    lengths = torch.tensor(batch.row_lengths, device=batch.positions.device)
    padding = batch.positions >= lengths[batch.row_of_token]
    if mine is not None:
        padding = padding[mine]
    # The first stage divides it with the embeddings, the others take their part.
    if tp_size > 1 and not getattr(model, "module", model).pre_process:
        padding = padding.chunk(tp_size)[tp_rank]
    return padding.unsqueeze(0)
