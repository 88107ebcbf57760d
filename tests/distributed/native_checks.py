"""What a worker can be asked about answers of a Megatron policy's own model."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from megatron_lora.data.batch import Row
from megatron_lora.errors import UserError
from megatron_lora.objectives.sft import SFTObjective
from megatron_lora.policy.lanes import LaneStep, whole_reads
from megatron_lora.policy.megatron.lanes import MegatronLanes
from megatron_lora.rollout.generator import RolloutError, Sample, SamplingOptions
from megatron_lora.rollout.native import NativeGenerator
from tests.distributed.megatron_build import build_policy

LENGTHS = (1, 5, 17, 2, 30)


def prompts(vocab_size: int = 101) -> list[list[int]]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(3, vocab_size, (length,), generator=generator).tolist() for length in LENGTHS]


def tokenizer(vocab_size: int = 101) -> Any:
    """A real tokenizer whose token n reads `<n>`; text spans tokens without gaps."""
    inner = Tokenizer(models.WordLevel({f"<{index}>": index for index in range(vocab_size)}, unk_token="<0>"))
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=inner)


def rows_of(samples: list[Sample]) -> list[Row]:
    ids = [torch.tensor(sample.prompt_ids + sample.completion_ids) for sample in samples]
    masks = [torch.arange(len(row)) >= len(sample.prompt_ids) for row, sample in zip(ids, samples, strict=True)]
    return [Row(input_ids=row, target_mask=mask) for row, mask in zip(ids, masks, strict=True)]


def plain(samples: list[Sample]) -> list[dict[str, Any]]:
    return [vars(sample) for sample in samples]


def state_of(policy: Any) -> dict[str, Any]:
    """All that generation must leave as it was."""
    return {
        "modes": [module.training for chunk in policy.chunks for module in chunk.modules()],
        "modules": [name for chunk in policy.chunks for name, _ in chunk.named_modules()],
        "replaced": [name for chunk in policy.chunks for name, m in chunk.named_modules() if "forward" in vars(m)],
        "variable": policy.engine.config.variable_seq_lengths,
        "grad": torch.is_grad_enabled(),
        "random": torch.get_rng_state().tolist(),
    }


@contextmanager
def counted_prompt_tokens() -> Iterator[list[int]]:
    """Prompt tokens that go through the model meanwhile, a number a step."""
    counts: list[int] = []
    whole = MegatronLanes.next_token_logits

    def counting(self: MegatronLanes, steps: Sequence[LaneStep]) -> list[torch.Tensor]:
        counts.append(sum(sum(step.lengths) for step in steps if not step.decoding))
        return whole(self, steps)

    with mock.patch.object(MegatronLanes, whole.__name__, counting):
        yield counts


def cache_bytes(generator: Any, prompt: list[int]) -> tuple[int, int]:
    """(what the caches of two rows a lane hold, what was expected of them)."""
    with generator._lanes(2, 42) as model:
        ids = torch.tensor(prompt + [0] * (model.padded(len(prompt)) - len(prompt)))
        step = LaneStep(0, ids, torch.arange(len(ids)), 0, [len(prompt)], whole_reads(len(prompt)), decoding=False)
        model.next_token_logits([replace(step, lane=lane) for lane in range(model.num_lanes)])
        caches = [tensor for layer in model.session.layers for lane in layer.lanes.values() for tensor in lane]
        return sum(tensor.nbytes for tensor in caches), 2 * model.num_lanes * generator.policy.row_bytes(42)


def answers(case: dict[str, Any]) -> dict[str, Any]:
    """Drawn in every way. options: `burst`: tokens drawn at once; `stops`, `trains`, `refuses`: what else is done."""
    options = case["options"]
    policy = build_policy(case)
    generator = NativeGenerator(policy, tokenizer())
    generator.burst = options.get("burst", generator.burst)
    generator.start()
    handover = generator.load_adapter(policy.adapter(), 3)
    before = state_of(policy)
    greedy = generator.generate(prompts(), 1, SamplingOptions(max_new_tokens=12, temperature=0.0))
    with counted_prompt_tokens() as read:
        sampled = generator.generate(prompts(), 3, SamplingOptions(max_new_tokens=12, temperature=0.7, seed=5))
    after = state_of(policy)
    with policy.sampling(0.7):
        trainer = policy.score(rows_of(sampled))
    cut = SamplingOptions(max_new_tokens=12, temperature=1.4, top_k=20, top_p=0.7, seed=5)
    cut_samples = generator.generate(prompts(), 2, cut)
    with policy.sampling(1.4, top_k=20, top_p=0.7):
        cut_trainer = policy.score(rows_of(cut_samples))
    result = {
        "greedy": plain(greedy),
        "sampled": plain(sampled),
        "trainer": trainer,
        "cut": plain(cut_samples),
        "cut_trainer": cut_trainer,
        "fingerprints": [handover.fingerprint, generator.held_fingerprint()],
        "state_kept": before == after,
        "replicas": generator.num_replicas,
        "cache_bytes": cache_bytes(generator, prompts()[-1]),
        "prompt_tokens": sum(read),
    }
    if options.get("stops"):
        result["stopped"] = plain(generator.generate(prompts(), 1, stop_options(greedy)))
        with policy.adapters_disabled():
            result["base"] = plain(
                generator.generate(prompts(), 1, SamplingOptions(max_new_tokens=12, temperature=0.0))
            )
        merged = generator.load_weights(policy.hf_weights(), 4)
        result["merged"] = [merged.num_bytes, merged.fingerprint, generator.held_fingerprint(), generator.version]
    if options.get("refuses"):
        result["refused"] = refusals(policy, generator)
    if options.get("trains"):
        stale = policy.adapter()
        policy.train_step([[row] for row in rows_of(sampled)[:4]], SFTObjective())
        result["stale"] = [generator.load_adapter(stale, 4).fingerprint, generator.held_fingerprint()]
        result["trained"] = plain(generator.generate(prompts(), 2, SamplingOptions(max_new_tokens=12, seed=6)))
        result["trained_trainer"] = policy.score(rows_of(generator_samples(result["trained"])))
        for linear in policy.adapted:
            linear.lora_B.data.fill_(float("nan"))
        result["diverged"] = message(RolloutError, lambda: generator.generate(prompts(), 1, SamplingOptions(4)))
    return result


def refusals(policy: Any, generator: Any) -> dict[str, str]:
    options = SamplingOptions(max_new_tokens=4)
    silent = NativeGenerator(policy, None)
    messages = {
        "empty": message(UserError, lambda: generator.generate([[5], []], 1, options)),
        "long": message(UserError, lambda: generator.generate([[5] * 64], 1, options)),
        "tokenizer": message(ValueError, lambda: silent.generate([[5]], 1, replace(options, stop_strings=("x",)))),
        "backend": message(UserError, lambda: NativeGenerator(object(), None)),  # type: ignore[arg-type]
    }
    policy.config.megatron_cfg.expert_model_parallel_size = 2
    messages["experts"] = message(UserError, lambda: NativeGenerator(policy, None))
    # The last place of the sequence is still an answer's.
    messages["fits"] = str(len(generator.generate([[5] * 63], 1, options)[0].completion_ids))
    messages["none"] = str(generator.generate([], 1, options) + generator.generate([[5]], 0, options))
    return messages


def message(kind: type[Exception], call: Callable[[], Any]) -> str:
    try:
        call()
    except kind as error:
        return str(error)
    return "not refused"


def generator_samples(values: list[dict[str, Any]]) -> list[Sample]:
    return [Sample(**value) for value in values]


def stop_options(greedy: list[Sample]) -> SamplingOptions:
    """A stop string across the border of two greedy tokens of prompt 2, and a stop token of prompt 4."""
    first, second = greedy[2].completion_ids[4:6]
    return SamplingOptions(
        max_new_tokens=12,
        temperature=0.0,
        stop_strings=(f"{str(first)[-1]}><{str(second)[0]}",),
        stop_token_ids=(greedy[4].completion_ids[6],),
    )


CHECKS = {"answers": answers}
