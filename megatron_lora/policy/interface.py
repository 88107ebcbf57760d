"""What a trainer may ask of a backend. Both backends (Megatron-Core; transformers + FSDP2) implement `Policy`."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_lora.data.batch import Row
from megatron_lora.lora.layout import AdapterSpec
from megatron_lora.lora.peft_format import ExpertLayout
from megatron_lora.objectives.base import Objective
from megatron_lora.policy.heads import Head


@dataclass
class StepResult:
    """One training step, before the update: loss (mean over the objective's count), metrics likewise, gradient norm
    (before clipping), learning rate used. logps: where asked for, as `Policy.score` gives them, from this step's own
    forward pass (adapters' dropout on)."""

    loss: float
    metrics: dict[str, float]
    grad_norm: float
    learning_rate: float
    num_target_tokens: int
    num_tokens: int
    logps: list[Tensor] | None = None


@dataclass
class Passed:
    """A forward and backward pass over a global batch: loss, metrics and logps as of `StepResult`."""

    loss: float
    metrics: dict[str, float]
    logps: list[Tensor] | None = None


@dataclass
class Updated:
    """An optimizer step: gradient norm before clipping, learning rate used, metrics of the optimizer's own."""

    grad_norm: float
    learning_rate: float
    metrics: dict[str, float]


@dataclass
class AdapterTensors:
    """An adapter under HF PEFT names, as `adapter_config.json` + `adapter_model.safetensors` hold it.

    config: adapter_config.json's content. tensors: `base_model.model....lora_A.weight` -> CPU tensor.
    """

    config: dict
    tensors: dict[str, Tensor]


PendingSave = Callable[[bool], bool]


class Policy(ABC):
    """A model split over ranks, its adapters and its optimizer. Every method is collective: all ranks call it with
    the same rows; the backend gives each rank its part.

    notices: how the recipe was understood, for the user to read at start. unshared_reason: why rows that begin alike do
    not share what they have in common; None where they do. model_tokens: that all passes so far have sent through the
    model, of the whole global batches, without padding. spec: of the adapter; None where the whole model trains.
    critic: PPO's, where the run has one: another adapter and a value head on the same base, with an optimizer of its
    own. Its `score` gives, and its objectives get, a value for each token, of the state in front of it. It is trained,
    scored, saved and loaded like a policy; it has no reference, and nothing of it is exported.
    """

    spec: AdapterSpec | None
    notices: Sequence[str] = ()
    unshared_reason: str | None = None
    model_tokens: int = 0
    critic: "Policy | None" = None

    @abstractmethod
    def forward_backward(
        self, groups: Sequence[Sequence[Row]], objective: Objective, *, keep_logps: bool = False
    ) -> Passed:
        """Gradients of the objective's mean over the global batch, in place of those before. The objective is called
        with what its head gives (`heads.head_of`). Raises NonFiniteLoss."""

    @abstractmethod
    def optim_step(self) -> Updated:
        """Clip the gradients of `forward_backward` and take one optimizer step. Raises NonFiniteLoss, with nothing
        updated, where their norm is not finite."""

    def train_step(
        self, groups: Sequence[Sequence[Row]], objective: Objective, *, keep_logps: bool = False
    ) -> StepResult:
        """`forward_backward`, then `optim_step`. Raises NonFiniteLoss (nothing updated)."""
        passed = self.forward_backward(groups, objective, keep_logps=keep_logps)
        updated = self.optim_step()
        rows = [row for group in groups for row in group]
        return StepResult(
            loss=passed.loss,
            metrics=passed.metrics | updated.metrics,
            grad_norm=updated.grad_norm,
            learning_rate=updated.learning_rate,
            num_target_tokens=sum(row.num_targets for row in rows),
            num_tokens=sum(len(row) for row in rows),
            logps=passed.logps,
        )

    @abstractmethod
    def evaluate(self, groups: Sequence[Sequence[Row]], objective: Objective) -> tuple[float, dict[str, float]]:
        """The objective's mean loss and metrics without gradients, adapters' dropout off."""

    @abstractmethod
    def forward(self, rows: Sequence[Row], head: Head) -> list[Tensor]:
        """What a head (`policy.heads`) gives of each row's tokens: [S] or [S, width] fp32 CPU, [0] is 0; on every rank,
        no gradients. As for `score`, of which it is the general form."""

    @abstractmethod
    def score(self, rows: Sequence[Row]) -> list[Tensor]:
        """Each row's token log-probabilities: [S] fp32 CPU, nats, [0] is 0; on every rank, no gradients. Tokens that
        are no targets may be 0: those of rows that share a prefix are. Raises NonFiniteLoss, on every rank, where one
        is not finite."""

    @abstractmethod
    def score_with_reference(self, rows: Sequence[Row]) -> tuple[list[Tensor], list[Tensor]]:
        """`score` of the policy and within `reference()`, in one sweep over the rows."""

    @abstractmethod
    def adapters_disabled(self) -> AbstractContextManager[None]:
        """Within it the model is the frozen base (the reference policy); restored also on an exception."""

    @abstractmethod
    def reference(self) -> AbstractContextManager[None]:
        """Within it the model is the reference policy of DPO and GRPO: the frozen base, or for a run that started from
        `init_adapter` the base with that adapter as it was (unless `policy.reference_policy` is `base`), or in full
        fine-tuning the whole model as it was. Restored also on an exception. Raises ValueError for full fine-tuning
        that was not asked to keep where it started."""

    @abstractmethod
    def keep_other(self, tensors: Mapping[str, Tensor]) -> None:
        """Keep another adapter of the same shapes for `other`: whole factors and modules that train whole, as
        `other_adapter` gives them."""

    @abstractmethod
    def other(self) -> AbstractContextManager[None]:
        """Within it the model is the base with the adapter of `keep_other`. Restored also on an exception."""

    @abstractmethod
    def at_reference(self) -> bool:
        """Whether the policy's weights are its reference's (the adapter's product is zero, or its factors are those of
        `init_adapter`, or the whole model is as it began), so that a KL divergence between them is zero whatever
        kernels compute it. On every rank the same. Raises ValueError as `reference` does."""

    @abstractmethod
    def sampling(self, temperature: float, *, top_k: int = -1, top_p: float = 1.0) -> AbstractContextManager[None]:
        """Within it log-probabilities are those of the distribution that answers are drawn from: at this temperature,
        and of what top_k, then top_p leave of the vocabulary (-1 and 1: all). A target outside of that counts as the
        last token inside."""

    @abstractmethod
    def trainable_parameters(self) -> tuple[int, int]:
        """(parameters that train, all parameters) of the whole model, each counted once."""

    @abstractmethod
    def describe_adapters(self) -> list[tuple[str, ...]]:
        """Rows (linear, layers, rank, alpha, A, B, parameters) of the table shown at start; empty without adapters."""

    @abstractmethod
    def adapter(self, experts: ExpertLayout = "each") -> AdapterTensors:
        """The whole adapter under HF names, gathered over all ranks that share it; on every rank. experts: the form of
        what is on experts, `packed` as peft loads it into transformers' models. Raises UserError as `to_hf` does."""

    @abstractmethod
    def adapter_checksums(self, dtype: torch.dtype) -> dict[str, int]:
        """PEFT name -> checksum (`policy.checksums`) of A, and of scale * B, rounded to `dtype`, as an engine that
        serves the adapter is to hold them; on every rank. Taken from the factors that the model computes with:
        `adapter()`, which gathers and renames them, has no part in it and can be checked against this.

        Raises DifferentCopies where ranks differ in what they hold together.
        """

    @property
    def base_is_rounded(self) -> bool:
        """Whether the base's values are not those of its folder as another engine would load it: it is in 4 bits."""
        return False

    @abstractmethod
    def hf_weights(self, *, merged: bool = True) -> Iterator[tuple[str, Tensor]]:
        """Full weights under HF names, one tensor at a time, made dense where they are in 4 bits; on every rank.
        merged: with the adapters, in fp32; else the base alone."""

    @abstractmethod
    def save(self, weights: Path, optimizer: Path | None, *, asynchronous: bool = False) -> PendingSave | None:
        """Write the trainable weights and, if asked, optimizer, scheduler and RNG state, into empty folders. None when
        all is written; else what tells (and, blocking, waits) whether the writing in the background is done."""

    @abstractmethod
    def load(self, weights: Path, optimizer: Path | None) -> None:
        """Restore what `save` wrote, from any layout."""


class NonFiniteLoss(RuntimeError):
    """The loss, a gradient or a log-probability was NaN or infinite; names the data set rows that caused it, as far as
    they can be told apart."""

    def __init__(self, value: float, row_indices: list[int], what: str = "loss"):
        super().__init__(f"the {what} is {value} for data rows {row_indices}")
        self.value = value
        self.row_indices = row_indices


def check_scores(rows: Sequence[Row], scores: Sequence[Tensor], what: str) -> None:
    """Raises NonFiniteLoss where a row's scores [S] are not all finite: a number put in their place would train on.
    what: a score is."""
    bad = [(row, values) for row, values in zip(rows, scores, strict=True) if not bool(values.isfinite().all())]
    if bad:
        values = bad[0][1]
        first = float(values[~values.isfinite()][0])
        raise NonFiniteLoss(first, sorted({row.index for row, _ in bad}), what=what)
