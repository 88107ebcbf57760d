"""What of the vLLM rollouts needs no process group, and one engine in a process without torchrun."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from megatron_lora.config.schema import PolicyConfig
from megatron_lora.config.schema_generation import GenerationConfig
from megatron_lora.errors import UserError
from megatron_lora.policy.checksums import DifferentCopies, checksum, digest, join_ranks, to_numbers
from megatron_lora.rollout.generator import Sample, SamplingOptions, rollout_logprob_error
from megatron_lora.rollout.refit import PROBE_CONTINUATION, PROBE_LONGEST, PROBE_PROMPTS, probe_contexts
from megatron_lora.rollout.vllm_engine import (
    check_installed,
    check_request,
    engine_arguments,
    engine_size,
    hands_over_adapter,
)
from megatron_lora.runtime.world import World
from tests.support.models import save_model

CPU = torch.device("cpu")
BF16_TOLERANCE = 0.1  # nats, mean over the tokens of random text


def policy(name: str | Path = "org/model", **generation: Any) -> PolicyConfig:
    lora = {"lora_cfg": {"enabled": True}}
    return PolicyConfig.model_validate({"model_name": str(name), "dtensor_cfg": lora, "generation": generation})


def world(size: int, device: torch.device = CPU) -> World:
    return World(rank=0, size=size, local_rank=0, device=device)


def model(**changes: Any) -> Any:
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
    return AutoConfig.for_model("qwen3", **sizes | changes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shards_checksums_add_up_to_the_wholes(dtype: torch.dtype) -> None:
    whole = torch.randn(12, 10).to(dtype)
    rows = [{("w", first, 0): checksum(whole[first : first + 4], first, 0)} for first in (0, 4, 8)]
    columns = [{("w", 0, first): checksum(whole[:, first : first + 5], 0, first)} for first in (0, 5)]
    total = join_ranks([to_numbers({("w", 0, 0): checksum(whole)})])
    assert join_ranks([to_numbers(part) for part in rows]) == total
    assert join_ranks([to_numbers(part) for part in columns]) == total
    assert join_ranks([to_numbers(rows[0]), to_numbers(rows[0]), to_numbers(rows[1]), to_numbers(rows[2])]) == total


def test_a_checksum_sees_places_and_not_padding() -> None:
    tensor = torch.randn(6, 4)
    padded = torch.zeros(6, 8)
    padded[:, :4] = tensor
    assert checksum(padded) == checksum(tensor)
    assert checksum(tensor[[1, 0, 2, 3, 4, 5]]) != checksum(tensor)
    assert checksum(tensor[:, [0, 2, 1, 3]]) != checksum(tensor)
    assert digest("adapter", {"a": 5, "padding": 0}) == digest("adapter", {"a": 5})
    assert digest("adapter", {"a": 5}) != digest("adapter", {"b": 5})


def test_copies_that_differ_between_ranks_are_named() -> None:
    with pytest.raises(DifferentCopies, match="different copies of layer.lora_A"):
        join_ranks([{("layer.lora_A", 0, 0): 1}, {("layer.lora_A", 0, 0): 2}])


def test_missing_vllm_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="make install EXTRAS=rollout-cpu"):
        check_installed(CPU)
    with pytest.raises(UserError, match="make install EXTRAS=rollout-gpu"):
        check_installed(torch.device("cuda"))


def test_tensor_parallel_size_must_divide() -> None:
    with pytest.raises(
        UserError, match=r"tensor_parallel_size=3 does not divide the 4 processes; use one of \[1, 2, 4"
    ):
        check_request(policy(vllm_cfg={"tensor_parallel_size": 3}), world(4), model(), None)
    with pytest.raises(UserError, match="does not divide the model's 4 attention heads"):
        check_request(policy(vllm_cfg={"tensor_parallel_size": 8}), world(8), model(), None)


def test_an_engine_takes_as_few_gpus_as_its_weights_need(monkeypatch: pytest.MonkeyPatch) -> None:
    """3.6 GB of weights where vLLM may take half of the memory and weights 0.6 of that."""
    sizes: dict[str, Any] = {"hidden_size": 1536, "num_hidden_layers": 28, "vocab_size": 151936}
    qwen = model(**sizes, intermediate_size=8960, num_attention_heads=12, num_key_value_heads=2, head_dim=128)
    half = policy(vllm_cfg={"gpu_memory_utilization": 0.5})
    for gigabytes, ranks, wanted in ((80, 2, 1), (12.5, 2, 1), (11, 2, 2), (4, 4, 4), (4, 8, 4), (1, 8, 4)):
        memory = SimpleNamespace(total_memory=int(gigabytes * 1e9))
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _, memory=memory: memory)
        assert engine_size(half, world(ranks, torch.device("cuda")), qwen) == wanted, (gigabytes, ranks)
    assert engine_size(policy(vllm_cfg={"tensor_parallel_size": 2}), world(4), qwen) == 2
    assert engine_size(policy(), world(4), qwen) == 1


def test_a_float32_adapter_on_a_gpu_is_refused(tmp_path: Path) -> None:
    """vLLM's kernels there assert 16-bit floats after the model has been loaded."""
    base = save_model(tmp_path, "qwen3")
    gpu = world(1, torch.device("cuda"))
    float32: dict[str, Any] = {"vllm_cfg": {"precision": "float32"}}
    with pytest.raises(UserError, match="refit=adapter, but .* take bfloat16 .*, not float32; set it to merge"):
        hands_over_adapter(policy(base, refit="adapter", **float32), gpu)
    assert not hands_over_adapter(policy(base, refit="auto", **float32), gpu)
    assert hands_over_adapter(policy(base, refit="adapter", **float32), world(1))
    assert hands_over_adapter(policy(base, refit="adapter", vllm_cfg={"precision": "bfloat16"}), gpu)


