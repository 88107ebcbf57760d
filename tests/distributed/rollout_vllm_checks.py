"""Started by torchrun over two processes: what test_rollout_vllm.py asserts, measured with one start of the engines."""

import faulthandler
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoTokenizer

from megatron_lora.errors import UserError
from megatron_lora.objectives.sft import SFTObjective
from megatron_lora.policy.interface import AdapterTensors
from megatron_lora.policy.megatron.policy import MegatronPolicy
from megatron_lora.policy.preload import copy_of, released_copies
from megatron_lora.rollout import vllm_engine
from megatron_lora.rollout.generator import RolloutError, Sample, SamplingOptions, rollout_logprob_error
from megatron_lora.rollout.refit import Refitter, choose_refitter
from megatron_lora.rollout.vllm import VllmGenerator
from megatron_lora.runtime.world import init_distributed, init_megatron_world
from tests.distributed.rollout_models import (
    CUTS,
    VOCAB,
    Reference,
    as_row,
    build,
    policy_config,
    prompts,
    read_adapter,
    write_adapter,
)
from tests.support import real_text
from tests.support.planted_faults import FAULTS, plant, plant_merged
from tests.support.reference import make_rows, save_adapter
from tools.smollm2 import cached_model

SAMPLED = SamplingOptions(max_new_tokens=12, temperature=1.0, seed=3)
GREEDY = SamplingOptions(max_new_tokens=12, temperature=0.0)


def worst(reference: Reference, samples: list[Sample], **cut: Any) -> float:
    """Largest |peft - vLLM| over all completion tokens."""
    errors = [
        (reference.completion_logps(s.prompt_ids, s.completion_ids, **cut) - s.logprobs).abs().max() for s in samples
    ]
    return float(max(errors))


