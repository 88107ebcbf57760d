"""Run micro-batches through Megatron's pipeline schedules: forward, loss, backward, and metrics over all ranks."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_lora.data.batch import MicroBatch
from megatron_lora.lora.arithmetic import TensorParallel
from megatron_lora.objectives.base import Objective
from megatron_lora.policy.frozen_head import HeadOptions
from megatron_lora.policy.heads import TARGETS, Head, head_of
from megatron_lora.policy.interface import NonFiniteLoss, Passed
from megatron_lora.policy.megatron.graphs import GraphedPasses
from megatron_lora.policy.megatron.logprobs import target_logprobs
from megatron_lora.policy.megatron.packed import RotaryPositions, packed_params
from megatron_lora.policy.megatron.router import padding_mask
from megatron_lora.policy.megatron.router_replay import local_experts
from megatron_lora.policy.megatron.value_head import ValueHead
from megatron_lora.runtime.activity import tick
from megatron_lora.runtime.context_parallel import local_token_indices
from megatron_lora.runtime.spans import span
from megatron_lora.runtime.world import World


@dataclass
class Engine:
    """What every pass over micro-batches needs. chunks: this rank's stages, wrapped for data parallelism or not.
    rotary: of those stages. graphs: what runs a whole model's passes as CUDA graphs, where the recipe allows.
    names_padding: the layers are told which tokens are padding. names_experts: they are told to which experts a rollout
    engine sent each token. value_head: on the last stage of a critic, whose passes give values in the place of
    log-probabilities."""

    chunks: Sequence[Any]
    config: Any
    world: World
    tp: TensorParallel
    head: HeadOptions
    rotary: RotaryPositions
    graphs: GraphedPasses | None = None
    names_padding: bool = False
    names_experts: bool = False
    value_head: ValueHead | None = None
    metric_names: dict[str, list[str]] = field(default_factory=dict)


def run(
    engine: Engine,
    batches: Sequence[MicroBatch],
    objective: Objective,
    count: float,
    *,
    forward_only: bool,
    keep_logps: bool = False,
) -> Passed:
    """Forward (and backward) over this rank's micro-batches. Returns the loss and the metrics over the global batch,
    divided by `count`, on every rank; with keep_logps also the targets' log-probabilities that the loss was computed
    from, on every rank of this pipeline. Raises NonFiniteLoss on every rank, before any update."""
    head = head_of(objective)
    loss = partial(_loss, objective=objective, head=head, count=count, keep_logps=keep_logps)
    results = _schedule(engine, batches, head, loss, forward_only)
    value, metrics = _reduce(engine, objective, results, batches)
    return Passed(value, metrics, _kept(engine, batches, TARGETS, results) if keep_logps else None)


def run_head(engine: Engine, batches: Sequence[MicroBatch], head: Head) -> list[Tensor]:
    """What the head gives of this data-parallel rank's micro-batches, on every rank of its pipeline."""
    return _kept(engine, batches, head, _schedule(engine, batches, head, _keep, forward_only=True))


def _kept(engine: Engine, batches: Sequence[MicroBatch], head: Head, results: Sequence[dict[str, Any]]) -> list[Tensor]:
    """What the last stage kept, told to all: one exchange for all micro-batches."""
    sizes = [batch.targets.numel() for batch in batches]
    if engine.world.pp == 1:
        return [result["kept"] for result in results]
    flat = torch.empty(sum(sizes), *head.shape(batches[0]), device=engine.world.device)
    if results:
        torch.cat([result["kept"] for result in results], out=flat)
    group: Any = parallel_state.get_pipeline_model_parallel_group()
    dist.broadcast(flat, src=parallel_state.get_pipeline_model_parallel_last_rank(), group=group)
    return list(flat.split(sizes))


def _schedule(
    engine: Engine, batches: Sequence[MicroBatch], head: Head, loss: Any, forward_only: bool
) -> list[dict[str, Any]]:
    lengths = {batch.tokens.numel() for batch in batches}
    # Stages exchange shapes before tensors only where micro-batches differ: it costs a synchronisation each.
    engine.config.variable_seq_lengths = engine.world.pp > 1 and len(lengths) > 1
    iterators: list[Iterator[MicroBatch]] = [iter(batches) for _ in engine.chunks]
    single = len(engine.chunks) == 1
    step = get_forward_backward_func()
    return step(
        forward_step_func=partial(_forward_step, engine=engine, head=head, loss=loss),
        data_iterator=iterators[0] if single else iterators,
        model=engine.chunks[0] if single else list(engine.chunks),
        num_microbatches=len(batches),
        seq_length=max(lengths),
        micro_batch_size=1,
        forward_only=forward_only,
    )


def _forward_step(
    iterator: Iterator[MicroBatch], model: Any, engine: Engine, head: Head, loss: Any
) -> tuple[Tensor, Any]:
    tick()
    batch = next(iterator).to(engine.world.device)
    with span("forward"):
        if engine.graphs is None or head != TARGETS:
            output = forward(engine, model, batch, head)
        else:
            output = engine.graphs.logps(batch, engine.head)
    return output, partial(loss, batch=batch)


