"""The DTensor backend behind `Policy`: transformers + peft + FSDP2, with tensor parallelism."""

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from megatron_lora.config.schema import PolicyConfig
from megatron_lora.conversion.experts import split_fused
from megatron_lora.data.batch import MicroBatch, Row
from megatron_lora.errors import UserError
from megatron_lora.lora.layout import AdapterSpec, FactorKey
from megatron_lora.lora.merge import WeightUpdate
from megatron_lora.lora.peft_format import fuse, to_hf
from megatron_lora.objectives.base import Objective
from megatron_lora.policy.adapter_start import describe_modules
from megatron_lora.policy.batching import BatchingOptions, Groups, Purpose, Share, divide
from megatron_lora.policy.dtensor import adapter, checkpoint, megatron_checkpoint, optim
from megatron_lora.policy.dtensor.four_bit import four_bit_linears
from megatron_lora.policy.dtensor.model import build_model
from megatron_lora.policy.frozen_start import FrozenStart
from megatron_lora.policy.interface import (
    AdapterTensors,
    NonFiniteLoss,
    PendingSave,
    Policy,
    StepResult,
    check_scores,
)
from megatron_lora.policy.scores import collect_rows
from megatron_lora.runtime.activity import tick
from megatron_lora.runtime.world import World


class DTensorPolicy(Policy):
    """A transformers model in the recipe's layout, its adapters (or all of it), and a torch optimizer.

    num_steps: the run's length, for schedules that decay. pad_token_id: what fills a micro-batch. keeps_start: whether
    full fine-tuning keeps its starting weights, for `reference()`. notices: what the user should know of how the recipe
    was read.
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
        self.base = build_model(policy, world, seed)
        self.root = self.base.root
        self.mesh = self.base.mesh
        self.spec: AdapterSpec | None = self.base.start.spec if self.base.start is not None else None
        self.notices = self.base.notices
        self.unshared_reason = "policy.shared_prefix=false" if policy.shared_prefix is False else None
        self.names: dict[nn.Parameter, str] = {p: name for name, p in self.base.hf.named_parameters()}
        self.trained = [parameter for parameter in self.names if parameter.requires_grad]
        self.optimizer = optim.build_optimizer(self.trained, policy, adapter.lora_plus_parameters(self.base.hf))
        self.scheduler = optim.build_schedule(self.optimizer, policy, num_steps)
        multiple = world.tp if self.root.tp.sequence_parallel else 1
        self.batching = BatchingOptions(
            pad_token_id=pad_token_id,
            total_multiple=math.lcm(policy.make_sequence_length_divisible_by, multiple),
            shares_prefixes=policy.shared_prefix is not False,
        )
        self._gradients_checked = self.spec is None
        keeps = keeps_start if self.spec is None else policy.reference_is_starting_adapter
        on_cpu = self.spec is None and policy.reference_weights == "cpu"
        self._start = FrozenStart(self._trained_parts(), on_cpu=on_cpu) if keeps else None

    def train_step(self, groups: Groups, objective: Objective, *, keep_logps: bool = False) -> StepResult:
        rows = [row for group in groups for row in group]
        share = self._divide(groups, "training")
        self.root.train()
        self.optimizer.zero_grad()
        kept: list[Tensor] | None = [] if keep_logps else None
        loss, metrics = self._run(share.batches, objective, objective.count(rows), training=True, kept=kept)
        optim.sum_gradients_over_tp(self.base.summed, self.mesh["tp"])
        if not self._gradients_checked:
            self._check_gradients()
        rates = [float(group["lr"]) for group in self.optimizer.param_groups]
        norm = optim.gradient_norm(self.trained, self.mesh, self.world.device)
        if not math.isfinite(norm):
            self.optimizer.zero_grad()
            raise NonFiniteLoss(norm, sorted({row.index for row in rows}), what="gradient norm")
        optim.clip_gradients(self.trained, norm, optim.clip_norm(self.config))
        self.optimizer.step()
        adapter.factors_changed(self.base.hf)
        self.scheduler.step(increment=1)
        return StepResult(
            loss=loss,
            metrics=metrics | self._lora_plus_rate(max(rates)),
            grad_norm=norm,
            learning_rate=min(rates),
            num_target_tokens=sum(row.num_targets for row in rows),
            num_tokens=sum(len(row) for row in rows),
            logps=self._collect([kept], share, groups)[0] if kept is not None else None,
        )

    def evaluate(self, groups: Groups, objective: Objective) -> tuple[float, dict[str, float]]:
        share = self._divide(groups, "evaluation")
        rows = [row for group in groups for row in group]
        with self._evaluating():
            return self._run(share.batches, objective, objective.count(rows), training=False)

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
                logps.append([self.root(batch) for batch in batches])
        scores = self._collect(logps, share, groups)
        for values in scores:
            check_scores(rows, values)
        return scores

    def _collect(self, passes: Sequence[Sequence[Tensor]], share: Share, groups: Groups) -> list[list[Tensor]]:
        return collect_rows(passes, share, groups, self.mesh["dp"].get_group())

    @contextmanager
    def adapters_disabled(self) -> Iterator[None]:
        if self.spec is None:
            raise ValueError("full fine-tuning has no adapters to disable")
        try:
            adapter.set_enabled(self.base.hf, False)
            yield
        finally:
            adapter.set_enabled(self.base.hf, True)

    @contextmanager
    def reference(self) -> Iterator[None]:
        if self._start is None:
            with self.adapters_disabled():
                yield
            return
        self._drop_gathered()
        try:
            with self._start.put_back(self._trained_parts()):
                yield
        finally:
            self._drop_gathered()

    def _trained_parts(self) -> list[Tensor]:
        """What this rank holds of everything that trains."""
        return [optim.local_part(parameter.detach()) for parameter in self.trained]

    def _drop_gathered(self) -> None:
        """Forget what follows from the parameters' former values: whole ones that FSDP has kept since the last forward
        pass, and what adapters derive."""
        adapter.factors_changed(self.base.hf)
        for module in self.root.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def at_reference(self) -> bool:
        parts = self._trained_parts()
        if self._start is not None:
            changed = torch.tensor([not self._start.equals(parts)], device=self.world.device).int()
            dist.all_reduce(changed, op=dist.ReduceOp.MAX)
            return not bool(changed.any())
        if self.spec is None:
            raise ValueError("full fine-tuning kept no copy of where it started")
        # Ranks hold shards of every factor: only together can they say that one is zero.
        place = {parameter: number for number, parameter in enumerate(self.trained)}
        nonzero = torch.stack([part.any() for part in parts]).to(self.world.device, torch.int32)
        dist.all_reduce(nonzero, op=dist.ReduceOp.MAX)
        flags = nonzero.tolist()
        linears = adapter.adapted_linears(self.base.hf).values()
        return all(any(not flags[place[linear.factors[key]]] for key in linear.method.vanishing) for linear in linears)

    @contextmanager
    def sampling(self, temperature: float, *, top_k: int = -1, top_p: float = 1.0) -> Iterator[None]:
        before = self.root.head
        try:
            self.root.head = replace(before, temperature=temperature, top_k=top_k, top_p=top_p)
            yield
        finally:
            self.root.head = before

    def adapter(self) -> AdapterTensors:
        if self.spec is None:
            raise ValueError("full fine-tuning has no adapter")
        config, tensors = to_hf(self.spec, fuse(adapter.gather(self.base.hf), self.spec))
        return AdapterTensors(config=config, tensors=tensors)

    def adapter_checksums(self, dtype: torch.dtype) -> dict[str, int]:
        if self.spec is None:
            raise ValueError("full fine-tuning has no adapter")
        return adapter.checksums(self.base.hf, dtype)

    @property
    def base_is_rounded(self) -> bool:
        return bool(four_bit_linears(self.base.hf))

    def hf_weights(self, *, merged: bool = True) -> Iterator[tuple[str, Tensor]]:
        adapted = adapter.adapted_linears(self.base.hf)
        factors = {id(factor) for linear in adapted.values() for factor in linear.factors.values()}
        dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[self.config.precision]
        for name, value in self._base_weights(factors):
            owner = name.removesuffix(".base_layer.weight")
            if merged and owner in adapted:
                assert self.spec is not None
                linear = adapted[owner]
                parts: dict[FactorKey, Tensor] = {
                    key: adapter.full_tensor(factor) for key, factor in linear.factors.items()
                }
                update = WeightUpdate(self.spec, parts, linear.scaling[adapter.ADAPTER_NAME])
                value = update.merged(value)
            stored = name.replace(".base_layer.", ".")
            yield from split_fused(stored, value.to(dtype), self.base.shapes)

    def _base_weights(self, factors: set[int]) -> Iterator[tuple[str, Tensor]]:
        """(name in the model, whole tensor) of all that is not an adapter's, made dense one at a time. Collective."""
        for parameter, name in self.names.items():
            if id(parameter) not in factors:
                yield name, adapter.full_tensor(parameter)
        for path, linear in four_bit_linears(self.base.hf).items():
            yield f"{path}.weight", linear.full_weight(self.mesh["tp"])

    def save(self, weights: Path, optimizer: Path | None, *, asynchronous: bool = False) -> PendingSave | None:
        # Written when this returns, whether asked for in the background or not: adapters are small.
        if self.spec is not None:
            checkpoint.save_adapter(self.base.hf, self.spec, weights, self.world)
        else:
            checkpoint.save_model(self._parameters(), weights)
        if optimizer is not None:
            checkpoint.save_optimizer(self.optimizer, self.scheduler, self.names, optimizer, self.world)
        dist.barrier()
        return None

    def load(self, weights: Path, optimizer: Path | None) -> None:
        self._drop_gathered()
        if self.spec is not None:
            checkpoint.load_adapter(self.base.hf, self.spec, weights)
        elif megatron_checkpoint.is_whole_model(weights):
            megatron_checkpoint.load_whole_model(self._parameters(), self.base.shapes, weights)
        else:
            checkpoint.load_model(self._parameters(), weights)
        if optimizer is None:
            return
        if megatron_checkpoint.is_optimizer(optimizer):
            trained = self._parameters() if self.spec is None else dict(adapter.peft_tensors(self.base.hf))
            megatron_checkpoint.load_optimizer(
                self.optimizer, self.scheduler, trained, self.spec, self.base.shapes, optimizer
            )
        else:
            checkpoint.load_optimizer(self.optimizer, self.scheduler, self.names, optimizer, self.world)

    def trainable_parameters(self) -> tuple[int, int]:
        four_bit = four_bit_linears(self.base.hf).values()
        held = sum(linear.in_features * linear.out_features for linear in four_bit)
        return sum(p.numel() for p in self.trained), sum(p.numel() for p in self.names) + held

    def describe_adapters(self) -> list[tuple[str, ...]]:
        return describe_modules(self.spec) if self.spec is not None else []

    def _run(
        self,
        batches: Sequence[MicroBatch],
        objective: Objective,
        count: float,
        *,
        training: bool,
        kept: list[Tensor] | None = None,
    ) -> tuple[float, dict[str, float]]:
        """This rank's micro-batches, backward too in training. Returns loss and metrics over the global batch.

        kept: takes the log-probabilities of each micro-batch.
        """
        results: list[dict[str, Tensor]] = []
        for batch in batches:
            tick()
            batch = batch.to(self.world.device)
            logps = self.root(batch)
            result = objective(logps, batch)
            if kept is not None:
                kept.append(logps.detach())
            if training:
                # FSDP takes the mean over data-parallel ranks; the loss is a sum over them.
                (result.loss * (self.world.dp / count)).backward()
            results.append({"loss": result.loss.detach(), **{k: v.detach() for k, v in result.metrics.items()}})
        names = list(results[0])
        sums = torch.stack([torch.stack([result[name].double() for name in names]) for result in results]).sum(0)
        dist.all_reduce(sums, group=self.mesh["dp"].get_group())
        values = dict(zip(names, (sums / count).tolist(), strict=True))
        loss = values.pop("loss")
        if not math.isfinite(loss):
            self.optimizer.zero_grad()
            raise NonFiniteLoss(loss, self._rows_of_non_finite(results, batches))
        return loss, values

    def _rows_of_non_finite(self, results: list[dict[str, Tensor]], batches: Sequence[MicroBatch]) -> list[int]:
        pairs = zip(results, batches, strict=True)
        mine = [row for result, batch in pairs if not math.isfinite(float(result["loss"])) for row in batch.row_indices]
        everyone: list[list[int]] = [[] for _ in range(self.world.size)]
        dist.all_gather_object(everyone, mine)
        return sorted({row for rows in everyone for row in rows if row >= 0})

    def _lora_plus_rate(self, value: float) -> dict[str, float]:
        return {"lr_lora_plus": value} if self.config.lora_plus_ratio is not None else {}

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
        self.root.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.root.train()

    def _parameters(self) -> dict[str, nn.Parameter]:
        return {name: parameter for parameter, name in self.names.items()}

    def _check_gradients(self) -> None:
        """After the first backward every adapter must have had a gradient somewhere; name those that had none."""
        self._gradients_checked = True
        linears = adapter.adapted_linears(self.base.hf)
        flags = torch.tensor([float(_has_gradient(linear)) for linear in linears.values()], device=self.world.device)
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        without = [name for name, flag in zip(linears, flags.tolist(), strict=True) if not flag]
        if without:
            raise UserError(
                f"after the first step {len(without)} adapters had no gradient: {', '.join(without[:8])}"
                f"{', ...' if len(without) > 8 else ''}; with both factors at zero nothing trains: "
                "set lora_A_init to xavier"
            )


def _has_gradient(linear: adapter.AdaptedLinear) -> bool:
    return any(
        parameter.grad is not None and bool(optim.local_part(parameter.grad).any())
        for parameter in linear.factors.values()
    )