def message(action: Any, *arguments: Any) -> str:
    try:
        action(*arguments)
    except (UserError, RolloutError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def tokens(samples: list[Sample]) -> list[list[int]]:
    return [sample.completion_ids for sample in samples]


def train_once(policy: MegatronPolicy) -> None:
    policy.train_step([[row] for row in make_rows(4, VOCAB)], SFTObjective())


def check_tensor_parallel(folder: Path, found: dict[str, Any]) -> MegatronPolicy:
    """Policy at TP=2 beside one engine at TP=2, all reading the base's copy in shared memory."""
    config = policy_config(folder, "qwen3", vllm_tp=2, tensor_model_parallel_size=2)
    config.preload_to_shm = True
    world = init_megatron_world(config, 0)
    policy = MegatronPolicy(config, world, pad_token_id=0, seed=0, num_steps=10)
    before = (os.environ.get("LOCAL_WORLD_SIZE"), torch.get_num_threads(), torch.set_num_threads)
    tokenizer = AutoTokenizer.from_pretrained(folder / "qwen3")
    random_state = torch.get_rng_state()
    generator = VllmGenerator(config, world, tokenizer, policy.adapter())
    generator.start()
    found["read"] = generator._llm.llm_engine.vllm_config.model_config.model
    found["copy"] = str(copy_of(folder / "qwen3"))
    found["copied"] = Path(found["copy"]).is_dir()
    generator.generate(prompts(), 2, SAMPLED)
    found["left_as_it_was"] = [
        torch.equal(torch.get_rng_state(), random_state),
        (os.environ.get("LOCAL_WORLD_SIZE"), torch.get_num_threads(), torch.set_num_threads) == before,
    ]
    base, peft = Reference(folder / "qwen3", None), Reference(folder / "qwen3", folder / "qwen3_adapter")
    found["base_error"] = worst(base, generator.generate(prompts(), 1, GREEDY))

    refitter = Refitter(policy, generator, "adapter", prompts=prompts(), max_length=256)
    found["measured"] = refitter.measure_base(has_adapter=True)
    report = refitter.refit(0)
    found["report"] = [report.seconds, report.bytes, report.version, report.probe_error, report.mode]
    found["probe_length"], found["block_size"] = min(map(len, refitter.probe)), generator.block_size
    greedy, sampled = generator.generate(prompts(), 2, GREEDY), generator.generate(prompts(), 3, SAMPLED)
    found["order"] = [sample.prompt_index for sample in sampled]
    found["prompt_ids_kept"] = all(s.prompt_ids == prompts()[s.prompt_index] for s in sampled)
    found["greedy_error"], found["sampled_error"] = worst(peft, greedy), worst(peft, sampled)
    found["greedy_is_argmax"] = all(
        s.completion_ids == peft.logits(s.prompt_ids + s.completion_ids)[len(s.prompt_ids) - 1 : -1].argmax(-1).tolist()
        for s in greedy
    )
    found["distinct_answers"] = len({tuple(ids) for ids in tokens(sampled)})
    found["against_base"] = worst(base, sampled)
    scores = policy.score([as_row(s.prompt_ids + s.completion_ids) for s in sampled])
    found["rollout_logprob_error"] = rollout_logprob_error(scores, sampled)
    found["versions"] = sorted({sample.adapter_version for sample in sampled})
    found["repeatable"] = tokens(generator.generate(prompts(), 3, SAMPLED)) == tokens(sampled)
    check_options(generator, peft, found)
    check_cut(generator, policy, found)
    check_refits(folder, policy, generator, refitter, found)
    found["sampled_tokens"] = tokens(sampled)
    generator.close()
    return policy


def check_options(generator: VllmGenerator, peft: Reference, found: dict[str, Any]) -> None:
    top_k = SamplingOptions(max_new_tokens=12, temperature=1.0, top_k=4, seed=1)
    top_p = SamplingOptions(max_new_tokens=12, temperature=1.0, top_p=0.6, seed=1)
    found["top_k_error"] = worst(peft, generator.generate(prompts(), 2, top_k), top_k=4)
    found["top_p_error"] = worst(peft, generator.generate(prompts(), 2, top_p), top_p=0.6)
    plain = generator.generate(prompts()[:1], 1, GREEDY)[0]
    stop = plain.completion_ids[4]
    first = plain.completion_ids.index(stop)
    options = SamplingOptions(max_new_tokens=12, temperature=0.0, stop_token_ids=(stop,))
    stopped = generator.generate(prompts()[:1], 1, options)[0]
    found["stop_token"] = [stopped.completion_ids == plain.completion_ids[: first + 1], stopped.finish_reason]
    options = SamplingOptions(max_new_tokens=12, temperature=0.0, stop_strings=(f"w{stop}",))
    stopped = generator.generate(prompts()[:1], 1, options)[0]
    found["stop_string"] = [f"w{stop}" in stopped.text, len(stopped.completion_ids) < 12, stopped.finish_reason]
    found["length"] = [len(plain.completion_ids), plain.finish_reason]
    found["text"] = plain.text == " ".join(f"w{token}" for token in plain.completion_ids)
    found["long_prompt"] = message(generator.generate, [[5] * 256], 1, GREEDY)


def check_cut(generator: VllmGenerator, policy: MegatronPolicy, found: dict[str, Any]) -> None:
    """The trainer's log-probabilities of what vLLM drew with its tail cut off."""
    for name, cut in CUTS.items():
        samples = generator.generate(prompts(), 3, SamplingOptions(max_new_tokens=12, seed=1, **cut))  # type: ignore[arg-type]
        with policy.sampling(**cut):  # type: ignore[arg-type]
            scores = policy.score([as_row(s.prompt_ids + s.completion_ids) for s in samples])
        pairs = zip(scores, samples, strict=True)
        found[f"trainer_error_{name}"] = max(
            float((a[-b.logprobs.numel() :] - b.logprobs).abs().max()) for a, b in pairs
        )


def check_refits(
    folder: Path, policy: MegatronPolicy, generator: VllmGenerator, refitter: Refitter, found: dict[str, Any]
) -> None:
    """The engine follows the trainer, and whatever keeps it from doing so is found out."""
    before = policy.adapter(), dict(policy.hf_weights())
    train_once(policy)
    found["skipped_refit"] = message(refitter.check, 0)
    found["forgotten_version"] = message(refitter.check, 1)

    # The stale cache: the swap alone, without resetting the prefix cache and under the same name.
    forget, generator._forget_cache = generator._forget_cache, lambda: None  # type: ignore[method-assign]
    found["stale_cache"] = message(refitter.refit, 0)
    generator._forget_cache = forget  # type: ignore[method-assign]

    refitter.refit(1)
    with engine_ignoring_its_adapter():
        found["not_applied"] = message(refitter.refit, 1)
    with head_without_its_delta():
        found["head_not_applied"] = message(refitter.refit, 1)
    check_planted(folder, policy, generator, refitter, before, found)
    folder_now = folder / "adapter_now"
    adapter = policy.adapter()
    if dist.get_rank() == 0:
        write_adapter(adapter, folder_now)
    dist.barrier()
    trained = Reference(folder / "qwen3", folder_now)
    by_adapter = generator.generate(prompts(), 2, SAMPLED)
    found["after_training"] = worst(trained, by_adapter)
    found["version_after_training"] = by_adapter[0].adapter_version

    # A weight that changed under way, on one rank.
    def damage(worker: Any) -> None:
        layer = worker.model_runner.lora_manager._adapter_manager.modules["model.layers.2.self_attn.o_proj"]
        if dist.get_rank() == 1:
            layer.lora_a_stacked[0][0, 0, 0, 0] += 1e-3

    swap = generator._worker

    def damaging(function: Any, *arguments: Any) -> Any:
        result = swap(function, *arguments)
        if function.__name__ == "swap_adapter":
            swap(damage)
        return result

    generator._worker = damaging  # type: ignore[method-assign]
    found["damaged"] = message(refitter.refit, 2)
    generator._worker = swap  # type: ignore[method-assign]

    handover = generator.load_weights(trained.merged_weights().items(), 3)
    merged = generator.generate(prompts(), 2, SAMPLED)
    found["merge_fingerprint"] = [handover.fingerprint, generator.held_fingerprint()]
    found["merge_equals_adapter"] = tokens(merged) == tokens(by_adapter)
    found["merge_error"] = worst(Reference(folder / "qwen3", folder_now), merged)
    found["merge_bytes"] = handover.num_bytes
    refitter.mode = "merge"
    found["probe_of_merged"] = refitter.check(3)
    generator.load_weights(Reference(folder / "qwen3", folder / "qwen3_adapter").merged_weights().items(), 4)
    found["merge_of_other"] = message(refitter.check, 4)

    uneven = read_adapter(folder / "uneven_adapter")
    handover = generator.load_adapter(uneven, 5)
    found["uneven_fingerprint"] = [handover.fingerprint, generator.held_fingerprint()]
    reference = Reference(folder / "qwen3", folder / "uneven_adapter")
    found["uneven_error"] = worst(reference, generator.generate(prompts(), 2, SAMPLED))
    foreign = {name.replace("q_proj", "w_proj"): tensor for name, tensor in uneven.tensors.items()}
    found["unknown_linear"] = message(generator.load_adapter, AdapterTensors(uneven.config, foreign), 6)


def check_planted(
    folder: Path,
    policy: MegatronPolicy,
    generator: VllmGenerator,
    refitter: Refitter,
    before: tuple[AdapterTensors, dict[str, Tensor]],
    found: dict[str, Any],
) -> None:
    """Each fault, handed over in both ways; at the end the engine holds the trainer's weights again."""
    load_adapter, hf_weights = generator.load_adapter, policy.hf_weights
    merged, base = dict(hf_weights()), Reference(folder / "qwen3", None).model.state_dict()
    found["planted"] = {"adapter": {}, "merge": {}}
    for fault in FAULTS:
        generator.load_adapter = lambda now, version, fault=fault: load_adapter(  # type: ignore[method-assign]
            plant(fault, now, before[0]), version
        )
        found["planted"]["adapter"][fault] = message(refitter.refit, 1)
    generator.load_adapter = load_adapter  # type: ignore[method-assign]
    refitter.mode = "merge"
    for fault in FAULTS:
        wrong = plant_merged(fault, merged, before[1], base)
        policy.hf_weights = lambda merged=True, wrong=wrong: (  # type: ignore[method-assign]
            iter(wrong.items()) if merged else hf_weights(merged=False)
        )
        found["planted"]["merge"][fault] = message(refitter.refit, 1)
    policy.hf_weights = hf_weights  # type: ignore[method-assign]
    refitter.refit(1)
    with torch.no_grad():
        policy.adapted[0].lora_B[0, 0] += 1e-4
    found["tiny_update_not_merged"] = message(refitter.check, 1)
    found["update_merged"] = refitter.refit(1).probe_error
    refitter.mode = "adapter"
    refitter.refit(1)
    # An update far below what any probe could see.
    with torch.no_grad():
        policy.adapted[0].lora_B[0, 0] += 1e-6
    found["tiny_update_skipped"] = message(refitter.check, 1)
    found["tiny_update"] = refitter.refit(1).probe_error


@contextmanager
def engine_ignoring_its_adapter() -> Iterator[None]:
    """It holds the adapter and answers without it."""
    request, vllm_engine.adapter_request = vllm_engine.adapter_request, lambda version: None
    try:
        yield
    finally:
        vllm_engine.adapter_request = request


@contextmanager
def head_without_its_delta() -> Iterator[None]:
    from vllm.lora.layers import LogitsProcessorWithLoRA as Head

    whole = Head._get_logits

    def without(head: Any, states: Tensor, lm_head: Any, embedding_bias: Tensor | None = None) -> Any:
        kept, head.lora_b_stacked = head.lora_b_stacked, torch.zeros_like(head.lora_b_stacked)
        try:
            return whole(head, states, lm_head, embedding_bias)
        finally:
            head.lora_b_stacked = kept

    Head._get_logits = without  # type: ignore[method-assign]
    try:
        yield
    finally:
        Head._get_logits = whole  # type: ignore[method-assign]


def check_replicas(folder: Path, policy: MegatronPolicy, found: dict[str, Any]) -> None:
    """The same policy beside two engines of one rank each, which share the prompts out."""
    config = policy_config(folder, "qwen3", vllm_tp=1, tensor_model_parallel_size=2)
    generator = VllmGenerator(config, policy.world, None, policy.adapter())
    generator.start()
    generator.load_adapter(read_adapter(folder / "qwen3_adapter"), 0)
    samples = generator.generate(prompts(), 3, SAMPLED)
    everyone: list[Any] = [None] * 2
    dist.all_gather_object(everyone, tokens(samples))
    found["replicas_tokens"] = tokens(samples)
    found["replicas_agree"] = everyone[0] == everyone[1]
    one = generator.generate(prompts()[:1], 1, SAMPLED)
    found["fewer_prompts_than_replicas"] = [len(one), one[0].prompt_index]

    # One replica that missed the refit.
    adapter = policy.adapter()
    if dist.get_rank() == 0:
        generator.load_adapter(adapter, 1)
    found["replicas_differ"] = message(generator.held_fingerprint)
    generator.close()


def check_llama(folder: Path, found: dict[str, Any]) -> None:
    """Another family, the policy at DP=2; `auto`; an engine that dies."""
    config = policy_config(folder, "llama3", vllm_tp=1)
    config.generation.stop_strings = None
    world = init_megatron_world(config, 0)
    policy = MegatronPolicy(config, world, pad_token_id=0, seed=0, num_steps=10)
    generator = VllmGenerator(config, world, None, policy.adapter())
    generator.start()
    said: list[str] = []
    refitter = choose_refitter(
        policy,
        generator,
        "auto",
        prompts=prompts(),
        max_length=256,
        tokens_per_step=1000,
        say=said.append,
    )
    found["auto"] = [refitter.mode, said]
    peft = Reference(folder / "llama3", folder / "llama3_adapter")
    found["llama_error"] = worst(peft, generator.generate(prompts(), 2, SAMPLED))
    train_once(policy)
    found["llama_probe_error"] = refitter.refit(1).probe_error
    refitter.mode = "merge"
    report = refitter.refit(2)
    found["llama_merge"] = [report.probe_error, report.bytes]

    def break_engine(worker: Any) -> None:
        def fail(*arguments: Any, **named: Any) -> Any:
            raise MemoryError("no memory left for the engine")

        worker.model_runner.execute_model = fail

    generator._worker(break_engine)
    found["dead_engine"] = message(generator.generate, prompts(), 1, SAMPLED)
    found["dead_engine_again"] = message(refitter.refit, 3)


def check_real_model(folder: Path, found: dict[str, Any]) -> None:
    """SmolLM2 with word problems: a step at PP=2, exported; what two engines draw with it, under stock peft."""
    base = cached_model()
    config = policy_config(base.parent, base.name, vllm_tp=1, pipeline_model_parallel_size=2)
    config.generation.stop_strings = None
    config.megatron_cfg.peft.init_adapter = str(folder / "real_adapter")
    if dist.get_rank() == 0:
        save_adapter(base, folder / "real_adapter", std=0.01)
    dist.barrier()
    world = init_megatron_world(config, 0)
    policy = MegatronPolicy(config, world, pad_token_id=0, seed=0, num_steps=10)
    policy.train_step([[row] for row in real_text.text_rows(2)], SFTObjective())
    adapter = policy.adapter()
    if dist.get_rank() == 0:
        write_adapter(adapter, folder / "real_trained")
    dist.barrier()
    generator = VllmGenerator(config, world, real_text.tokenizer(), adapter)
    generator.start()
    generator.load_adapter(adapter, 1)
    samples = generator.generate(real_text.prompts(2), 2, SAMPLED)
    found["real_text"] = [sample.text for sample in samples]
    found["real_error"] = worst(Reference(base, folder / "real_trained"), samples)
    found["real_against_start"] = worst(Reference(base, folder / "real_adapter"), samples)
    scores = policy.score([as_row(s.prompt_ids + s.completion_ids) for s in samples])
    found["real_trainer_error"] = rollout_logprob_error(scores, samples)
    generator.close()


def main(folder: Path) -> None:
    faulthandler.dump_traceback_later(540, exit=True)
    world = init_distributed()
    if world.is_main:
        build(folder)
    dist.barrier()
    found: dict[str, Any] = {}
    with released_copies():
        policy = check_tensor_parallel(folder, found)
    dist.barrier()
    found["copy_is_gone"] = not Path(found["copy"]).exists()
    check_replicas(folder, policy, found)
    check_real_model(folder, found)
    check_llama(folder, found)
    (folder / f"found_{world.rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
