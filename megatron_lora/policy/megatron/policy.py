"""The Megatron-Core backend behind `Policy`."""

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_lora.config.schema import PolicyConfig
from megatron_lora.conversion.model_names import model_parameters
from megatron_lora.data.batch import Row
from megatron_lora.errors import UserError
from megatron_lora.lora.init import given_factors, initial_factors
from megatron_lora.lora.inject import AdapterOptions, inject
from megatron_lora.lora.layout import ADAPTER_FILE, AdapterSpec
from megatron_lora.lora.linear import LoRALinear
from megatron_lora.lora.peft_format import to_hf
from megatron_lora.objectives.base import Objective
from megatron_lora.policy.adapter_start import base_reader, check_same_adapter, describe_modules, starting_adapter
from megatron_lora.policy.batching import BatchingOptions, Groups, Purpose, Share, divide
from megatron_lora.policy.frozen_start import FrozenStart
from megatron_lora.policy.interface import (
    AdapterTensors,
    NonFiniteLoss,
    PendingSave,
    Policy,
    StepResult,
    check_scores,
)
from megatron_lora.policy.learning_rate import build_scheduler
from megatron_lora.policy.megatron import checkpoint, dtensor_checkpoint, optim, schedule
from megatron_lora.policy.megatron.adapter_checksums import adapter_checksums
from megatron_lora.policy.megatron.adapter_gather import gather_adapter
from megatron_lora.policy.megatron.export import merged_hf_weights
from megatron_lora.policy.megatron.logprobs import HeadOptions
from megatron_lora.policy.megatron.model import DTYPES, BaseModel, build_base
from megatron_lora.policy.megatron.packed import RotaryPositions
from megatron_lora.policy.quantization import FourBitSource
from megatron_lora.policy.scores import collect_rows
from megatron_lora.runtime.agreement import same_on_every_rank
from megatron_lora.runtime.world import World


