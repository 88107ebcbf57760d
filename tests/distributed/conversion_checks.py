"""A worker's check: checkpoints of whole models and of adapters, from and on every layout of two ranks."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from megatron_lora.config.schema import PolicyConfig
from megatron_lora.lora.peft_format import to_hf
from megatron_lora.policy.megatron import checkpoint
from megatron_lora.policy.megatron.adapter_gather import gather_adapter
from megatron_lora.policy.megatron.model import build_base
from megatron_lora.policy.megatron.policy import MegatronPolicy
from megatron_lora.runtime.world import World, init_megatron_world
from tests.distributed.conversion_cases import ADAPTED, LAYOUTS, WHOLE, build, folder_of, model_of
from tests.distributed.megatron_build import forget_kernels, leave_groups


def config_of(folder: Path, case: str, layout: str, **peft: Any) -> PolicyConfig:
    peft["type"] = "dora" if case.endswith("_dora") else "lora"
    return PolicyConfig.model_validate(
        {
            "model_name": str(folder / model_of(case)),
            "precision": "float32",
            "max_total_sequence_length": 64,
            "train_global_batch_size": 4,
            "megatron_cfg": {"enabled": True, "peft": peft} | LAYOUTS[layout],
        }
    )


def start_world(config: PolicyConfig) -> World:
    forget_kernels()
    leave_groups()
    return init_megatron_world(config, 0)


def whole_models(folder: Path, layout: str) -> dict[str, Any]:
    """Save each base, as megatron-bridge brought it in; then load the converter's checkpoint into the same model."""
    found: dict[str, Any] = {}
    for family in WHOLE:
        config = config_of(folder, family, layout, enabled=False)
        world = start_world(config)
        base = build_base(config, world)
        checkpoint.save_state(checkpoint.model_state(base.chunks), folder / f"whole_{family}_{layout}/policy/weights")
        dist.barrier()
        expected = [{n: p.detach().clone() for n, p in chunk.named_parameters()} for chunk in base.chunks]
        with torch.no_grad():
            for chunk in base.chunks:
                for parameter in chunk.parameters():
                    parameter.fill_(7.0)
        state = checkpoint.model_state(base.chunks)
        state = checkpoint.load_weights(state, folder / f"converted_{family}/policy/weights")
        for chunk in base.chunks:
            chunk.load_state_dict({k: v for k, v in state.items() if k in chunk.state_dict()}, strict=False)
        different = [
            name
            for chunk, values in zip(base.chunks, expected, strict=True)
            for name, parameter in chunk.named_parameters()
            if not same(parameter.detach(), values[name], base.shapes.vocab_size, world.tp_rank)
        ]
        found[f"load_{family}_{layout}"] = different
    return found


def same(loaded: torch.Tensor, expected: torch.Tensor, vocab_size: int, tp_rank: int) -> bool:
    """Bit for bit; vocabulary padding (the last rank's last row) may be anything."""
    if loaded.shape[0] == (vocab_size + 1) // 2 and tp_rank == 1:
        loaded, expected = loaded[:-1], expected[:-1]
    return torch.equal(loaded, expected)


def save_adapters(folder: Path, layout: str) -> None:
    """A policy from the HF adapter: its checkpoint, and its merged weights as rank 1 (not the main one) got them."""
    for case in ADAPTED:
        config = config_of(folder, case, layout, enabled=True, init_adapter=str(folder / f"{case}_adapter"))
        world = start_world(config)
        policy = MegatronPolicy(config, world, pad_token_id=0, seed=0, num_steps=1)
        policy.save(folder / f"adapter_{case}_{layout}/policy/weights", None)
        weights = {name: tensor.clone() for name, tensor in policy.hf_weights()}
        if world.rank == 1:
            save_file(weights, folder / f"live_{case}_{layout}.safetensors")


def load_adapters(folder: Path, layout: str) -> dict[str, Any]:
    """A policy whose factors are all 3, then every layout's checkpoint into it."""
    found: dict[str, Any] = {}
    for case in ADAPTED:
        config = config_of(folder, case, layout, enabled=True, init_adapter=str(folder / f"{case}_adapter"))
        policy = MegatronPolicy(config, start_world(config), pad_token_id=0, seed=0, num_steps=1)
        assert policy.spec is not None
        wanted = policy.adapter().tensors
        for source in LAYOUTS:
            with torch.no_grad():
                for linear in policy.adapted:
                    for held in linear.held_factors:
                        held.parameter.fill_(3.0)
            policy.load(folder / f"adapter_{case}_{source}/policy/weights", None)
            got = to_hf(policy.spec, gather_adapter(policy.adapted, policy.spec))[1]
            different = [name for name, tensor in wanted.items() if not torch.equal(tensor, got[name])]
            found[f"{case}_{source}_{layout}"] = different
    return found


def conversion(case: dict[str, Any]) -> dict[str, Any]:
    """What differs from what it should be, by what was loaded, empty where nothing does. Bases, adapters and
    checkpoints are left in `folder_of(case["shared_folder"])`."""
    folder = folder_of(case["shared_folder"])
    if dist.get_rank() == 0:
        build(folder)
    dist.barrier()
    found: dict[str, Any] = {}
    for layout in LAYOUTS:
        if layout != "dp":
            found |= whole_models(folder, layout)
        save_adapters(folder, layout)
    for layout in LAYOUTS:
        found |= load_adapters(folder, layout)
    return found


CHECKS = {"conversion": conversion}
