"""What both backends do alike around a policy's passes (`policy.passes`): its start, the base and the reference policy,
other adapters, checksums, the base's residual. A backend says where its parameters are."""

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_lora.config.schema import PolicyConfig
from megatron_lora.config.schema_critic import CriticConfig
from megatron_lora.conversion.adapter_checkpoint import read_start, write_start
from megatron_lora.conversion.weight_source import WeightSource
from megatron_lora.lora.layout import AdapterSpec
from megatron_lora.lora.methods import ReadWeight
from megatron_lora.lora.principal import against_the_base, given_principal, residual_reader
from megatron_lora.policy.adapter_pieces import principal_pieces
from megatron_lora.policy.adapter_start import base_reader, describe_modules
from megatron_lora.policy.batching import BatchingOptions
from megatron_lora.policy.checksums import Pieces, join_ranks, to_numbers
from megatron_lora.policy.frozen_start import FrozenStart
from megatron_lora.policy.passes import PassesPolicy
from megatron_lora.runtime.world import World

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class BackendPolicy(PassesPolicy):
    """A model in the recipe's layout, its adapters (or all of it), and an optimizer.

    pad_token_id: what fills a micro-batch. seed: of what is drawn. num_steps: the run's length, for schedules that
    decay. keeps_start: whether full fine-tuning keeps its starting weights, for `reference()`. critic: the recipe's
    section, where the run has one. spec: the adapter, None in full fine-tuning.
    """

    spec: AdapterSpec | None = None
    # What trains, in the reference policy, where that is not the base alone.
    _start: FrozenStart | None
    # What trains, in the base alone, where it is not enough to switch adapters off: see `_bare_parts`.
    _bare: FrozenStart | None
    # A and B of which the base keeps what they leave (`AdapterSpec.residual`), whole, by `<module>.<factor>`.
    _principal: dict[str, Tensor] | None = None
    # Reads the base's weights by HF name, where the adapter's start or reference needs them.
    _read_base: ReadWeight | None = None

    def __init__(
        self,
        policy: PolicyConfig,
        world: World,
        *,
        pad_token_id: int,
        seed: int,
        num_steps: int,
        keeps_start: bool = False,
        critic: CriticConfig | None = None,
    ):
        self.config = policy
        self.world = world
        self.pad_token_id = pad_token_id
        self.has_critic = critic is not None
        weights = self._build(seed, num_steps)
        self.batching = self._batching_options(pad_token_id)
        if self.spec is not None:
            self._read_base = base_reader(self.spec, weights, DTYPES[policy.precision])
        self._remember_start(keeps_start)
        if critic is not None:
            self.critic = self._build_critic(critic, seed, num_steps)

    @abstractmethod
    def _build(self, seed: int, num_steps: int) -> WeightSource:
        """Model, adapters (`spec`), optimizer and schedule, with their starting values. Returns the base's weights."""

    @abstractmethod
    def _build_critic(self, options: CriticConfig, seed: int, num_steps: int) -> "BackendPolicy":
        """The critic on this policy's base."""

    @abstractmethod
    def _batching_options(self, pad_token_id: int) -> BatchingOptions:
        """What the layout asks of micro-batches."""

    @abstractmethod
    def _trained(self) -> Sequence[nn.Parameter]:
        """This rank's part of what trains."""

    @property
    @abstractmethod
    def _head_owner(self) -> Any:
        """What has the `head`, the options of the log-probabilities."""

    @abstractmethod
    def _values_changed(self) -> None:
        """Forget what follows from the parameters' former values."""

    @abstractmethod
    def _adds_nothing(self) -> bool:
        """Whether every adapter's product is zero, on this rank as far as it can say."""

    @abstractmethod
    def _checksum_pieces(self, dtype: torch.dtype) -> Pieces:
        """Checksums of this rank's parts of A and scale * B, under PEFT names."""

    @abstractmethod
    def _put_factors(self, factors: Mapping[str, Tensor]) -> None:
        """Copy this rank's part of whole factors (`<module>.<factor>`) into the modules; called without gradients."""

    @abstractmethod
    def _put_principal(self, start: Mapping[str, Tensor], read: ReadWeight) -> None:
        """Put whole factors A and B (`<module>.<factor>`) into the modules, and into the weights under them what `read`
        gives."""

    @abstractmethod
    def _saved_parameters(self) -> Mapping[str, nn.Parameter]:
        """HF tensor name -> this rank's part of each module that trains whole beside the adapters."""

    @abstractmethod
    def _put_saved(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy this rank's part of whole tensors, by HF name, into `_saved_parameters`; called without gradients."""

    def _remember_start(self, keeps_start: bool) -> None:
        """Once, when the starting values are in place. keeps_start: whether full fine-tuning keeps its own."""
        self._gradients_checked = self.spec is None
        keeps = keeps_start if self.spec is None else self.config.reference_is_starting_adapter
        on_cpu = self.spec is None and self.config.reference_weights == "cpu"
        self._start = FrozenStart(self._trained_parts(), on_cpu=on_cpu) if keeps else None
        self._bare = self._of_the_base()
        self._other: FrozenStart | None = None

    @torch.no_grad()
    def _of_the_base(self) -> FrozenStart | None:
        """The values of `_bare_parts` with which the model is the base."""
        parts = self._bare_parts()
        if self.spec is None or not parts or self._principal is not None:
            return FrozenStart(parts) if parts else None
        read = self._read_base
        assert read is not None
        with self._holding(FrozenStart(parts), parts):
            self._put_saved({name: read(name) for name in self._saved_parameters()})
            return FrozenStart(parts)

    def _trained_parts(self) -> list[Tensor]:
        """What this rank holds of everything that trains."""
        return [local_part(parameter.detach()) for parameter in self._trained()]

    def _bare_parts(self) -> list[Tensor]:
        """What has to change beside switching adapters off: modules that train whole; or all that trains, where the
        base keeps the residual of the adapter's start."""
        if self._principal is not None:
            return self._trained_parts()
        return [local_part(parameter.detach()) for parameter in self._saved_parameters().values()]

    @contextmanager
    def adapters_disabled(self) -> Iterator[None]:
        self._needs_adapter("full fine-tuning has no adapters to disable")
        # Of an adapter of the residual the base is the model with the factors that it started with.
        linears = list(self._linears.values()) if self._principal is None else []
        before = [linear.enabled for linear in linears]
        try:
            for linear in linears:
                linear.enabled = False
            with self._holding(self._bare, self._bare_parts()):
                yield
        finally:
            for linear, enabled in zip(linears, before, strict=True):
                linear.enabled = enabled

    @contextmanager
    def reference(self) -> Iterator[None]:
        if self._start is None:
            with self.adapters_disabled():
                yield
        else:
            with self._holding(self._start, self._trained_parts()):
                yield

    @torch.no_grad()
    def keep_other(self, tensors: Mapping[str, Tensor]) -> None:
        spec, parts = self._needs_adapter("full fine-tuning has no adapter"), self._trained_parts()
        with self._holding(FrozenStart(parts), parts):
            self._put_factors({name: value for name, value in tensors.items() if name not in spec.saved})
            self._put_saved({name: tensors[name] for name in spec.saved})
            self._other = FrozenStart(parts)

    @contextmanager
    def other(self) -> Iterator[None]:
        if self._other is None:
            raise ValueError("no other adapter was kept")
        with self._holding(self._other, self._trained_parts()):
            yield

    @contextmanager
    def _holding(self, values: FrozenStart | None, parts: Sequence[Tensor]) -> Iterator[None]:
        """Within it these tensors have those values."""
        if values is None:
            yield
            return
        self._values_changed()
        try:
            with values.put_back(parts):
                yield
        finally:
            self._values_changed()

    def at_reference(self) -> bool:
        if self._start is not None:
            same = self._start.equals(self._trained_parts())
        else:
            self._needs_adapter("full fine-tuning kept no copy of where it started")
            # Collective on one backend: every rank asks.
            same = self._principal is not None or self._adds_nothing()
            same = same and (self._bare is None or self._bare.equals(self._bare_parts()))
        box = torch.tensor(float(same), device=self.world.device)
        dist.all_reduce(box, op=dist.ReduceOp.MIN)
        return bool(box)

    def adapter_checksums(self, dtype: torch.dtype) -> dict[str, int]:
        spec = self._needs_adapter("full fine-tuning has no adapter")
        pieces = self._checksum_pieces(dtype)
        if self._principal is not None:
            pieces |= principal_pieces(spec, self._principal, dtype)
        everyone: list[Any] = [None] * self.world.size
        dist.all_gather_object(everyone, to_numbers(pieces))
        return join_ranks(everyone)

    def _against_the_base(self, factors: dict[str, Tensor]) -> tuple[AdapterSpec, dict[str, Tensor]]:
        """The whole adapter as one of the base itself."""
        spec = self._needs_adapter("full fine-tuning has no adapter")
        return (spec, factors) if self._principal is None else against_the_base(spec, factors, self._principal)

    def _save_principal(self, weights: Path) -> None:
        if self._principal is not None:
            write_start(weights, self._principal)

    def _load_principal(self, weights: Path) -> None:
        """Where a checkpoint's adapter began at other values than this run's (another machine rounds otherwise), the
        base is what those leave of it."""
        if self._principal is None:
            return
        spec = self._needs_adapter("")
        stored = read_start(weights, spec)
        if all(torch.equal(value, stored[name]) for name, value in self._principal.items()):
            return
        read = self._read_base
        assert read is not None
        with self._holding(self._bare, self._trained_parts()):
            self._put_principal(stored, residual_reader(read, spec, given_principal(stored)))
            start = FrozenStart(self._trained_parts())
        self._bare = start
        self._principal = stored

    @contextmanager
    def sampling(self, temperature: float, *, top_k: int = -1, top_p: float = 1.0) -> Iterator[None]:
        owner = self._head_owner
        before = owner.head
        try:
            owner.head = replace(before, temperature=temperature, top_k=top_k, top_p=top_p)
            yield
        finally:
            owner.head = before

    def describe_adapters(self) -> list[tuple[str, ...]]:
        return describe_modules(self.spec) if self.spec is not None else []

    def _needs_adapter(self, otherwise: str) -> AdapterSpec:
        if self.spec is None:
            raise ValueError(otherwise)
        return self.spec


def local_part(value: Tensor) -> Tensor:
    """What this rank holds of a tensor, DTensor or not."""
    return value.to_local() if hasattr(value, "to_local") else value  # type: ignore[operator]