class MegatronPolicy(Policy):
    """A base in the recipe's layout, its adapters (or all of it), and Megatron's optimizer.

    num_steps: the run's length, for schedules that decay. pad_token_id: what fills a micro-batch. keeps_start: whether
    full fine-tuning keeps its starting weights, for `reference()`.
    """

    def __init__(
        self,
        policy: PolicyConfig,
        world: World,
        *,
        pad_token_id: int,
        seed: int,
        num_steps: int,
        keeps_start: bool = False,
    ):
        self.config = policy
        self.world = world
        self.base: BaseModel = build_base(policy, world)
        self.tp = self.base.tp
        self.spec: AdapterSpec | None = None
        self.adapted: list[LoRALinear] = []
        if policy.megatron_cfg.peft.enabled:
            self._inject(seed)
        self.chunks = optim.wrap_for_data_parallel(self.base.chunks, policy, self.base.config)
        self.optimizer = optim.build_optimizer(self.chunks, policy)
        self.scheduler = build_scheduler(self.optimizer, policy, num_steps)
        self.batching = _batching_options(policy, world, self.base, pad_token_id)
        self.unshared_reason = self.base.unshared_reason
        self.engine = schedule.Engine(
            chunks=self.chunks,
            config=self.base.config,
            world=world,
            tp=self.tp,
            head=_head_options(policy, self.base),
            rotary=RotaryPositions(self.base.chunks),
        )
        self._gradients_checked = not self.adapted and self.spec is None
        keeps = keeps_start if self.spec is None else policy.reference_is_starting_adapter
        on_cpu = self.spec is None and policy.reference_weights == "cpu"
        self._start = FrozenStart(self._trained(), on_cpu=on_cpu) if keeps else None

    def _inject(self, seed: int) -> None:
        peft = self.config.megatron_cfg.peft
        start = starting_adapter(peft, self.base.shapes, self.config.model_name)
        self.spec = start.spec
        self.notices = start.notices
        options = AdapterOptions(
            dropout=peft.dropout,
            dropout_before=peft.dropout_position == "pre",
            all_to_all=peft.a2a_experimental,
            dtype=getattr(torch, peft.lora_dtype) if peft.lora_dtype else None,
            keeps_derived=peft.dora_cached_norms,
        )
        if start.tensors is not None:
            factors = given_factors(start.spec, start.tensors)
        else:
            methods = (peft.lora_A_init_method, peft.lora_B_init_method)
            read = base_reader(start.spec, self.base.weights, DTYPES[self.config.precision])
            factors = initial_factors(start.spec, *methods, seed, read)
        self.adapted = inject(self.base.chunks, start.spec, factors, options, self.tp)

    def train_step(self, groups: Groups, objective: Objective, *, keep_logps: bool = False) -> StepResult:
        rows = [row for group in groups for row in group]
        share = self._divide(groups, "training")
        for chunk in self.chunks:
            chunk.train()
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        count = objective.count(rows)
        outcome = schedule.run(self.engine, share.batches, objective, count, forward_only=False, keep_logps=keep_logps)
        if not self._gradients_checked:
            self._check_gradients()
        rates = [group["lr"] for group in self.optimizer.param_groups] or [0.0]
        learning_rate, highest = self._over_pipeline(min(rates)), self._over_pipeline(max(rates))
        norm = optim.update(self.optimizer, optim.clip_norm(self.config))
        self._factors_changed()
        if norm is None:
            self._discard_gradients()
            raise NonFiniteLoss(float("nan"), sorted({row.index for row in rows}), what="gradient norm")
        self.scheduler.step(increment=1)
        return StepResult(
            loss=outcome.loss,
            metrics=outcome.metrics | self._lora_plus_rate(highest),
            grad_norm=norm,
            learning_rate=learning_rate,
            num_target_tokens=sum(row.num_targets for row in rows),
            num_tokens=sum(len(row) for row in rows),
            logps=self._collect([outcome.logps], share, groups)[0] if outcome.logps is not None else None,
        )

    def evaluate(self, groups: Groups, objective: Objective) -> tuple[float, dict[str, float]]:
        share = self._divide(groups, "evaluation")
        rows = [row for group in groups for row in group]
        with self._evaluating():
            outcome = schedule.run(self.engine, share.batches, objective, objective.count(rows), forward_only=True)
        return outcome.loss, outcome.metrics

    def score(self, rows: Sequence[Row]) -> list[Tensor]:
        return self._score(rows, [nullcontext()])[0]

    def score_with_reference(self, rows: Sequence[Row]) -> tuple[list[Tensor], list[Tensor]]:
        policy, reference = self._score(rows, [nullcontext(), self.reference()])
        return policy, reference

    def _score(self, rows: Sequence[Row], passes: Sequence[AbstractContextManager[None]]) -> list[list[Tensor]]:
        """The rows' log-probabilities within each of the contexts."""
        groups = [[row] for row in rows]
        share = self._divide(groups, "scoring", num_passes=len(passes))
        batches = [batch.to(self.world.device) for batch in share.batches]
        logps = []
        for state in passes:
            with self._evaluating(), state:
                logps.append(schedule.run_logprobs(self.engine, batches))
        scores = self._collect(logps, share, groups)
        for values in scores:
            check_scores(rows, values)
        return scores

    def _collect(self, passes: Sequence[Sequence[Tensor]], share: Share, groups: Groups) -> list[list[Tensor]]:
        return collect_rows(passes, share, groups, parallel_state.get_data_parallel_group(with_context_parallel=False))

    @contextmanager
    def adapters_disabled(self) -> Iterator[None]:
        if self.spec is None:
            raise ValueError("full fine-tuning has no adapters to disable")
        before = [linear.enabled for linear in self.adapted]
        try:
            for linear in self.adapted:
                linear.enabled = False
            yield
        finally:
            for linear, enabled in zip(self.adapted, before, strict=True):
                linear.enabled = enabled

    @contextmanager
    def reference(self) -> Iterator[None]:
        if self._start is None:
            with self.adapters_disabled():
                yield
        else:
            try:
                self._factors_changed()
                with self._start.put_back(self._trained()):
                    yield
            finally:
                self._factors_changed()

    def at_reference(self) -> bool:
        if self._start is not None:
            same = self._start.equals(self._trained())
        elif self.spec is None:
            raise ValueError("full fine-tuning kept no copy of where it started")
        else:
            same = all(linear.adds_nothing() for linear in self.adapted)
        box = torch.tensor(float(same), device=self.world.device)
        dist.all_reduce(box, op=dist.ReduceOp.MIN)
        return bool(box)

    @contextmanager
    def sampling(self, temperature: float, *, top_k: int = -1, top_p: float = 1.0) -> Iterator[None]:
        head = self.engine.head
        try:
            self.engine.head = replace(head, temperature=temperature, top_k=top_k, top_p=top_p)
            yield
        finally:
            self.engine.head = head

    def adapter(self) -> AdapterTensors:
        if self.spec is None:
            raise ValueError("full fine-tuning has no adapter")
        config, tensors = to_hf(self.spec, gather_adapter(self.adapted, self.spec))
        return AdapterTensors(config=config, tensors=tensors)

    def adapter_checksums(self, dtype: torch.dtype) -> dict[str, int]:
        if self.spec is None:
            raise ValueError("full fine-tuning has no adapter")
        return adapter_checksums(self.adapted, self.spec.shapes, dtype)

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
        state, shapes = self._weights_state(), self.base.shapes
        if self.spec is None and dtensor_checkpoint.is_whole_model(weights):
            self._put_weights(dtensor_checkpoint.load_whole_model(state, shapes, weights))
        else:
            self._put_weights(checkpoint.load_weights(state, weights))
        if optimizer is None:
            self.optimizer.reload_model_params()
        elif dtensor_checkpoint.is_optimizer(optimizer):
            dtensor_checkpoint.load_optimizer(
                self.optimizer, self.scheduler, self._weights_state(), shapes, self.spec, weights, optimizer
            )
        else:
            checkpoint.load_optimizer(self.optimizer, self.scheduler, self._weights_state(), optimizer, self.world)

    def trainable_parameters(self) -> tuple[int, int]:
        base = sum(math.prod(parameter.shape) for parameter in model_parameters(self.base.shapes))
        if self.spec is None:
            return base, base
        trainable = sum(map(self.spec.num_parameters, self.spec.modules))
        return trainable, base + trainable

    def describe_adapters(self) -> list[tuple[str, ...]]:
        return describe_modules(self.spec) if self.spec is not None else []

    def _factors_changed(self) -> None:
        for linear in self.adapted:
            linear.factors_changed()

    def _trained(self) -> list[torch.nn.Parameter]:
        """What trains: the adapters' factors, or the whole model."""
        if self.spec is not None:
            return self._factors()
        return [parameter for chunk in self.base.chunks for parameter in chunk.parameters()]

    def _factors(self) -> list[torch.nn.Parameter]:
        return [held.parameter for linear in self.adapted for held in linear.held_factors]

    def _divide(self, groups: Groups, purpose: Purpose, *, num_passes: int = 1) -> Share:
        world = self.world
        share = divide(
            groups,
            self.config,
            self.batching,
            dp_size=world.dp,
            dp_rank=world.dp_rank,
            purpose=purpose,
        )
        self.model_tokens += num_passes * share.num_tokens
        return share

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        for chunk in self.chunks:
            chunk.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            for chunk in self.chunks:
                chunk.train()

    def _lora_plus_rate(self, value: float) -> dict[str, float]:
        return {"lr_lora_plus": value} if self.config.lora_plus_ratio is not None else {}

    def _discard_gradients(self) -> None:
        for chunk in self.chunks:
            chunk.zero_grad_buffer()

    def _over_pipeline(self, value: float) -> float:
        """The same number on stages that hold nothing that trains."""
        if self.world.pp == 1:
            return value
        box = torch.tensor(value, dtype=torch.float64, device=self.world.device)
        dist.all_reduce(box, op=dist.ReduceOp.MAX, group=parallel_state.get_pipeline_model_parallel_group())
        return float(box)

    def _weights_state(self) -> dict[str, Any]:
        if self.spec is not None:
            return checkpoint.adapter_state(self.adapted)
        return checkpoint.model_state(self.base.chunks)

    def _put_weights(self, state: dict[str, Any]) -> None:
        with torch.no_grad():
            if self.spec is None:
                for index, chunk in enumerate(self.base.chunks):
                    prefix = f"{index}."
                    mine = {key.removeprefix(prefix): v for key, v in state.items() if key.startswith(prefix)}
                    chunk.load_state_dict(mine, strict=False)
                return
            for linear in self.adapted:
                linear.factors_changed()
                for held in linear.held_factors:
                    held.parameter.copy_(state[f"{linear.layout.name}.{held.factor.name}"])

    def _check_gradients(self) -> None:
        """After the first backward every adapter must have had a gradient somewhere; name those that had none."""
        self._gradients_checked = True
        flags = torch.tensor(
            [float(_has_gradient(linear)) for linear in self.adapted], device=self.world.device, dtype=torch.float32
        )
        if self.adapted:
            for group in (
                parallel_state.get_data_parallel_group(with_context_parallel=True),
                parallel_state.get_tensor_model_parallel_group(),
            ):
                dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=group)
        mine = [linear.layout.name for linear, flag in zip(self.adapted, flags.tolist(), strict=True) if not flag]
        everyone: list[Any] = [None] * self.world.size
        dist.all_gather_object(everyone, mine)
        without = sorted({name for names in everyone for name in names})
        if without:
            raise UserError(
                f"after the first step {len(without)} adapters had no gradient: {', '.join(without[:8])}"
                f"{', ...' if len(without) > 8 else ''}; with both factors at zero nothing trains: "
                "set lora_A_init_method to xavier"
            )


