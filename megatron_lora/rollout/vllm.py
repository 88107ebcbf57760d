"""Rollouts by vLLM, colocated: each of torchrun's processes holds its part of an engine beside its part of the trainer.

With vLLM TP=n over a world of N processes there are N / n engines (replicas), which share the prompts out. The same
class runs vLLM's CPU and GPU builds.
"""

import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from megatron_lora.config.schema import PolicyConfig
from megatron_lora.errors import UserError
from megatron_lora.policy.checksums import DifferentCopies, digest, join_ranks, to_numbers
from megatron_lora.policy.interface import AdapterTensors
from megatron_lora.policy.preload import base_folder
from megatron_lora.rollout import vllm_engine, vllm_worker
from megatron_lora.rollout.adapter_factors import adapted_linears, factors_fingerprint, largest_rank, scaled_factors
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
from megatron_lora.rollout.routing import reported_experts
from megatron_lora.rollout.sent_weights import SentWeights
from megatron_lora.runtime.cpu import device_names_as_given
from megatron_lora.runtime.world import World

SEED_STRIDE = 1_000_003


class VllmGenerator(Generator):
    """A vLLM engine per `vllm_engine.engine_size` ranks.

    tokenizer: decodes answers (None: their text is empty). adapter: what will be refitted, for the shapes of vLLM's
    adapter slots; None: merged weights only. Raises UserError where vLLM is missing or cannot serve the request.
    """

    def __init__(self, policy: PolicyConfig, world: World, tokenizer: Decoder | None, adapter: AdapterTensors | None):
        vllm_engine.check_installed(world.device)
        self.policy, self.world, self.tokenizer = policy, world, tokenizer
        self.model_config = vllm_engine.base_config(policy)
        self.adapter_rank = None if adapter is None else largest_rank(adapter)
        self.adapted = [] if adapter is None else sorted({name.split(".")[-1] for name in adapted_linears(adapter)})
        vllm_engine.check_request(policy, world, self.model_config, self.adapter_rank)
        size = vllm_engine.engine_size(policy, world, self.model_config)
        self.num_replicas = world.size // size
        self.replica = world.rank // size
        self.leads_replica = world.rank % size == 0
        self._llm: Any = None
        self._mode = "base"
        self._asleep = False
        self._failure: str | None = None

    def start(self) -> None:
        if self._llm is not None:
            return
        arguments = vllm_engine.engine_arguments(
            self.policy,
            self.world,
            self.adapter_rank,
            self.adapted,
            self.model_config,
            stored_four_bit=vllm_engine.read_base(self.policy).stored_four_bit,
        )
        if self.policy.preload_to_shm and "model" not in self.policy.generation.vllm_kwargs:
            arguments["model"] = str(base_folder(self.policy))
        with self._reporting("start"):
            self._llm = vllm_engine.build_engine(arguments, self.world)
        config = self._llm.llm_engine.vllm_config
        self.block_size = config.cache_config.block_size
        self.max_model_len = config.model_config.max_model_len
        self.dtype: torch.dtype = config.model_config.dtype
        # An answer with a random stream of its own depends on nothing but its seed. vLLM's older GPU runner pays a
        # kernel launch an answer and token for that; there the batch draws from one stream (see `_run`).
        self.own_streams = self.world.device.type == "cpu" or config.use_v2_model_runner

    def wake(self) -> None:
        if self._asleep:
            with self._reporting("wake up"):
                self._llm.wake_up()
            self._asleep = False

    def sleep(self) -> None:
        """On a GPU: weights go to host memory, the KV cache is dropped. On a CPU there is nothing to give up."""
        if self.world.device.type == "cuda" and not self._asleep:
            with self._reporting("sleep"):
                self._llm.sleep(level=1)
            self._asleep = True

    def load_adapter(self, adapter: AdapterTensors, version: int) -> Handover:
        if self.adapter_rank is None:
            raise ValueError("the engine was built without adapter slots; give VllmGenerator the adapter")
        if self._mode == "merge":
            # The adapter goes on the base, not on merged weights.
            self._worker(vllm_worker.reload_weights, self.base_weights() if self.base_weights is not None else None)
        factors = scaled_factors(adapter, self.dtype, self.world.device)
        with torch.no_grad():
            self._worker(vllm_worker.swap_adapter, factors)
        self._mode, self.version = "adapter", version
        self._forget_cache()
        num_bytes = sum(tensor.numel() * tensor.element_size() for pair in factors.values() for tensor in pair)
        self.handover = Handover(num_bytes, factors_fingerprint(factors))
        return self.handover

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> Handover:
        sent = SentWeights(self.dtype, self.world.device)
        with torch.no_grad():
            self._worker(vllm_worker.remove_adapter)
            self._worker(vllm_worker.reload_weights, ((name, sent.note(name, tensor)) for name, tensor in weights))
        self._mode, self.version = "merge", version
        self._forget_cache()
        self.handover = sent.handover()
        return self.handover

    def held_fingerprint(self) -> str:
        kind = "adapter" if self._mode == "adapter" else "merge"
        read = vllm_worker.adapter_pieces if kind == "adapter" else vllm_worker.weight_pieces
        with torch.no_grad():
            mine = to_numbers(self._worker(read))
        everyone: list[Any] = [None] * self.world.size
        dist.all_gather_object(everyone, mine)
        size = self.world.size // self.num_replicas
        try:
            parts = [everyone[first : first + size] for first in range(0, self.world.size, size)]
            held = [digest(kind, join_ranks(part)) for part in parts]
        except DifferentCopies as error:
            raise RolloutError(f"in vLLM {error}") from error
        if len(set(held)) > 1:
            raise RolloutError(f"vLLM's replicas hold different weights: {', '.join(held)}")
        return held[0]

    def generate(self, prompts: Sequence[Sequence[int]], num_samples: int, options: SamplingOptions) -> list[Sample]:
        check_lengths(prompts, self.max_model_len, "policy.generation.vllm_cfg.max_model_len")
        mine = [index for index in range(len(prompts)) if index % self.num_replicas == self.replica]
        samples = self._generate(prompts, mine, num_samples, options) if mine else []
        everyone = exchange_samples(samples if self.leads_replica else [])
        return sorted((sample for part in everyone for sample in part), key=lambda sample: sample.prompt_index)

    def close(self) -> None:
        if self._llm is not None:
            llm, self._llm = self._llm, None
            vllm_engine.free_engine(llm)

    def _generate(
        self, prompts: Sequence[Sequence[int]], mine: list[int], num_samples: int, options: SamplingOptions
    ) -> list[Sample]:
        params = [self._sampling_params(index, len(prompts[index]), num_samples, options) for index in mine]
        bar = partial(_AnswerBar, lambda count: self.on_answers(count * self.num_replicas))
        outputs = self._run([list(prompts[index]) for index in mine], params, options.seed + self.replica, bar)
        samples: list[Sample] = []
        for index, output in zip(mine, outputs, strict=True):
            # vLLM draws the most likely answer once; asked for several, they are the same.
            answers = output.outputs * (num_samples if options.temperature == 0 else 1)
            for answer in answers:
                ids = list(answer.token_ids)
                logprobs = [entry[token].logprob for entry, token in zip(answer.logprobs, ids, strict=True)]
                samples.append(
                    Sample(
                        prompt_index=index,
                        prompt_ids=list(prompts[index]),
                        completion_ids=ids,
                        logprobs=torch.tensor(logprobs, dtype=torch.float32),
                        finish_reason=answer.finish_reason or "stop",
                        text=self.tokenizer.decode(ids, skip_special_tokens=True) if self.tokenizer else "",
                        adapter_version=self.version,
                        routed_experts=reported_experts(answer.routed_experts, len(prompts[index]) + len(ids))
                        if self.policy.router_replay.enabled
                        else None,
                    )
                )
        return samples

    def _sampling_params(self, index: int, prompt_length: int, num_samples: int, options: SamplingOptions) -> Any:
        from vllm import SamplingParams

        greedy = options.temperature == 0
        own_seed = options.seed * SEED_STRIDE + index * num_samples if self.own_streams and not greedy else None
        return SamplingParams(
            n=1 if greedy else num_samples,
            temperature=options.temperature,
            top_p=1.0 if greedy else options.top_p,
            top_k=-1 if greedy else options.top_k,
            seed=own_seed,
            stop=list(options.stop_strings) or None,
            stop_token_ids=list(options.stop_token_ids),
            # What ends an answer is in stop_token_ids, whether or not vLLM has a tokenizer.
            ignore_eos=True,
            max_tokens=min(options.max_new_tokens, self.max_model_len - prompt_length),
            logprobs=0,
            detokenize=bool(options.stop_strings),
        )

    def _run(
        self, prompts: list[list[int]], params: list[Any], seed: int, bar: Callable[..., Any] | bool = False
    ) -> list[Any]:
        request = vllm_engine.adapter_request(self.version) if self._mode == "adapter" else None
        state = vllm_engine.own_random_state(self.world.device, seed)
        with self._reporting("generate"), state, device_names_as_given():
            return self._llm.generate(
                [{"prompt_token_ids": ids} for ids in prompts], params, lora_request=request, use_tqdm=bar
            )

    def _forget_cache(self) -> None:
        """Keys and values of other weights must not serve the next prompt."""
        with self._reporting("reset the prefix cache"):
            if not self._llm.reset_prefix_cache():
                raise RolloutError("vLLM did not reset its prefix cache: requests are still running")

    def _worker(self, function: Callable[..., Any], *arguments: Any) -> Any:
        with self._reporting(function.__name__):
            return self._llm.collective_rpc(function, args=arguments)[0]

    @contextmanager
    def _reporting(self, what: str) -> Iterator[None]:
        """Any failure of the engine ends as a RolloutError with its reason; a failed engine is not used again."""
        if self._failure is not None:
            raise RolloutError(f"the rollout engine failed before: {self._failure}")
        try:
            yield
        except (UserError, RolloutError):
            raise
        except Exception as error:
            self._failure = f"vLLM failed to {what} on rank {self.world.rank}: {type(error).__name__}: {error}"
            raise RolloutError(self._failure) from error


class _AnswerBar(tqdm):
    """What vLLM takes for its progress bar: draws nothing and passes on how many answers are done."""

    def __init__(self, advance: Callable[[int], None], *arguments: Any, **options: Any):
        # vLLM makes a bar for taking in the prompts, too.
        self._advance = advance if options.get("desc") == "Processed prompts" else None
        super().__init__(*arguments, **options | {"file": io.StringIO()})

    def update(self, n: float | None = 1) -> bool | None:
        if self._advance is not None and n:
            self._advance(int(n))
        return super().update(n)
