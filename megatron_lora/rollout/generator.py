"""What a trainer may ask of whoever generates rollouts. `vllm.py` and the native generator implement `Generator`."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_lora.config.schema_generation import GenerationConfig
from megatron_lora.errors import UserError
from megatron_lora.policy.interface import AdapterTensors


@dataclass(frozen=True)
class SamplingOptions:
    """How answers are drawn.

    max_new_tokens: longest answer, in tokens. temperature: 0 takes the most likely token. top_k: -1 keeps all.
    stop_strings, stop_token_ids: what ends an answer besides its length (the end-of-sequence token is one of the
    stop_token_ids). seed: the same seed and prompts give the same answers.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    stop_strings: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    seed: int = 0

    @classmethod
    def from_config(
        cls,
        config: GenerationConfig,
        *,
        max_total_sequence_length: int,
        eos_token_ids: Sequence[int],
        seed: int,
        validation: bool = False,
    ) -> "SamplingOptions":
        """`policy.generation` as options; validation: with its `val_*` keys where they are set."""

        def pick(name: str) -> float | int | None:
            special = getattr(config, f"val_{name}") if validation else None
            return special if special is not None else getattr(config, name)

        top_k = pick("top_k")
        return cls(
            max_new_tokens=config.max_new_tokens or max_total_sequence_length,
            temperature=float(pick("temperature") or 0.0),
            top_p=float(pick("top_p") or 1.0),
            top_k=int(top_k) if top_k is not None and top_k > 0 else -1,
            stop_strings=tuple(config.stop_strings or ()),
            stop_token_ids=tuple(sorted({*eos_token_ids, *(config.stop_token_ids or ())})),
            seed=seed,
        )


@dataclass
class Sample:
    """One answer.

    prompt_index: the prompt's place in the list given to `generate`. completion_ids: the tokens sampled, the stop
    token included. logprobs: [completion] fp32 CPU, nats, each token's log-probability in the distribution it was
    drawn from (after temperature, top-k and top-p; at temperature 0 the model's own). finish_reason: "stop" or
    "length". text: the completion decoded without special tokens. adapter_version: of the weights that drew it.
    routed_experts: [prompt + completion, layers, k] int16 as in `Row`, where the engine was asked to report them.

    Of several turns with an environment between them (`sampled` is not None): completion_ids has all of them and what
    the environment answered; sampled: whether the model drew the token; logprobs: 0 where it did not. final_turn: the
    text of the last one. environment_error: why there was no further one.
    """

    prompt_index: int
    prompt_ids: list[int]
    completion_ids: list[int]
    logprobs: Tensor
    finish_reason: str
    text: str
    adapter_version: int
    sampled: list[bool] | None = None
    num_turns: int = 1
    final_turn: str = ""
    environment_error: str = ""
    routed_experts: Tensor | None = None

    @property
    def sampled_mask(self) -> Tensor:
        """[completion] bool: the tokens that the model drew."""
        if self.sampled is None:
            return torch.ones(len(self.completion_ids), dtype=torch.bool)
        return torch.tensor(self.sampled, dtype=torch.bool)


def exchange_samples(mine: Sequence[Sample], group: Any = None) -> list[list[Sample]]:
    """What each rank of `group` (None: all ranks) has drawn, on all of them. Collective. Log-probabilities and experts
    travel as one array each: a tensor a sample takes longer to pickle than all the rest."""
    size = dist.get_world_size(group)
    if size == 1:
        return [list(mine)]
    logprobs = torch.cat([sample.logprobs for sample in mine]).numpy() if mine else None
    reported = [sample.routed_experts for sample in mine if sample.routed_experts is not None]
    experts = torch.cat(reported).numpy() if reported else None
    everyone: list[Any] = [None] * size
    nothing = torch.empty(0)
    bare = [replace(sample, logprobs=nothing, routed_experts=None) for sample in mine]
    dist.all_gather_object(everyone, (bare, logprobs, experts), group=group)
    return [_with_tensors(*part) for part in everyone]


def _with_tensors(samples: list[Sample], logprobs: Any, experts: Any) -> list[Sample]:
    """Samples with their parts of the arrays in which they travelled; all of them have experts or none."""
    if not samples:
        return []
    sizes = [len(sample.completion_ids) for sample in samples]
    pieces = torch.from_numpy(logprobs).split(sizes)
    samples = [replace(sample, logprobs=piece) for sample, piece in zip(samples, pieces, strict=True)]
    if experts is None:
        return samples
    lengths = [len(sample.prompt_ids) + size for sample, size in zip(samples, sizes, strict=True)]
    pieces = torch.from_numpy(experts).split(lengths)
    return [replace(sample, routed_experts=piece) for sample, piece in zip(samples, pieces, strict=True)]


@dataclass(frozen=True)
class Handover:
    """What a refit gave the engine: bytes, and the fingerprint that the engine must then hold.

    columns: of merged weights those that the fingerprint is of: HF name -> number of the column -> its values [out].
    """

    num_bytes: int
    fingerprint: str
    columns: Mapping[str, Mapping[int, Tensor]] = field(default_factory=dict)


