"""One process without torchrun, in bfloat16: what test_rollout_vllm_parts.py asserts."""

import json
import sys
from pathlib import Path
from typing import Any

import torch

from megatron_lora.rollout.generator import SamplingOptions
from megatron_lora.rollout.vllm import VllmGenerator
from megatron_lora.runtime.cpu import install_cpu_stand_ins
from megatron_lora.runtime.world import init_distributed
from tests.distributed.rollout_models import Reference, build, policy_config, prompts, read_adapter

OPTIONS = SamplingOptions(max_new_tokens=12, temperature=1.0, seed=3)


def main(folder: Path) -> None:
    world = init_distributed()
    install_cpu_stand_ins()
    build(folder)
    config = policy_config(folder, "qwen3", vllm_tp=1, precision="bfloat16")
    config.generation.stop_strings = None
    adapter = read_adapter(folder / "qwen3_adapter")
    generator = VllmGenerator(config, world, None, adapter)
    generator.start()
    found: dict[str, Any] = {}
    peft = Reference(folder / "qwen3", folder / "qwen3_adapter")
    handover = generator.load_adapter(adapter, 0)
    found["adapter"] = [handover.fingerprint, generator.held_fingerprint(), mean_error(peft, generator)]
    found["adapter_bytes"] = handover.num_bytes
    handover = generator.load_weights(peft.merged_weights().items(), 1)
    found["merge"] = [handover.fingerprint, generator.held_fingerprint(), mean_error(peft, generator)]
    # Back on the base: its weights come from the model folder again.
    base = Reference(folder / "qwen3", None)
    nothing = {name: torch.zeros_like(tensor) for name, tensor in adapter.tensors.items()}
    generator.load_adapter(type(adapter)(adapter.config, nothing), 2)
    found["back_on_base"] = mean_error(base, generator)
    generator.close()
    found["trainers_group_alive"] = torch.distributed.is_initialized()
    (folder / "found.json").write_text(json.dumps(found))


def mean_error(reference: Reference, generator: VllmGenerator) -> float:
    samples = generator.generate(prompts(), 2, OPTIONS)
    errors = [(reference.completion_logps(s.prompt_ids, s.completion_ids) - s.logprobs).abs() for s in samples]
    return float(torch.cat(errors).mean())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
