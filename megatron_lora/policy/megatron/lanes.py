"""New tokens through the training model: lanes as micro-batches of Megatron's own pipeline schedules."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from megatron_lora.lora.linear import LoRAColumnParallelLinear
from megatron_lora.policy.frozen_head import cap_logits
from megatron_lora.policy.lanes import Lanes, LaneStep
from megatron_lora.policy.megatron.kv_cache import CacheSession
from megatron_lora.policy.megatron.schedule import Engine

ATTENTION_KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
# (hidden states [t, 1, h] (this rank's part), output layer, its weight if shared, the step) -> what to keep.
Head = Callable[[Tensor, Any, Tensor | None, LaneStep], Tensor]


class MegatronLanes(Lanes):
    """chunks: this rank's stages, not wrapped for data parallelism."""

    def __init__(self, engine: Engine, chunks: Sequence[GPTModel], session: CacheSession):
        self.engine, self.chunks, self.session = engine, chunks, session
        self.num_lanes, self.num_slots, self.capacity = engine.world.pp, session.num_slots, session.capacity
        self.device = engine.world.device

    def next_token_logits(self, steps: Sequence[LaneStep]) -> list[Tensor]:
        return self._run(steps, self._next_token_logits)

    def decoded_logits(self, step: LaneStep) -> Tensor:
        self.session.step = step

        def processor(*, hidden_states: Tensor, output_layer: Any, output_weight: Tensor | None, **_: Any) -> Tensor:
            return self._vocabulary(_local_logits(hidden_states.squeeze(1), output_layer, output_weight).float())

        return self._forward(self.chunks[0], step, processor)

    def from_last_stage(self, value: Tensor | None, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        world = self.engine.world
        if value is None:
            value = torch.empty(*shape, dtype=dtype, device=world.device)
        if world.tp > 1 and world.pp_rank == world.pp - 1:
            dist.broadcast(value, group_src=0, group=self.engine.tp.group)
        if world.pp > 1:
            group: Any = parallel_state.get_pipeline_model_parallel_group()
            dist.broadcast(value, group_src=world.pp - 1, group=group)
        return value

    def padded(self, num_tokens: int) -> int:
        # Sequence parallelism splits it evenly.
        multiple = self.engine.tp.size if self.engine.tp.sequence_parallel else 1
        return -(-num_tokens // multiple) * multiple

    def copy(self, lane: int, sources: list[int], targets: list[int], length: int) -> None:
        self.session.copy(lane, sources, targets, length)

    def _run(self, steps: Sequence[LaneStep], head: Head) -> list[Tensor]:
        iterators = [iter(steps) for _ in self.chunks]
        single = len(self.chunks) == 1
        schedule = get_forward_backward_func()
        return schedule(
            forward_step_func=partial(self._forward_step, head=head),
            data_iterator=iterators[0] if single else iterators,
            model=self.chunks[0] if single else list(self.chunks),
            num_microbatches=len(steps),
            seq_length=steps[0].tokens.numel(),
            micro_batch_size=1,
            forward_only=True,
            collect_non_loss_data=True,
        )

    def _forward_step(self, iterator: Iterator[LaneStep], model: GPTModel, head: Head) -> tuple[Tensor, Any]:
        step = next(iterator)
        self.session.step = step

        def processor(*, hidden_states: Tensor, output_layer: Any, output_weight: Tensor | None, **_: Any) -> Tensor:
            return head(hidden_states, output_layer, output_weight, step)

        return self._forward(model, step, processor), _keep

    def _forward(self, model: GPTModel, step: LaneStep, processor: Callable[..., Tensor]) -> Tensor:
        return model(
            input_ids=step.tokens.unsqueeze(0),
            position_ids=step.positions.unsqueeze(0),
            attention_mask=None,  # type: ignore[arg-type]
            output_processor=processor,
        )

    def _next_token_logits(self, hidden: Tensor, output_layer: Any, weight: Tensor | None, step: LaneStep) -> Tensor:
        tp = self.engine.tp
        hidden = hidden.squeeze(1)
        if tp.sequence_parallel:
            hidden = tp.all_gather(hidden)
        last = torch.tensor(step.ends, dtype=torch.int64, device=hidden.device) - 1
        logits = _local_logits(hidden[last], output_layer, weight).float()
        if tp.size > 1:
            logits = tp.all_gather(logits.t()).t()
        return self._vocabulary(logits)

    def _vocabulary(self, logits: Tensor) -> Tensor:
        """Without the columns behind the vocabulary, which are padding and never sampled; capped."""
        return cap_logits(logits[:, : self.engine.head.vocab_size], self.engine.head.softcap)


@contextmanager
def generating(engine: Engine, chunks: Sequence[GPTModel]) -> Iterator[None]:
    """No gradients, no dropout, steps of equal length; every module's mode is as before afterwards.

    Attention is not cuDNN's, which PyTorch prefers on Hopper: it builds a plan for every new number of cached tokens,
    which takes longer than the step itself.
    """
    modules = [module for chunk in chunks for module in chunk.modules()]
    modes = [module.training for module in modules]
    variable = engine.config.variable_seq_lengths
    try:
        engine.config.variable_seq_lengths = False
        for chunk in chunks:
            chunk.eval()
        with torch.no_grad(), sdpa_kernel(ATTENTION_KERNELS):
            yield
    finally:
        engine.config.variable_seq_lengths = variable
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode


def _keep(output: Tensor, non_loss_data: bool) -> Tensor:
    # A new tensor: schedules of virtual stages empty the one they were given.
    return output.detach()


def _local_logits(hidden: Tensor, output_layer: Any, weight: Tensor | None) -> Tensor:
    """hidden [n, h], the same on every rank -> [n, vocabulary / tp], without communication."""
    head: Tensor = output_layer.weight if weight is None else weight
    bias = getattr(output_layer, "bias", None)
    if isinstance(output_layer, LoRAColumnParallelLinear) and output_layer.enabled:
        return output_layer.local_product(hidden, head, output_layer.draw_call(hidden))
    return F.linear(hidden, head, bias)