def forward(engine: Engine, model: GPTModel | Callable[..., Tensor], batch: MicroBatch, head: Head = TARGETS) -> Tensor:
    """One chunk's forward: on the last stage what the head gives of each target (a critic's value), hidden states
    elsewhere."""
    tokens, positions, wanted = batch.tokens, batch.positions, head.wanted(batch)
    world = engine.world
    indices = mine = None
    if world.cp > 1:
        indices = [local_token_indices(batch.cu_seqlens, world.cp, rank) for rank in range(world.cp)]
        mine = indices[world.cp_rank]
        tokens, positions, wanted = tokens[mine], positions[mine], wanted[mine]

    def process(*, hidden_states: Tensor, output_layer: Any, output_weight: Tensor | None, **_: Any) -> Tensor:
        if engine.value_head is not None:
            found = engine.value_head(hidden_states, batch.sources, engine.tp)
        else:
            found = target_logprobs(
                hidden_states, output_layer, output_weight, wanted, engine.tp, engine.head, batch.sources, head
            )
        return found if indices is None else _gather_over_cp(found, indices, world.cp_rank)

    padding = None
    if engine.names_padding:
        shared_by = engine.tp.size if engine.tp.sequence_parallel else 1
        padding = padding_mask(batch, mine, model, tp_rank=engine.tp.rank, tp_size=shared_by)
    experts = local_experts(batch, mine, engine.tp) if engine.names_experts else None
    with engine.rotary.at(batch):
        return model(
            input_ids=tokens.unsqueeze(0),
            position_ids=positions.unsqueeze(0),
            attention_mask=None,
            packed_seq_params=packed_params(batch, experts),
            padding_mask=padding,
            output_processor=process,
        )


def _loss(
    found: Tensor, *, objective: Objective, head: Head, count: float, keep_logps: bool, batch: MicroBatch
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """What Megatron's schedule asks of a loss: (scaled loss, a token count that we do not use, what to keep)."""
    result = objective(found, batch)
    scaled = result.loss / count
    kept = {"loss": scaled.detach(), "rows": batch.row_indices}
    kept |= {name: value.detach() / count for name, value in result.metrics.items()}
    if keep_logps:
        kept["kept"] = head.logps(found).detach().float()
    return scaled, torch.ones((), dtype=torch.int, device=scaled.device), kept


def _keep(found: Tensor, *, batch: MicroBatch) -> tuple[Tensor, Tensor, dict[str, Any]]:
    return found.sum(), torch.ones((), dtype=torch.int, device=found.device), {"kept": found.detach().float()}


def _reduce(
    engine: Engine, objective: Objective, results: list[dict[str, Any]], batches: Sequence[MicroBatch]
) -> tuple[float, dict[str, float]]:
    """Sum over micro-batches and data-parallel ranks; from the last pipeline stage to all. Context-parallel ranks
    hold the same sums."""
    names = _metric_names(engine, objective, results)
    device = engine.world.device
    sums = torch.zeros(len(names) + 1, dtype=torch.float64, device=device)
    for result in results:
        sums += torch.stack([result["loss"].double(), *(result[name].double() for name in names)])
    if results:
        dist.all_reduce(sums, group=parallel_state.get_data_parallel_group(with_context_parallel=False))
    if engine.world.pp > 1:
        last = parallel_state.get_pipeline_model_parallel_last_rank()
        group: Any = parallel_state.get_pipeline_model_parallel_group()
        dist.broadcast(sums, src=last, group=group)
    loss, *metrics = sums.tolist()
    if not math.isfinite(loss):
        raise NonFiniteLoss(loss, _rows_of_non_finite(results))
    return loss, dict(zip(names, metrics, strict=True))


def _metric_names(engine: Engine, objective: Objective, results: list[dict[str, Any]]) -> list[str]:
    """The objective's metrics, known to the last stage; told to the other stages once."""
    key = type(objective).__qualname__
    if key not in engine.metric_names:
        names = [name for name in results[0] if name not in ("loss", "rows", "kept")] if results else []
        if engine.world.pp > 1:
            box = [names]
            last = parallel_state.get_pipeline_model_parallel_last_rank()
            group: Any = parallel_state.get_pipeline_model_parallel_group()
            dist.broadcast_object_list(box, src=last, group=group)
            names = box[0]
        engine.metric_names[key] = names
    return engine.metric_names[key]


def _rows_of_non_finite(results: list[dict[str, Any]]) -> list[int]:
    mine = [row for result in results if not math.isfinite(float(result["loss"])) for row in result["rows"]]
    everyone: list[list[int]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, mine)
    return sorted({row for rows in everyone for row in rows if row >= 0})


class _GatherOverContextParallel(torch.autograd.Function):
    """[T / cp, ...] on each rank -> [T, ...] in token order on all. Every rank then computes the same loss, so the
    gradient of a local token is simply its slice."""

    @staticmethod
    def forward(ctx: Any, local: Tensor, indices: list[Tensor], rank: int) -> Tensor:  # type: ignore[override]
        ctx.mine = indices[rank]
        gathered = local.new_empty(local.shape[0] * len(indices), *local.shape[1:])
        group = parallel_state.get_context_parallel_group()
        dist.all_gather_into_tensor(gathered, local.contiguous(), group=group)
        out = torch.empty_like(gathered)
        out[torch.cat(indices)] = gathered
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return grad[ctx.mine], None, None


def _gather_over_cp(local: Tensor, indices: list[Tensor], rank: int) -> Tensor:
    return _GatherOverContextParallel.apply(local, indices, rank)  # type: ignore[return-value]