class Decoder(Protocol):
    """The part of a Hugging Face tokenizer that a generator uses."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool = ...) -> str: ...


def _say_nothing(count: int) -> None:
    pass


class Generator(ABC):
    """Draws answers. Every method is collective: all ranks call it in the same order with the same arguments.

    num_replicas: engines that answer different prompts at once. block_size: tokens in a block of the KV cache.
    dtype: that it computes in, and holds an adapter's factors in.
    version: of the weights it holds, as given with them; -1 before the first refit.
    base_weights: gives the base's weights where they are not those of the model's folder (held in 4 bits); else None.
    handover: the last refit's.
    on_answers: told of each few answers that are done, for a progress bar; another replica's are guessed from its own.
    """

    num_replicas: int = 1
    block_size: int = 1
    dtype: torch.dtype = torch.float32
    version: int = -1
    base_weights: Callable[[], Iterable[tuple[str, Tensor]]] | None = None
    handover: Handover = Handover(0, "")
    on_answers: Callable[[int], None] = staticmethod(_say_nothing)

    def wait_until_ready(self, stopping: Callable[[], bool]) -> bool:
        """Wait for what `start` needs and others bring; whether to go on. stopping: whether a signal asks to end the
        wait; collective."""
        return True

    @abstractmethod
    def start(self) -> None:
        """Build the engine and its memory. The trainer's random state is as before afterwards."""

    @abstractmethod
    def wake(self) -> None:
        """Take back the memory that `sleep` gave up. Weights are as they were; the KV cache is empty."""

    @abstractmethod
    def sleep(self) -> None:
        """Give the device's memory to the trainer until `wake`."""

    @abstractmethod
    def load_adapter(self, adapter: AdapterTensors, version: int) -> Handover:
        """Answer with the base plus this adapter from now on; the base's weights are not touched."""

    @abstractmethod
    def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> Handover:
        """Answer with these full weights (Hugging Face names) from now on, and no adapter."""

    @abstractmethod
    def held_fingerprint(self) -> str:
        """The fingerprint of what the engine holds, read back from it; the same on every rank.

        Raises RolloutError where two replicas, or two ranks' copies of one tensor, differ.
        """

    @abstractmethod
    def generate(self, prompts: Sequence[Sequence[int]], num_samples: int, options: SamplingOptions) -> list[Sample]:
        """num_samples answers to each prompt (token ids), sorted by prompt; all of them on every rank.

        Raises UserError for a prompt that leaves no room for an answer, RolloutError where the engine fails.
        """

    @abstractmethod
    def close(self) -> None:
        """End the engine and free its memory."""


@dataclass(frozen=True)
class Collected:
    """Answers that were asked for ahead. seconds: from the first prompt sent to the last answer. num_stale: answers
    that were dropped as too old, and drawn again."""

    samples: list[Sample]
    seconds: float
    num_stale: int


class AheadGenerator(Generator):
    """One that answers beside training, on devices of its own."""

    @abstractmethod
    def ask_ahead(
        self, number: int, prompts: Sequence[Sequence[int]], num_samples: int, options: SamplingOptions
    ) -> None:
        """Ask for answers that `collect` gives later, under a number. Collective. Raises as `generate` does."""

    @abstractmethod
    def collect(self, number: int, oldest: int) -> Collected:
        """The answers that were asked for under a number, once they are all in. Those of weights before version
        `oldest` are dropped, and their prompts asked again. Collective. Raises RolloutError as `generate` does."""

    @abstractmethod
    def new_weights(self, *, in_flight: bool) -> AbstractContextManager[None]:
        """Within it weights are handed over and proven: prompts asked ahead wait. in_flight: those that are being
        answered go on with the adapter that they began with; otherwise they are waited for first. Collective."""


def check_lengths(prompts: Sequence[Sequence[int]], max_length: int, key: str) -> None:
    """Raise UserError for a prompt that leaves no room for an answer. max_length: of both, `key`'s value."""
    for index, prompt in enumerate(prompts):
        if not 0 < len(prompt) < max_length:
            raise UserError(
                f"prompt {index} has {len(prompt)} tokens; wanted 1 to {max_length - 1}, so that an answer fits into "
                f"{key}"
            )


class RolloutError(RuntimeError):
    """The rollout engine failed, or holds other weights than the trainer. The run ends with its message."""


def rollout_logprob_error(trainer_logps: Sequence[Tensor], samples: Sequence[Sample]) -> float:
    """Mean |trainer - rollout| log-probability over all tokens that the model drew, nats.

    trainer_logps: `Policy.score` of prompt + completion, each [S]. Raises ValueError where lengths differ.
    """
    for logps, sample in zip(trainer_logps, samples, strict=True):
        if logps.numel() != len(sample.prompt_ids) + len(sample.completion_ids):
            raise ValueError(
                f"the trainer scored {logps.numel()} tokens of a sample that has {len(sample.prompt_ids)} + "
                f"{len(sample.completion_ids)}"
            )
    if not any(sample.completion_ids for sample in samples):
        return 0.0
    pairs = zip(trainer_logps, samples, strict=True)
    trainer = torch.cat([logps[len(sample.prompt_ids) :] for logps, sample in pairs])
    rollout = torch.cat([sample.logprobs for sample in samples])
    drawn = torch.cat([sample.sampled_mask for sample in samples]).to(trainer.device)
    return float((trainer.double() - rollout.double())[drawn].abs().mean())