def _has_gradient(linear: LoRALinear) -> bool:
    return any(bool(held.parameter.main_grad.any()) for held in linear.held_factors)  # type: ignore[attr-defined]


def _head_options(policy: PolicyConfig, base: BaseModel) -> HeadOptions:
    megatron = policy.megatron_cfg
    chunk = megatron.fused_linear_logprobs_chunk_size if megatron.use_fused_linear_logprobs else 0
    return HeadOptions(chunk_size=chunk, vocab_size=base.shapes.vocab_size, softcap=base.softcap)


def _batching_options(policy: PolicyConfig, world: World, base: BaseModel, pad_token_id: int) -> BatchingOptions:
    config = base.config
    row_multiple = 2 * world.cp if world.cp > 1 else 1
    total = policy.make_sequence_length_divisible_by
    total *= world.cp * (2 if world.cp > 1 else 1) * (world.tp if config.sequence_parallel else 1)
    stages = config.virtual_pipeline_model_parallel_size or 1
    return BatchingOptions(
        pad_token_id=pad_token_id,
        row_multiple=row_multiple,
        total_multiple=total,
        micro_batch_multiple=world.pp if stages > 1 else 1,
        equal_totals=stages > 1,
        bounded_logits=policy.megatron_cfg.use_fused_linear_logprobs,
        num_stages=world.pp,
        shares_prefixes=base.unshared_reason is None,
    )
