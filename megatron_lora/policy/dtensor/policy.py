"""The DTensor backend behind `Policy`: transformers + peft + FSDP2, with tensor parallelism."""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from megatron_lora.config.schema_critic import CriticConfig
from megatron_lora.conversion.experts import split_fused
from megatron_lora.conversion.weight_source import WeightSource
from megatron_lora.data.batch import MicroBatch, Row
from megatron_lora.data.packing import collate
from megatron_lora.lora.layout import ADAPTER_FILE, AdapterSpec, FactorKey
from megatron_lora.lora.merge import WeightUpdate
from megatron_lora.lora.methods import ReadWeight
from megatron_lora.lora.peft_format import ExpertLayout, fuse, to_hf
from megatron_lora.objectives.base import Objective
from megatron_lora.policy.adam_state import optimizer_backend, read_adam, whole_model_backend
from megatron_lora.policy.adapter_start import check_same_adapter
from megatron_lora.policy.backend import BackendPolicy, local_part
from megatron_lora.policy.batching import BatchingOptions
from megatron_lora.policy.checksums import Pieces
from megatron_lora.policy.critic import critic_policy
from megatron_lora.policy.dtensor import adapter, checkpoint, optim
from megatron_lora.policy.dtensor.factor_sets import ADAPTER_NAME
from megatron_lora.policy.dtensor.four_bit import four_bit_linears
from megatron_lora.policy.dtensor.model import build_model
from megatron_lora.policy.heads import Head, head_of
from megatron_lora.policy.interface import AdapterTensors, NonFiniteLoss, Passed, PendingSave
from megatron_lora.policy.shared_prefix import unshared_reason
from megatron_lora.runtime.activity import tick
from megatron_lora.runtime.agreement import same_on_every_rank


