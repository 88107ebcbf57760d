"""A policy's passes over rows and its optimizer step, as both backends do them: dividing rows over ranks, forward with
a head, forward and backward with an objective, the check of the first gradients, numbers that are not finite."""

import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_lora.config.schema import PolicyConfig
from megatron_lora.data.batch import MicroBatch, Row
from megatron_lora.errors import UserError
from megatron_lora.lora.layout import without_expert
from megatron_lora.objectives.base import Objective
from megatron_lora.policy.batching import BatchingOptions, Groups, Purpose, Share, divide
from megatron_lora.policy.heads import TARGETS, Head
from megatron_lora.policy.interface import NonFiniteLoss, Passed, Policy, Updated, check_scores
from megatron_lora.policy.scores import collect_rows
from megatron_lora.runtime.world import World


class PassesPolicy(Policy):
    """A backend brings its engine's passes, its norm and its optimizer.

    a_init_key: the recipe's key for A's starting values. scored: what `score` gives of a token.
    """

    scored = "log-probability of a token"

    a_init_key: str
    config: PolicyConfig
    world: World
    batching: BatchingOptions
    scheduler: Any
    _gradients_checked: bool
    # Rows that the gradients are of, by number.
    _rows_passed: list[int]

    @property
    @abstractmethod
    def _linears(self) -> Mapping[str, Any]:
        """This rank's adapted linears by name: each has `enabled` and `factors_changed()`."""

    @property
    @abstractmethod
    def _data_parallel_group(self) -> Any:
        """Ranks that see other rows."""

    @abstractmethod
    def _clear_gradients(self) -> None:
        """Let nothing be left of a backward pass."""

    @abstractmethod
    def _accumulate(
        self, batches: Sequence[MicroBatch], objective: Objective, count: float, num_tokens: int, *, keep_logps: bool
    ) -> Passed:
        """Forward and backward over this rank's micro-batches, gradients summed over all ranks. Loss and metrics are
        over the global batch, logps of this rank's micro-batches. Raises NonFiniteLoss. num_tokens: of the batch."""

    @abstractmethod
    def _update(self) -> float:
        """Clip and step; what follows from the parameters' values is forgotten. Returns the gradients' norm before
        clipping; where it is not finite nothing is updated."""

    @abstractmethod
    def _learning_rates(self) -> tuple[float, float]:
        """The lowest and the highest of all parameters, on every rank."""

    @abstractmethod
    def _evaluate(
        self, batches: Sequence[MicroBatch], objective: Objective, count: float
    ) -> tuple[float, dict[str, float]]:
        """Loss and metrics over the global batch, of this rank's micro-batches; called without gradients."""

    @abstractmethod
    def _outputs(self, batches: Sequence[MicroBatch], head: Head) -> list[Tensor]:
        """What the head gives of each micro-batch's targets: [N] or [N, width], with the pipeline's other ranks;
        called without gradients, batches on the device."""

    @abstractmethod
    def _set_training(self, training: bool) -> None:
        """Switch every module between training and evaluation."""

    @abstractmethod
    def _has_gradient(self, linear: Any) -> bool:
        """Whether this rank's part of an adapted linear's factors got any gradient."""

    def forward_backward(self, groups: Groups, objective: Objective, *, keep_logps: bool = False) -> Passed:
        rows = [row for group in groups for row in group]
        share = self._divide(groups, "training")
        self._set_training(True)
        self._clear_gradients()
        num_tokens = sum(len(row) for row in rows)
        passed = self._accumulate(share.batches, objective, objective.count(rows), num_tokens, keep_logps=keep_logps)
        if not self._gradients_checked:
            self._check_gradients()
        self._rows_passed = sorted({row.index for row in rows})
        logps = None if passed.logps is None else self._collect([passed.logps], share, groups)[0]
        return replace(passed, logps=logps)

    def optim_step(self) -> Updated:
        lowest, highest = self._learning_rates()
        norm = self._update()
        if not math.isfinite(norm):
            self._clear_gradients()
            raise NonFiniteLoss(norm, self._rows_passed, what="gradient norm")
        self.scheduler.step(increment=1)
        return Updated(norm, lowest, self._lora_plus_rate(highest))

    def evaluate(self, groups: Groups, objective: Objective) -> tuple[float, dict[str, float]]:
        share = self._divide(groups, "evaluation")
        rows = [row for group in groups for row in group]
        with self._evaluating():
            return self._evaluate(share.batches, objective, objective.count(rows))

    def forward(self, rows: Sequence[Row], head: Head) -> list[Tensor]:
        return self._forward(rows, head, [nullcontext()])[0]

    def score(self, rows: Sequence[Row]) -> list[Tensor]:
        return self.forward(rows, TARGETS)

    def score_with_reference(self, rows: Sequence[Row]) -> tuple[list[Tensor], list[Tensor]]:
        policy, reference = self._forward(rows, TARGETS, [nullcontext(), self.reference()])
        return policy, reference

    def _forward(
        self, rows: Sequence[Row], head: Head, passes: Sequence[AbstractContextManager[None]]
    ) -> list[list[Tensor]]:
        """What the head gives of each row, within each of the contexts."""
        groups = [[row] for row in rows]
        share = self._divide(groups, "scoring", num_passes=len(passes))
        batches = [batch.to(self.world.device) for batch in share.batches]
        outputs = []
        for state in passes:
            with self._evaluating(), state:
                outputs.append(self._outputs(batches, head))
        found = self._collect(outputs, share, groups)
        for values in found:
            check_scores(rows, values, self.scored)
        return found

    def _collect(self, passes: Sequence[Sequence[Tensor]], share: Share, groups: Groups) -> list[list[Tensor]]:
        return collect_rows(passes, share, groups, self._data_parallel_group)

    def _divide(self, groups: Groups, purpose: Purpose, *, num_passes: int = 1) -> Share:
        world = self.world
        share = divide(groups, self.config, self.batching, dp_size=world.dp, dp_rank=world.dp_rank, purpose=purpose)
        self.model_tokens += num_passes * share.num_tokens
        return share

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        self._set_training(False)
        try:
            with torch.no_grad():
                yield
        finally:
            self._set_training(True)

    def _lora_plus_rate(self, value: float) -> dict[str, float]:
        return {"lr_lora_plus": value} if self.config.lora_plus_ratio is not None else {}

    def _check_gradients(self) -> None:
        """After the first backward every adapter must have had a gradient on some rank; name those that had none. Of a
        layer's experts one must have had: to some no token may have gone."""
        self._gradients_checked = True
        mine: dict[str, bool] = {}
        for name, linear in self._linears.items():
            name = without_expert(name)
            mine[name] = mine.get(name, False) or self._has_gradient(linear)
        everyone: list[Any] = [None] * self.world.size
        dist.all_gather_object(everyone, mine)
        trained = {name for part in everyone for name, found in part.items() if found}
        without = sorted({name for part in everyone for name in part} - trained)
        if without:
            raise UserError(
                f"after the first step {len(without)} adapters had no gradient: {', '.join(without[:8])}"
                f"{', ...' if len(without) > 8 else ''}; with both factors at zero nothing trains: "
                f"set {self.a_init_key} to xavier"
            )
