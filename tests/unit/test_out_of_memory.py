"""Out of memory and other crashes: one message with the phase, what to lower and where the traceback is; status 1."""

from pathlib import Path

import pytest
import torch
import yaml

from megatron_lora import train
from megatron_lora.config import load_recipe
from megatron_lora.rollout.generator import RolloutError
from megatron_lora.runtime.activity import begin, hold
from megatron_lora.runtime.out_of_memory import (
    describe_out_of_memory,
    is_out_of_memory,
    micro_batch_tokens,
    remedies,
)

ROOT = Path(__file__).resolve().parents[2]
CUDA = "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.10 GiB of which 1 GiB is free."


def test_phase_tokens_what_was_held_and_what_to_lower():
    recipe = load_recipe(ROOT / "configs/sft.yaml", ["policy.sequence_packing.train_mb_tokens=8192"]).recipe
    begin("training step 7")
    hold("weights, adapters and optimizer", 3 * 2**30)
    text = describe_out_of_memory(torch.OutOfMemoryError(CUDA), recipe, 3)
    assert "rank 3 while training step 7 (2.50 GiB more were wanted)" in text
    assert "at most 8,192 tokens" in text and "weights, adapters and optimizer 3.00 GiB" in text
    assert "policy.sequence_packing.train_mb_tokens=4096 (now 8192)" in text
    assert "policy.megatron_cfg.activation_checkpointing=true" in text


@pytest.mark.parametrize("name", ["sft", "dpo", "grpo"])
@pytest.mark.parametrize("backend", ["true", "false"])
def test_every_remedy_is_an_override_that_loads_and_is_then_gone_or_smaller(name: str, backend: str):
    path, base = ROOT / f"configs/{name}.yaml", [f"policy.megatron_cfg.enabled={backend}"]
    before = remedies(load_recipe(path, base).recipe)
    assert len(before) >= 3
    for line in before:
        override = line.split(" ")[0]
        assert line not in remedies(load_recipe(path, [*base, override]).recipe)


def test_tokens_of_a_micro_batch_without_packing():
    overrides = ["policy.sequence_packing.enabled=false", "policy.train_micro_batch_size=4"]
    recipe = load_recipe(ROOT / "configs/sft.yaml", [*overrides, "policy.max_total_sequence_length=512"]).recipe
    assert micro_batch_tokens(recipe) == 2048
    assert any("policy.train_micro_batch_size=2 (now 4)" in line for line in remedies(recipe))


@pytest.mark.parametrize(
    "reason",
    [
        RuntimeError("CUDA Error: out of memory at /workspace/csrc/cumem_allocator.cpp:62"),
        torch.OutOfMemoryError(CUDA),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        ValueError(
            "Free memory on device cuda:0 (9.1/79.1 GiB) on startup is less than desired GPU memory utilization"
        ),
    ],
    ids=["vllm wakes", "torch", "cublas", "vllm starts"],
)
def test_a_rollout_engine_without_memory_has_the_same_message(reason: Exception):
    recipe = load_recipe(ROOT / "configs/grpo.yaml").recipe
    begin("handing the weights of step 80 to the engine", is_slow=True)
    try:
        try:
            raise reason
        except Exception as cause:
            raise RolloutError(f"vLLM failed to wake up on rank 0: {type(cause).__name__}: {cause}") from cause
    except RolloutError as error:
        assert is_out_of_memory(error)
        lines = describe_out_of_memory(error, recipe, 0).splitlines()
    assert lines[0].startswith("out of GPU memory on rank 0 while handing the weights of step 80 to the engine")
    assert lines[1].startswith("  vLLM failed to wake up on rank 0: ")
    first, second, last = lines[lines.index("  to lower it, most effective first:") + 1 :]
    assert first == "    policy.generation.vllm_cfg.gpu_memory_utilization=0.5 (now 0.6)"
    assert "tensor_model_parallel_size=2" in second and "checkpoint" in last  # nothing of a micro-batch was held
    assert not any("micro-batch" in line for line in lines)
    assert not is_out_of_memory(RolloutError("the refit was lost")) and is_out_of_memory(reason)


def more_than_any_machine_has() -> Exception:
    """What torch's allocator says of an exbibyte."""
    try:
        torch.empty(1 << 60, dtype=torch.uint8)
    except RuntimeError as error:
        return error
    raise AssertionError("an exbibyte was there")


@pytest.mark.parametrize("name", ["sft", "grpo"])
def test_the_machines_memory_has_the_same_message(name: str):
    recipe = load_recipe(ROOT / f"configs/{name}.yaml").recipe
    begin("loading the model")
    error = more_than_any_machine_has()
    assert is_out_of_memory(error) and not is_out_of_memory(RuntimeError("size mismatch"))
    text = describe_out_of_memory(error, recipe, 0)
    assert "out of the machine's memory on rank 0 while loading the model (1,073,741,824.00 GiB more were" in text
    assert "  held: this rank " in text and "to lower it, most effective first:" in text


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError(CUDA), more_than_any_machine_has(), RuntimeError("broken\nsecond line")],
    ids=["oom", "cpu", "bug"],
)
def test_a_crash_is_one_message_and_its_traceback_is_in_the_log(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    def run_recipe(loaded: object) -> int:
        begin("training step 2")
        raise error

    monkeypatch.setattr("megatron_lora.trainers.run.run_recipe", run_recipe)
    recipe = {"sft": {}, "policy": {"model_name": "m"}, "data": {"train": {"data_path": "x"}}}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    status = train.main([str(tmp_path / "r.yaml"), f"checkpointing.checkpoint_dir={tmp_path / 'run'}"])
    said = capfd.readouterr().err
    assert status == 1 and said.startswith("error: ") and said.count("error: ") == 1 and "Traceback" not in said
    assert "while training step 2" in said and str(tmp_path / "run/log.txt") in said
    log = (tmp_path / "run/log.txt").read_text()
    assert "Traceback" in log and type(error).__name__ in log