def test_an_adapter_that_vllm_cannot_serve_is_merged(tmp_path: Path) -> None:
    dora = policy(save_model(tmp_path, "qwen3"), refit="adapter")
    dora.megatron_cfg.enabled = dora.megatron_cfg.peft.enabled = True
    assert hands_over_adapter(dora, world(1))
    dora.megatron_cfg.peft.type = "dora"
    with pytest.raises(UserError, match="refit=adapter, but vLLM serves no adapters of type 'dora'; set it to merge"):
        hands_over_adapter(dora, world(1))
    dora.generation.refit = "auto"
    assert not hands_over_adapter(dora, world(1))
    dora.megatron_cfg.peft.type, dora.megatron_cfg.peft.modules_to_save = "lora", ["norm"]
    assert not hands_over_adapter(dora, world(1))
    dora.generation.refit = "adapter"
    with pytest.raises(UserError, match="refit=adapter, but vLLM serves no modules_to_save with an adapter"):
        hands_over_adapter(dora, world(1))


def test_rank_above_max_lora_rank(tmp_path: Path) -> None:
    base = save_model(tmp_path, "qwen3")
    with pytest.raises(UserError, match="rank 32 is above vLLM's max_lora_rank 16; raise policy.generation.vllm_kw"):
        check_request(policy(base, vllm_kwargs={"max_lora_rank": 16}), world(1), model(), 32)
    with pytest.raises(UserError, match="rank 600 is above vLLM's max_lora_rank 512; .*refit=merge"):
        check_request(policy(base), world(1), model(), 600)
    check_request(policy(base), world(1), model(), 24)
    assert engine_arguments(policy(base), world(1), 24, ["q_proj"], model())["max_lora_rank"] == 32


def test_head_dim_that_the_cpu_engine_lacks() -> None:
    with pytest.raises(UserError, match="its head_dim is 16, wanted one of"):
        check_request(policy(), world(1), model(head_dim=16), None)


def test_the_users_engine_arguments_win(tmp_path: Path) -> None:
    own = policy(save_model(tmp_path, "qwen3"), vllm_kwargs={"max_num_seqs": 3, "seed": 7})
    arguments = engine_arguments(own, world(1), None, [], model())
    assert (arguments["max_num_seqs"], arguments["seed"]) == (3, 7)
    assert "enable_lora" not in arguments


def test_sampling_options_from_the_recipe() -> None:
    config = GenerationConfig(temperature=0.8, top_k=None, val_temperature=0.0, val_top_k=5, stop_token_ids=[9])
    training = SamplingOptions.from_config(config, max_total_sequence_length=64, eos_token_ids=[2], seed=1)
    assert training == SamplingOptions(64, temperature=0.8, stop_token_ids=(2, 9), seed=1)
    validation = SamplingOptions.from_config(
        config, max_total_sequence_length=64, eos_token_ids=[2], seed=1, validation=True
    )
    assert (validation.temperature, validation.top_k, validation.top_p) == (0.0, 5, 1.0)


def test_the_probes_contexts_are_longer_than_a_cache_block_and_fit() -> None:
    texts = [[1] * 30, [2] * 300, [3] * 50]
    short, long, last = probe_contexts(texts, 16, 4096)[:3]
    assert (short, last) == (texts[0], texts[2])
    assert long == [2] * PROBE_LONGEST
    assert probe_contexts([[1] * 30, [2] * 80, [3] * 50], 128, 4096)[2] == [3] * 50 + [1] * 30 + [2] * 80
    assert {len(ids) for ids in probe_contexts(texts, 128, 100)} == {100 - PROBE_CONTINUATION}
    assert len(probe_contexts(texts, 16, 4096)) == PROBE_PROMPTS
    assert min(map(len, probe_contexts([[5], [6, 7]], 128, 4096))) >= 160


def test_rollout_logprob_error_is_a_mean_over_completion_tokens() -> None:
    samples = [
        Sample(0, [5, 6], [7, 8], torch.tensor([-1.0, -2.0]), "stop", "", 0),
        Sample(1, [5], [9], torch.tensor([-3.0]), "length", "", 0),
    ]
    scores = [torch.tensor([0.0, -9.0, -1.5, -2.0]), torch.tensor([0.0, -2.0])]
    assert rollout_logprob_error(scores, samples) == pytest.approx((0.5 + 0.0 + 1.0) / 3)
    with pytest.raises(ValueError, match="scored 2 tokens of a sample that has 2"):
        rollout_logprob_error(scores[1:], samples[:1])


def test_one_process_in_bfloat16(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "tests.distributed.rollout_vllm_single", str(tmp_path)],
        cwd=Path(__file__).parents[2],
        # One thread, as each of two processes would have on two cores.
        env={**os.environ, "OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": "2"},
        capture_output=True,
        text=True,
        timeout=880,
    )
    assert result.returncode == 0, result.stderr[-5000:]
    found = json.loads((tmp_path / "found.json").read_text())
    for mode in ("adapter", "merge"):
        handed, held, error = found[mode]
        assert handed == held and handed.startswith(f"{mode}:")
        assert 1e-5 < error < BF16_TOLERANCE
    # All linears and the head, rank 4 of 64 + 101, two bytes each.
    assert found["adapter_bytes"] == 35840 + 2 * 4 * (64 + 101)
    assert found["back_on_base"] < BF16_TOLERANCE
    assert found["trainers_group_alive"]
