"""The Megatron-Core backend behind `Policy`."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_lora.config.schema import PolicyConfig
from megatron_lora.config.schema_critic import CriticConfig
from megatron_lora.conversion.model_names import model_parameters
from megatron_lora.conversion.weight_source import WeightSource
from megatron_lora.data.batch import MicroBatch
from megatron_lora.lora.inject import Adapted, AdapterOptions, inject, put_factors
from megatron_lora.lora.layout import ADAPTER_FILE, AdapterSpec
from megatron_lora.lora.linear import LoRALinear
from megatron_lora.lora.methods import ReadWeight
from megatron_lora.lora.peft_format import ExpertLayout, to_hf
from megatron_lora.objectives.base import Objective
from megatron_lora.policy.adam_state import optimizer_backend, whole_model_backend
from megatron_lora.policy.adapter_start import DrawnStart, check_same_adapter, draw_start, starting_adapter
from megatron_lora.policy.backend import DTYPES
from megatron_lora.policy.batching import BatchingOptions
from megatron_lora.policy.checksums import Pieces
from megatron_lora.policy.critic import critic_policy
from megatron_lora.policy.cuda_graphs import ungraphed_reason
from megatron_lora.policy.frozen_head import HeadOptions
from megatron_lora.policy.heads import Head
from megatron_lora.policy.interface import AdapterTensors, Passed, PendingSave
from megatron_lora.policy.lanes import LanePolicy
from megatron_lora.policy.learning_rate import build_scheduler
from megatron_lora.policy.megatron import checkpoint, optim, saved_modules, schedule, taken_over
from megatron_lora.policy.megatron.adapter_checksums import adapter_pieces
from megatron_lora.policy.megatron.adapter_gather import gather_adapter, over_pipeline
from megatron_lora.policy.megatron.base_weights import load_base_weights
from megatron_lora.policy.megatron.export import merged_hf_weights
from megatron_lora.policy.megatron.graphs import GraphedPasses
from megatron_lora.policy.megatron.kv_cache import cached_attention, row_bytes
from megatron_lora.policy.megatron.lanes import MegatronLanes, generating
from megatron_lora.policy.megatron.model import BaseModel, build_base
from megatron_lora.policy.megatron.packed import RotaryPositions
from megatron_lora.policy.megatron.router import METRIC, BalancingLoss
from megatron_lora.policy.megatron.router_replay import RouterReplay
from megatron_lora.policy.quantization import FourBitSource, open_base
from megatron_lora.runtime.agreement import same_on_every_rank


class MegatronPolicy(LanePolicy):
    """A base in the recipe's layout, its adapters (or all of it), and Megatron's optimizer."""

    a_init_key = "lora_A_init_method"
    replay: RouterReplay | None = None

    def _build(self, seed: int, num_steps: int) -> WeightSource:
        policy, world = self.config, self.world
        peft = policy.megatron_cfg.peft
        opened = open_base(policy)
        drawn: DrawnStart | None = None
        if peft.enabled:
            start = starting_adapter(peft, opened[0].shapes, policy.model_name)
            methods = (peft.lora_A_init_method, peft.lora_B_init_method)
            dtype = getattr(torch, peft.lora_dtype or policy.precision)
            drawn = draw_start(start, methods, seed, dtype, opened[1], DTYPES[policy.precision])
            self.notices = start.notices
        self.base: BaseModel = build_base(
            policy,
            world,
            opened,
            changed=None if drawn is None else drawn.changed_base,
        )
        self.tp = self.base.tp
        self.adapted: list[Adapted] = []
        self.saved: list[saved_modules.SavedTensor] = []
        if drawn is not None:
            self._inject(drawn)
        self.chunks = optim.wrap_for_data_parallel(self.base.chunks, policy, self.base.config)
        self.optimizer = optim.build_optimizer(self.chunks, policy)
        self.scheduler = build_scheduler(self.optimizer, policy, num_steps)
        self.unshared_reason = self.base.unshared_reason
        self.engine = schedule.Engine(
            chunks=self.chunks,
            config=self.base.config,
            world=world,
            tp=self.tp,
            head=_head_options(policy, self.base),
            rotary=RotaryPositions(self.base.chunks),
        )
        self.balancing: BalancingLoss | None = None
        if self.base.shapes.num_experts and policy.megatron_cfg.balances_experts:
            per_layer = policy.megatron_cfg.moe_per_layer_logging
            self.balancing = BalancingLoss(self.base.chunks, self.base.config, per_layer=per_layer)
            self.engine.names_padding = True
        if policy.router_replay.enabled:
            replays = not policy.router_replay.observe_only
            self.replay = RouterReplay(self.base.chunks, self.base.shapes.num_layers, replays=replays)
            self.engine.names_experts = True
        self.shapes, self.num_lanes = self.base.shapes, world.pp
        self.replica_group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        self.model_group = parallel_state.get_model_parallel_group()
        if world.device.type == "cuda" and self._can_be_graphed():
            self.engine.graphs = GraphedPasses(
                self.base.chunks[0],
                partial(schedule.forward, self.engine),
                self.adapted,
                self.engine.rotary,
                self.pad_token_id,
                insists=policy.megatron_cfg.cuda_graph_impl == "local",
            )
        return self.base.weights

    def _can_be_graphed(self) -> bool:
        """A head that is adapted or capped, or has a bias, is recomputed in the backward pass."""
        head: Any = self.base.chunks[-1].output_layer
        recomputed = self.base.softcap is not None or isinstance(head, LoRALinear) or head.bias is not None
        return not recomputed and ungraphed_reason(self.config, self.base.shapes) is None

    def _batching_options(self, pad_token_id: int) -> BatchingOptions:
        policy, world, config = self.config, self.world, self.base.config
        row_multiple = 2 * world.cp if world.cp > 1 else 1
        total = policy.make_sequence_length_divisible_by
        total *= world.cp * (2 if world.cp > 1 else 1) * (world.tp if config.sequence_parallel else 1)
        stages = config.virtual_pipeline_model_parallel_size or 1
        return BatchingOptions(
            pad_token_id=pad_token_id,
            row_multiple=row_multiple,
            total_multiple=total,
            micro_batch_multiple=world.pp if stages > 1 else 1,
            # Ranks that gather each other's tokens have as many each.
            equal_totals=stages > 1 or (world.ep > 1 and config.moe_token_dispatcher_type == "allgather"),
            bounded_logits=policy.megatron_cfg.use_fused_linear_logprobs,
            num_stages=world.pp,
            shares_prefixes=self.base.unshared_reason is None,
        )

    def _inject(self, drawn: DrawnStart) -> None:
        peft = self.config.megatron_cfg.peft
        self.spec = drawn.spec
        options = AdapterOptions(
            dropout=peft.dropout,
            dropout_before=peft.dropout_position == "pre",
            all_to_all=peft.a2a_experimental,
            dtype=getattr(torch, peft.lora_dtype) if peft.lora_dtype else None,
            keeps_derived=peft.dora_cached_norms,
            recomputed=self.config.megatron_cfg.recompute_adapter_inputs,
        )
        self.adapted = inject(self.base.chunks, drawn.spec, drawn.factors, options, self.tp, self.base.expert_tp)
        if drawn.principal is not None:
            self._principal = over_pipeline(drawn.principal_of(self._linears))
        self.saved = saved_modules.unfreeze(self.base.chunks, drawn.spec, self.world)
        self._put_saved(drawn.saved)

    def _clear_gradients(self) -> None:
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()

    def _accumulate(
        self, batches: Sequence[MicroBatch], objective: Objective, count: float, num_tokens: int, *, keep_logps: bool
    ) -> Passed:
        if self.balancing is not None:
            self.balancing.begin(num_tokens, self.world.device)
        if self.replay is not None:
            self.replay.begin(self.world.device)
        passed = schedule.run(self.engine, batches, objective, count, forward_only=False, keep_logps=keep_logps)
        balancing = {} if self.balancing is None else self.balancing.metrics(self.world.device)
        replayed = {} if self.replay is None else self.replay.metrics(self.world.device)
        metrics = passed.metrics | balancing | replayed
        return Passed(passed.loss + balancing.get(METRIC, 0.0), metrics, passed.logps)

    def _learning_rates(self) -> tuple[float, float]:
        rates = [group["lr"] for group in self.optimizer.param_groups] or [0.0]
        return self._over_pipeline(min(rates)), self._over_pipeline(max(rates))

    def _update(self) -> float:
        norm = optim.update(self.optimizer, optim.clip_norm(self.config))
        self._values_changed()
        return norm

    def _build_critic(self, options: CriticConfig, seed: int, num_steps: int) -> "MegatronPolicy":
        from megatron_lora.policy.megatron.critic import MegatronCritic

        return MegatronCritic(self, critic_policy(self.config, options), seed=seed, num_steps=num_steps)

    @property
    def _linears(self) -> Mapping[str, Adapted]:
        return {linear.name: linear for linear in self.adapted}

    def _trained(self) -> list[torch.nn.Parameter]:
        if self.spec is None:
            return [parameter for chunk in self.base.chunks for parameter in chunk.parameters()]
        # Once each: experts may share theirs.
        factors = dict.fromkeys(held.parameter for linear in self.adapted for held in linear.held_factors)
        return [*factors, *(saved.parameter for saved in self.saved)]

    def _saved_parameters(self) -> Mapping[str, torch.nn.Parameter]:
        return {saved.name: saved.parameter for saved in self.saved}

    def _put_saved(self, tensors: Mapping[str, Tensor]) -> None:
        saved_modules.put(self.saved, tensors, self.world)

    def _gather(self) -> dict[str, Tensor]:
        """The whole adapter, and what trains whole beside it, on every rank."""
        spec = self._needs_adapter("full fine-tuning has no adapter")
        return gather_adapter(self.adapted, spec) | saved_modules.gather(self.saved, self.world)

    @property
    def _head_owner(self) -> Any:
        return self.engine

    @property
    def _data_parallel_group(self) -> Any:
        return parallel_state.get_data_parallel_group(with_context_parallel=False)

    def _evaluate(
        self, batches: Sequence[MicroBatch], objective: Objective, count: float
    ) -> tuple[float, dict[str, float]]:
        outcome = schedule.run(self.engine, batches, objective, count, forward_only=True)
        return outcome.loss, outcome.metrics

    def _outputs(self, batches: Sequence[MicroBatch], head: Head) -> list[Tensor]:
        return schedule.run_head(self.engine, batches, head)

    @contextmanager
    def lanes(self, num_slots: int, capacity: int) -> Iterator[MegatronLanes]:
        longest = self.config.max_total_sequence_length
        chunks = self.base.chunks
        caches = cached_attention(chunks, num_slots=num_slots, capacity=capacity, max_position=longest)
        with generating(self.engine, chunks), caches as session:
            yield MegatronLanes(self.engine, chunks, session)

    def row_bytes(self, capacity: int) -> int:
        return row_bytes(self.base.chunks, capacity)

    def _set_training(self, training: bool) -> None:
        for chunk in self.chunks:
            chunk.train(training)

    def _values_changed(self) -> None:
        for linear in self.adapted:
            linear.factors_changed()

    def _adds_nothing(self) -> bool:
        return all(linear.adds_nothing() for linear in self.adapted)

    def _has_gradient(self, linear: Adapted) -> bool:
        return any(bool(held.gradient.any()) for held in linear.held_factors)

    def adapter(self, experts: ExpertLayout = "each") -> AdapterTensors:
        config, tensors = to_hf(*self._against_the_base(self._gather()), experts=experts)
        return AdapterTensors(config=config, tensors=tensors)

    def _checksum_pieces(self, dtype: torch.dtype) -> Pieces:
        return adapter_pieces(self.adapted, self.base.shapes, dtype)

    def _put_factors(self, factors: Mapping[str, Tensor]) -> None:
        put_factors(self.adapted, self._needs_adapter(""), factors)

    def _put_principal(self, start: Mapping[str, Tensor], read: ReadWeight) -> None:
        self._put_factors(start)
        names = {f"{name}.weight" for name in self._linears}
        load_base_weights(self.base.chunks, read, self.base.shapes, self.world, only=names)

    @property
    def base_is_rounded(self) -> bool:
        return isinstance(self.base.weights, FourBitSource)

    def hf_weights(self, *, merged: bool = True) -> Iterator[tuple[str, Tensor]]:
        spec = self.spec if merged else None
        factors = gather_adapter(self.adapted, spec) if spec is not None else {}
        return merged_hf_weights(self.base, self.world, spec, factors)

    def save(self, weights: Path, optimizer: Path | None, *, asynchronous: bool = False) -> PendingSave | None:
        state = self._weights_state()
        requests = [checkpoint.save_state(state, weights, asynchronous=asynchronous)]
        if self.spec is not None:
            with same_on_every_rank(self.world.size):
                if self.world.is_main:
                    self.spec.save(weights / ADAPTER_FILE)
                    self._save_principal(weights)
        if optimizer is not None:
            state = checkpoint.optimizer_state(
                self.optimizer, self.scheduler, self._weights_state(), self.world, loading=False
            )
            requests.append(checkpoint.save_state(state, optimizer, asynchronous=asynchronous))
        dist.barrier()
        return checkpoint.schedule_requests(requests) if asynchronous else None

    def load(self, weights: Path, optimizer: Path | None) -> None:
        if self.spec is not None:
            check_same_adapter(self.spec, AdapterSpec.load(weights / ADAPTER_FILE), weights)
            self._load_principal(weights)
        state, shapes = self._weights_state(), self.base.shapes
        if self.spec is None and whole_model_backend(weights) == "dtensor":
            self._put_weights(taken_over.load_whole_model(state, shapes, weights))
        else:
            self._put_weights(checkpoint.load_weights(state, weights))
        if optimizer is None:
            self.optimizer.reload_model_params()
        elif optimizer_backend(optimizer) == "dtensor":
            taken_over.load_optimizer(
                self.optimizer, self.scheduler, self._weights_state(), shapes, self.spec, weights, optimizer
            )
        else:
            checkpoint.load_optimizer(self.optimizer, self.scheduler, self._weights_state(), optimizer, self.world)

    def trainable_parameters(self) -> tuple[int, int]:
        base = sum(math.prod(parameter.shape) for parameter in model_parameters(self.base.shapes))
        if self.spec is None:
            return base, base
        factors = sum(map(self.spec.num_parameters, self.spec.modules))
        return self.spec.num_trainable, base + factors

    def _over_pipeline(self, value: float) -> float:
        """The same number on stages that hold nothing that trains."""
        if self.world.pp == 1:
            return value
        box = torch.tensor(value, dtype=torch.float64, device=self.world.device)
        dist.all_reduce(box, op=dist.ReduceOp.MAX, group=parallel_state.get_pipeline_model_parallel_group())
        return float(box)

    def _weights_state(self) -> dict[str, Any]:
        if self.spec is not None:
            return checkpoint.adapter_state(self.adapted) | saved_modules.sharded_state(self.saved)
        return checkpoint.model_state(self.base.chunks)

    def _put_weights(self, state: dict[str, Any]) -> None:
        with torch.no_grad():
            if self.spec is None:
                for index, chunk in enumerate(self.base.chunks):
                    prefix = f"{index}."
                    mine = {key.removeprefix(prefix): v for key, v in state.items() if key.startswith(prefix)}
                    chunk.load_state_dict(mine, strict=False)
                return
            for key, (held, _) in checkpoint.trained_factors(self.adapted).items():
                held.parameter.copy_(state[key])
            self._values_changed()
            for saved in self.saved:
                saved.parameter.copy_(state[saved.name])


def _head_options(policy: PolicyConfig, base: BaseModel) -> HeadOptions:
    megatron = policy.megatron_cfg
    chunk = megatron.fused_linear_logprobs_chunk_size if megatron.use_fused_linear_logprobs else 0
    return HeadOptions(chunk_size=chunk, vocab_size=base.shapes.vocab_size, softcap=base.softcap)
