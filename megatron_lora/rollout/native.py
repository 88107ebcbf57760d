"""Rollouts by the training model itself: no second copy of the weights, no other engine, nothing to install.

The default where nothing else is asked for, and slower than vLLM: a forward pass of the training model a token.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_lora.errors import UserError
from megatron_lora.policy.backend import DTYPES
from megatron_lora.policy.checksums import checksum, digest
from megatron_lora.policy.interface import AdapterTensors, Policy
from megatron_lora.policy.lanes import LanePolicy, Lanes
from megatron_lora.rollout.adapter_factors import factors_fingerprint, scaled_factors, trainer_fingerprint
from megatron_lora.rollout.generator import (
    Decoder,
    Generator,
    Handover,
    RolloutError,
    Sample,
    SamplingOptions,
    check_lengths,
    exchange_samples,
)
from megatron_lora.rollout.native_answers import Answer, complete
from megatron_lora.rollout.native_bursts import Bursts
from megatron_lora.rollout.sampling import StopRule, random_stream
from megatron_lora.runtime.memory import free_memory_bytes

CPU_ROWS = 32
BURST_TOKENS = 16
# A row's logits while a token is drawn: three copies in fp32, two in fp64.
LOGIT_BYTES = 3 * 4 + 2 * 8


class NativeGenerator(Generator):
    """The Megatron policy as a generator. Data- and context-parallel ranks answer different prompts.

    tokenizer: decodes answers (None: their text is empty, and stop strings cannot be used). Raises UserError for
    another backend's policy, and with expert parallelism.
    """

    def __init__(self, policy: Policy, tokenizer: Decoder | None):
        if not isinstance(policy, LanePolicy):
            raise UserError(
                "policy.generation.backend=megatron generates with the Megatron model, but policy.megatron_cfg.enabled "
                "is false; set policy.generation.backend=vllm or policy.megatron_cfg.enabled=true"
            )
        experts = policy.config.megatron_cfg.expert_model_parallel_size
        if experts > 1:
            # Ranks that hold different experts would have to answer in lockstep.
            raise UserError(
                f"policy.generation.backend=megatron has no expert parallelism, but policy.megatron_cfg."
                f"expert_model_parallel_size={experts}; set policy.generation.backend=vllm or the size to 1"
            )
        self.policy, self.tokenizer = policy, tokenizer
        self.max_length = policy.config.max_total_sequence_length
        self.group: Any = policy.replica_group
        self.num_replicas = self.group.size()
        self.dtype = DTYPES[policy.config.precision]
        self._kind = "merge" if policy.spec is None else "adapter"
        self._on_gpu = policy.world.device.type == "cuda"
        # Tokens drawn at once. Ranks that share a model take part in each token; so do a batch's experts on the host.
        alone = policy.world.tp == policy.world.pp == 1 and not policy.shapes.num_experts
        self.burst = BURST_TOKENS if self._on_gpu and alone else 1

    def start(self) -> None:
        """Nothing to build: the trainer holds the model."""

    def wake(self) -> None:
        """Nothing to take back: caches are made for each call."""

    def sleep(self) -> None:
        """Nothing to give up: caches are freed after each call."""

    def load_adapter(self, adapter: AdapterTensors, version: int) -> Handover:
        """Nothing is copied, the model is the trainer's; the fingerprint is of the adapter given."""
        self._kind, self.version = "adapter", version
        factors = scaled_factors(adapter, self.dtype, self.policy.world.device)
        return Handover(num_bytes=0, fingerprint=factors_fingerprint(factors))

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> Handover:
        """Nothing is copied, the model is the trainer's; the fingerprint is of the weights given."""
        self._kind, self.version = "merge", version
        return Handover(num_bytes=0, fingerprint=self._merged_fingerprint(weights))

    def held_fingerprint(self) -> str:
        if self._kind == "adapter":
            return trainer_fingerprint(self.policy, self.dtype)
        mine = self._merged_fingerprint(self.policy.hf_weights())
        everyone: list[Any] = [None] * self.policy.world.size
        dist.all_gather_object(everyone, mine)
        if len(set(everyone)) > 1:
            raise RolloutError(f"the ranks' copies of the model differ: {', '.join(sorted(set(everyone)))}")
        return mine

    def generate(self, prompts: Sequence[Sequence[int]], num_samples: int, options: SamplingOptions) -> list[Sample]:
        check_lengths(prompts, self.max_length, "policy.max_total_sequence_length")
        rule = StopRule(options, self.tokenizer)
        # The most likely answer is the same each time it is drawn.
        draws = num_samples if options.temperature else min(1, num_samples)
        answers = [
            Answer(
                prompt_index=index,
                prompt=list(prompt),
                limit=min(options.max_new_tokens, self.max_length - len(prompt)),
                stream=random_stream(options.seed, index, sample),
            )
            for index, prompt in enumerate(prompts)
            for sample in range(draws)
        ]
        mine = answers[self.group.rank() :: self.num_replicas]
        if mine:
            capacity = max(len(answer.prompt) + answer.limit for answer in mine)
            with self._lanes(self._slots(len(mine), capacity), capacity) as model:
                bursts = Bursts(model, options, self.burst, graphs=self._on_gpu) if self.burst > 1 else None
                complete(model, mine, options, rule, lambda count: self.on_answers(count * self.num_replicas), bursts)
        copies = num_samples // draws if draws else 0
        drawn = [sample for answer in mine for sample in self._samples(answer, copies)]
        everyone = exchange_samples(drawn, self.group)
        dealt = [divmod(number, self.num_replicas) for number in range(len(answers))]
        return [s for place, rank in dealt for s in everyone[rank][place * copies : (place + 1) * copies]]

    def close(self) -> None:
        """Nothing to end: the model stays the trainer's."""

    @contextmanager
    def _lanes(self, num_slots: int, capacity: int) -> Iterator[Lanes]:
        try:
            with self.policy.lanes(num_slots, capacity) as model:
                yield model
        except torch.OutOfMemoryError as error:
            raise RolloutError(
                f"rank {self.policy.world.rank} ran out of memory with {num_slots} answers of up to {capacity} tokens "
                "at once; lower policy.generation_batch_size or policy.generation.max_new_tokens"
            ) from error

    def _slots(self, num_answers: int, capacity: int) -> int:
        """Rows a lane. Collective in a copy of the model."""
        at_once = self.policy.config.generation_batch_size or self._rows_that_fit(capacity)
        return -(-min(at_once, num_answers) // self.policy.num_lanes)

    def _rows_that_fit(self, capacity: int) -> int:
        """Rows of up to `capacity` tokens for which every rank of this copy of the model has room."""
        world = self.policy.world
        if world.device.type == "cpu":
            return CPU_ROWS
        # The other half is for activations and whatever else uses the GPU.
        room = free_memory_bytes(world.device) // 2
        logits = self.policy.shapes.vocab_size * LOGIT_BYTES
        rows = room // (self.policy.row_bytes(capacity) + logits)
        fewest = torch.tensor(max(1, rows), device=world.device)
        dist.all_reduce(fewest, op=dist.ReduceOp.MIN, group=self.policy.model_group)
        return int(fewest)

    def _samples(self, answer: Answer, copies: int) -> list[Sample]:
        text = self.tokenizer.decode(answer.ids, skip_special_tokens=True) if self.tokenizer else ""
        return [
            Sample(
                prompt_index=answer.prompt_index,
                prompt_ids=list(answer.prompt),
                completion_ids=list(answer.ids),
                logprobs=torch.tensor(answer.logprobs, dtype=torch.float32),
                finish_reason=answer.reason,
                text=text,
                adapter_version=self.version,
            )
            for _ in range(copies)
        ]

    def _merged_fingerprint(self, tensors: Iterable[tuple[str, Tensor]]) -> str:
        totals = {}
        for name, tensor in tensors:
            matrix = tensor.detach().to(self.policy.world.device)
            totals[name] = int(checksum(matrix.reshape(-1, matrix.shape[-1])))
        return digest("merge", totals)