class DTensorPolicy(BackendPolicy):
    """A transformers model in the recipe's layout, its adapters (or all of it), and a torch optimizer.

    notices: what the user should know of how the recipe was read.
    """

    a_init_key = "lora_A_init"

    def _build(self, seed: int, num_steps: int) -> WeightSource:
        policy, world = self.config, self.world
        self.base = build_model(policy, world, seed, critic=self.has_critic)
        self.root = self.base.root
        self.mesh = self.base.mesh
        self.spec = self.base.start.spec if self.base.start is not None else None
        self.notices = self.base.notices
        if self.base.start is not None and self.base.start.drawn.principal is not None:
            drawn = self.base.start.drawn
            self._principal = drawn.principal_of([module.name for module in drawn.spec.modules])
        shapes = self.base.shapes
        self.unshared_reason = unshared_reason(
            policy,
            model_type=shapes.model_type,
            head_dim=shapes.head_dim,
            num_experts=shapes.num_experts,
            on_gpu=world.device.type == "cuda",
        )
        self._build_optimizer(num_steps)
        return self.base.weights

    def _build_optimizer(self, num_steps: int) -> None:
        """For what trains of the model."""
        self.names = adapter.parameter_names(self.base.hf)
        self.trained = [parameter for parameter in self.names if parameter.requires_grad]
        self.optimizer = optim.build_optimizer(self.trained, self.config, adapter.lora_plus_parameters(self.base.hf))
        self.scheduler = optim.build_schedule(self.optimizer, self.config, num_steps)

    def _build_critic(self, options: CriticConfig, seed: int, num_steps: int) -> "DTensorPolicy":
        from megatron_lora.policy.dtensor.critic import DTensorCritic

        return DTensorCritic(self, critic_policy(self.config, options), seed=seed, num_steps=num_steps)

    def _batching_options(self, pad_token_id: int) -> BatchingOptions:
        multiple = self.world.tp if self.root.tp.sequence_parallel else 1
        return BatchingOptions(
            pad_token_id=pad_token_id,
            total_multiple=math.lcm(self.config.make_sequence_length_divisible_by, multiple),
            shares_prefixes=self.unshared_reason is None,
        )

    def _clear_gradients(self) -> None:
        self.optimizer.zero_grad()

    def _accumulate(
        self, batches: Sequence[MicroBatch], objective: Objective, count: float, num_tokens: int, *, keep_logps: bool
    ) -> Passed:
        kept: list[Tensor] | None = [] if keep_logps else None
        loss, metrics = self._run(batches, objective, count, training=True, kept=kept)
        optim.sum_gradients_over_tp(self.base.summed, self.mesh["tp"])
        return Passed(loss, metrics, kept)

    def _learning_rates(self) -> tuple[float, float]:
        rates = [float(group["lr"]) for group in self.optimizer.param_groups]
        return min(rates), max(rates)

    def _update(self) -> float:
        norm = optim.gradient_norm(self.trained, self.mesh, self.world.device)
        if math.isfinite(norm):
            optim.clip_gradients(self.trained, norm, optim.clip_norm(self.config))
            self.optimizer.step()
            adapter.factors_changed(self.base.hf)
        return norm

    @property
    def _linears(self) -> Mapping[str, adapter.AdaptedLinear]:
        return adapter.adapted_linears(self.base.hf)

    def _trained(self) -> list[nn.Parameter]:
        return self.trained

    def _saved_parameters(self) -> Mapping[str, nn.Parameter]:
        return {} if self.spec is None else adapter.saved_parameters(self.base.hf, self.spec)

    @torch.no_grad()
    def _put_saved(self, tensors: Mapping[str, Tensor]) -> None:
        for name, parameter in self._saved_parameters().items():
            checkpoint.put(parameter, tensors[name])

    @property
    def _head_owner(self) -> Any:
        return self.root

    @property
    def _data_parallel_group(self) -> Any:
        return self.mesh["dp"].get_group()

    def _evaluate(
        self, batches: Sequence[MicroBatch], objective: Objective, count: float
    ) -> tuple[float, dict[str, float]]:
        return self._run(batches, objective, count, training=False)

    def _outputs(self, batches: Sequence[MicroBatch], head: Head) -> list[Tensor]:
        return [self.root(batch, head) for batch in batches]

    @torch.no_grad()
    def most_likely(self, prompt: Sequence[int], count: int, ends: Sequence[int]) -> list[int]:
        """Up to `count` tokens after a prompt, each the most likely one, up to one of `ends`: on every rank the same. A
        whole forward pass a token. Collective."""
        ids = list(prompt)
        self.root.eval()
        while len(ids) - len(prompt) < count and (len(ids) == len(prompt) or ids[-1] not in ends):
            tick()
            row = Row(torch.tensor(ids), torch.zeros(len(ids), dtype=torch.bool))
            batch = collate([row], pad_token_id=self.batching.pad_token_id, total_multiple=self.batching.total_multiple)
            ids.append(int(self.root(batch.to(self.world.device), after=len(ids) - 1)))
        return ids[len(prompt) :]

    def _set_training(self, training: bool) -> None:
        self.root.train(training)

    def _values_changed(self) -> None:
        """Whole parameters that FSDP has kept since the last forward pass, and what adapters derive."""
        adapter.factors_changed(self.base.hf)
        for module in self.root.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def _adds_nothing(self) -> bool:
        # Ranks hold shards of every factor: only together can they say that one is zero.
        place = {parameter: number for number, parameter in enumerate(self.trained)}
        parts = [local_part(parameter.detach()) for parameter in self.trained]
        nonzero = torch.stack([part.any() for part in parts]).to(self.world.device, torch.int32)
        dist.all_reduce(nonzero, op=dist.ReduceOp.MAX)
        flags = nonzero.tolist()
        linears = self._linears.values()
        return all(any(not flags[place[linear.factors[key]]] for key in linear.method.vanishing) for linear in linears)

    def _has_gradient(self, linear: adapter.AdaptedLinear) -> bool:
        return any(
            parameter.grad is not None and bool(local_part(parameter.grad).any())
            for parameter in linear.factors.values()
        )

    def adapter(self, experts: ExpertLayout = "each") -> AdapterTensors:
        spec = self._needs_adapter("full fine-tuning has no adapter")
        config, tensors = to_hf(*self._against_the_base(fuse(adapter.gather(self.base.hf), spec)))
        return AdapterTensors(config=config, tensors=tensors)

    def _checksum_pieces(self, dtype: torch.dtype) -> Pieces:
        return adapter.checksum_pieces(self.base.hf, dtype)

    def _put_factors(self, factors: Mapping[str, Tensor]) -> None:
        spec = self._needs_adapter("")
        whole = fuse(adapter.gather(self.base.hf), spec) | dict(factors)
        tensors = to_hf(spec, whole)[1]
        for name, parameter in adapter.peft_tensors(self.base.hf):
            checkpoint.put(parameter, tensors[name])

    @torch.no_grad()
    def _put_principal(self, start: Mapping[str, Tensor], read: ReadWeight) -> None:
        self._put_factors(start)
        for name, linear in self._linears.items():
            checkpoint.put(linear.base_layer.weight, read(f"{name}.weight"))  # type: ignore[arg-type]
        self._values_changed()

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
                update = WeightUpdate(self.spec, parts, linear.scaling[ADAPTER_NAME])
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
            with same_on_every_rank(self.world.size):
                if self.world.is_main:
                    self._save_principal(weights)
        else:
            checkpoint.save_model(self._parameters(), weights)
        if optimizer is not None:
            checkpoint.save_optimizer(self.optimizer, self.scheduler, self.names, optimizer, self.world)
        dist.barrier()
        return None

    def load(self, weights: Path, optimizer: Path | None) -> None:
        self._values_changed()
        if self.spec is not None:
            check_same_adapter(self.spec, AdapterSpec.load(weights / ADAPTER_FILE), weights)
            self._load_principal(weights)
            checkpoint.load_adapter(self.base.hf, self.spec, weights)
        elif whole_model_backend(weights) == "megatron":
            checkpoint.take_over_model(self._parameters(), self.base.shapes, weights)
        else:
            checkpoint.load_model(self._parameters(), weights)
        if optimizer is None:
            return
        if optimizer_backend(optimizer) == "megatron":
            trained = self._parameters() if self.spec is None else dict(adapter.peft_tensors(self.base.hf))
            state = read_adam(optimizer, self.spec, self.base.shapes)
            checkpoint.take_over_optimizer(self.optimizer, self.scheduler, trained, state)
        else:
            checkpoint.load_optimizer(self.optimizer, self.scheduler, self.names, optimizer, self.world)

    def trainable_parameters(self) -> tuple[int, int]:
        four_bit = four_bit_linears(self.base.hf).values()
        held = sum(linear.in_features * linear.out_features for linear in four_bit)
        return sum(p.numel() for p in self.trained), sum(p.numel() for p in self.names) + held

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

        kept: takes the targets' log-probabilities of each micro-batch.
        """
        results: list[dict[str, Tensor]] = []
        head = head_of(objective)
        for batch in batches:
            tick()
            batch = batch.to(self.world.device)
            found = self.root(batch, head)
            result = objective(found, batch)
            if kept is not None:
                kept.append(head.logps(found).detach())
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

    def _parameters(self) -> dict[str, nn.Parameter]:
        return {name: parameter for parameter, name in self.names.items()}
