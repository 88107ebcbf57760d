"""One process: a trainer over 4-bit bases, and vLLM refitted from it. What test_rollout_four_bit.py asserts."""

import json
import sys
from pathlib import Path
from typing import Any

from megatron_lora.config.schema import PolicyConfig
from megatron_lora.objectives.sft import SFTObjective
from megatron_lora.policy.megatron.policy import MegatronPolicy
from megatron_lora.rollout.generator import RolloutError
from megatron_lora.rollout.refit import Refitter, choose_refitter
from megatron_lora.rollout.vllm import VllmGenerator
from megatron_lora.runtime.world import World, init_megatron_world
from tests.distributed.rollout_models import prompts
from tests.support.four_bit import save_four_bit
from tests.support.models import save_model
from tests.support.reference import make_rows, save_adapter

LENGTH = 256


def config_of(base: Path, adapter: Path, quantization: str | None) -> PolicyConfig:
    peft = {"enabled": True, "init_adapter": str(adapter), "quantization": quantization, "lora_dtype": "float32"}
    return PolicyConfig.model_validate(
        {
            "model_name": str(base),
            "precision": "float32",
            "max_total_sequence_length": LENGTH,
            "train_global_batch_size": 4,
            "megatron_cfg": {"enabled": True, "peft": peft, "optimizer": {"lr": 1e-2}},
            "generation": {"vllm_cfg": {"tensor_parallel_size": 1}},
        }
    )


def refits(config: PolicyConfig, world: World) -> dict[str, Any]:
    """The probe's error after refits in both modes, before and after a training step; what is said where the engine
    keeps the folder's own base."""
    policy = MegatronPolicy(config, world, pad_token_id=0, seed=0, num_steps=10)
    generator = VllmGenerator(config, world, None, policy.adapter())
    generator.start()
    found: dict[str, Any] = {"errors": {}, "without_base": ""}
    refitter = Refitter(policy, generator, "adapter", prompts=prompts(), max_length=LENGTH)
    generator.base_weights = None
    try:
        refitter.measure_base(has_adapter=True)
    except RolloutError as error:
        found["without_base"] = str(error)
    for mode in ("adapter", "merge", "adapter"):
        refitter = choose_refitter(
            policy, generator, mode, prompts=prompts(), max_length=LENGTH, tokens_per_step=100, say=lambda _: None
        )
        errors = [refitter.reports[-1].probe_error]
        policy.train_step([[row] for row in make_rows(4, 101, seed=1)], SFTObjective())
        errors.append(refitter.refit(1).probe_error)
        found["errors"].setdefault(mode, []).extend(errors)
    generator.close()
    return found


def main(folder: Path) -> None:
    base = save_model(folder / "base", "qwen3_even")
    stored = save_four_bit(base, folder / "stored", double=True)
    adapter = save_adapter(base, folder / "adapter")
    configs = {"dense": config_of(base, adapter, "nf4"), "stored": config_of(stored, adapter, None)}
    world = init_megatron_world(configs["dense"], 0)
    (folder / "found.json").write_text(json.dumps({name: refits(config, world) for name, config in configs.items()}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
