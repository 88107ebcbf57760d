"""On real GPUs: Transformer Engine's layers, its attention over packed rows, its Adam, NCCL; against transformers +
peft. All single-GPU cases run in one process, all two-GPU cases in one group, since starting costs most of the time."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.gpu.launch import ROOT, result, run_cases, worst_difference

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]

FP32, BF16 = 1e-3, 1e-2
# Rounding sends tokens to other experts.
BF16_EXPERTS = 3e-2
ONE_GPU = {
    "train.llama2.float32.one": FP32,
    "train.qwen2.float32.one": FP32,
    "train.qwen2.float32.recompute": FP32,
    "train.llama2.bfloat16.one": BF16,
    "train.qwen2.bfloat16.one": BF16,
    "train.gemma3.bfloat16.one": BF16,
    "train.gemma3.float32.one": FP32,
    "train.qwen2.bfloat16.recompute": BF16,
    "train.qwen2.bfloat16.one.full": BF16,
    "packing.qwen2.bfloat16": BF16,
    "train.qwen3_moe.float32.one": FP32,
    # Recurrent mixers in plain PyTorch, attention with sinks, experts of one tensor.
    "train.nemotron_h.float32.one": FP32,
    "train.nemotron_h.bfloat16.one": BF16_EXPERTS,
    "train.qwen3_next.float32.one": FP32,
    "train.qwen3_5.float32.one": FP32,
    "train.qwen3_5.bfloat16.one": BF16,
    "train.gpt_oss.float32.one": FP32,
    "train.gpt_oss.bfloat16.one": BF16_EXPERTS,
    "train.qwen3_moe.bfloat16.one": BF16_EXPERTS,
    "train.qwen3_moe.bfloat16.recompute": BF16_EXPERTS,
    "resume.qwen3_moe.bfloat16": 1e-3,
    # cuDNN adds up attention gradients in no fixed order.
    "resume.qwen2.bfloat16": 1e-3,
}
DTENSOR = {
    f"dtensor.qwen2.{precision}.{option}": tolerance
    for precision, tolerance in (("float32", FP32), ("bfloat16", BF16))
    for option in ("one", "plain", "compile", "offload", "recompute")
} | {"dtensor.nemotron_h.float32.one": FP32, "dtensor.qwen3_5.float32.one": FP32}
ROLLOUTS = tuple(f"rollout.qwen2.{precision}.one" for precision in ("float32", "bfloat16")) + (
    "rollout.nemotron_h.bfloat16.one",
    "rollout.qwen3_next.bfloat16.one",
)
# Mean difference of log-probabilities, nats: kernels that sum in another order.
SHARED = {
    f"shared.qwen2.{precision}.{backend}": tolerance
    for precision, tolerance in (("float32", 1e-4), ("bfloat16", 2e-2))
    for backend in ("megatron", "dtensor")
}
GRAPHS = ("graphs.qwen2.bfloat16.plain", "graphs.llama2.bfloat16.plain", "graphs.qwen2.bfloat16.shared")
INPUTS = ("inputs.qwen2.bfloat16", "inputs.llama2.bfloat16", "inputs.gemma3.bfloat16")
FP8 = ("fp8.qwen2.e4m3", "fp8.qwen2.hybrid", "fp8.llama2.e4m3")
LOGPROBS = ("logprobs.llama2.bfloat16", "logprobs.qwen2.bfloat16", "logprobs.gemma3.bfloat16")
# Without a second GPU there is nothing to run them on.
TWO_GPUS = {
    f"train.qwen2.{precision}.{layout}": tolerance
    for precision, tolerance in (("float32", FP32), ("bfloat16", BF16))
    for layout in ("tp2", "sp2", "pp2", "dp2", "cp2")
    if torch.cuda.device_count() >= 2
} | {
    f"train.qwen3_moe.{precision}.{layout}": tolerance
    for precision, tolerance in (("float32", FP32), ("bfloat16", BF16_EXPERTS))
    for layout in ("ep2", "etp2", "dp2")
    if torch.cuda.device_count() >= 2
}


DTENSOR_TWO = {
    f"dtensor.qwen2.float32.{option}": FP32
    for option in ("tp2", "sp2", "dp2", "dp2_offload", "tp2_offload")
    if torch.cuda.device_count() >= 2
}
ROLLOUTS_TWO = ("rollout.qwen2.bfloat16.tp2",) if torch.cuda.device_count() >= 2 else ()


@pytest.fixture(scope="module")
def one_gpu(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("one-gpu")
    return folder, run_cases(folder, [*ONE_GPU, *SHARED, *GRAPHS, *INPUTS, *FP8, *LOGPROBS, *DTENSOR], processes=1)


@pytest.fixture(scope="module")
def two_gpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("two-gpus")
    return folder, run_cases(folder, [*TWO_GPUS, *DTENSOR_TWO], processes=2)


@pytest.mark.parametrize("case", ONE_GPU)
def test_losses_follow_the_reference(one_gpu: tuple[Path, str], case: str) -> None:
    folder, log = one_gpu
    values = result(folder, case, log)
    assert worst_difference(values) < ONE_GPU[case], values


@pytest.mark.parametrize("case", SHARED)
def test_shared_prefixes_change_no_number(one_gpu: tuple[Path, str], case: str) -> None:
    folder, log = one_gpu
    values = result(folder, case, log)
    assert values["old_difference"] < SHARED[case], values
    assert worst_difference(values) < (FP32 if "float32" in case else 5 * BF16), values
    assert values["tokens"] < 0.6, values


@pytest.mark.parametrize("case", GRAPHS)
def test_cuda_graphs_change_no_number(one_gpu: tuple[Path, str], case: str) -> None:
    folder, log = one_gpu
    values = result(folder, case, log)
    assert values["graphs"] >= 2, values
    # cuDNN adds up attention gradients in no fixed order, and what fills up changes how they are cut.
    assert worst_difference(values) < BF16, values


@pytest.mark.parametrize("case", INPUTS)
def test_inputs_computed_again_change_no_number(one_gpu: tuple[Path, str], case: str) -> None:
    folder, log = one_gpu
    values = result(folder, case, log)
    assert worst_difference(values) < BF16, values
    assert worst_difference(values | {"ours": values["graphs"]}) < BF16, values


def test_fp8_products_are_those_of_the_rounded_numbers() -> None:
    command = [sys.executable, "-m", "tests.gpu.fp8_checks"]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert answer.returncode == 0, answer.stdout + answer.stderr


@pytest.mark.parametrize("case", FP8)
def test_training_over_fp8_follows_bfloat16_and_exports_the_base(one_gpu: tuple[Path, str], case: str) -> None:
    folder, log = one_gpu
    values = result(folder, case, log)
    assert worst_difference(values) < 3e-2, values
    assert worst_difference(values | {"reference": values["graphs"]}) < BF16, values
    # Of random weights with wide logits: 0.13 nats where a CPU multiplies the same rounded numbers.
    assert 1e-3 < values["logprob_error"] < 0.25 and values["graphs_error"] < 0.05, values
    assert values["not_the_base"] == [] and values["moved"] > 0, values


@pytest.mark.parametrize("case", LOGPROBS)
def test_logprobs_are_as_exact_as_transformers(one_gpu: tuple[Path, str], case: str) -> None:
    folder, log = one_gpu
    values = result(folder, case, log)
    assert values["ours"] < 1.5 * values["theirs"] + 1e-3, values


@pytest.mark.parametrize("case", [*DTENSOR, *DTENSOR_TWO])
def test_dtensor_backend_follows_the_reference(request: pytest.FixtureRequest, case: str) -> None:
    folder, log = request.getfixturevalue("one_gpu" if case in DTENSOR else "two_gpus")
    values = result(folder, case, log)
    assert worst_difference(values) < (DTENSOR | DTENSOR_TWO)[case], values
    assert values["adapter_difference"] < (0.02 if "float32" in case else 0.2), values
    assert values["merged"] > 0 and values["device"] == "{'cuda'}", values


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_trainer_follows_the_experts_that_vllm_reports(tmp_path: Path, precision: str) -> None:
    pytest.importorskip("vllm")
    case = f"replay.qwen3_moe.{precision}.one"
    values = result(tmp_path, case, run_cases(tmp_path, [case], processes=1))
    assert values["reported"] < (1e-4 if precision == "float32" else 0.1), values
    assert values["others"] > 5 * values["reported"], values
    # In float32 both choose alike.
    assert values["mismatch"] < (0.005 if precision == "float32" else 0.2), values


@pytest.mark.parametrize("engine", ["native", "vllm"])
@pytest.mark.parametrize("case", [*ROLLOUTS, *ROLLOUTS_TWO])
def test_rollouts_have_the_trainers_weights_after_every_refit(tmp_path: Path, case: str, engine: str) -> None:
    """Each in a process of its own: vLLM's sleep mode serves one engine a process."""
    if engine == "vllm":
        pytest.importorskip("vllm")
    log = run_cases(tmp_path, [f"{case}.{engine}"], processes=2 if case in ROLLOUTS_TWO else 1)
    values = result(tmp_path, f"{case}.{engine}", log)
    assert max(values["errors"].values()) < values["tolerance"], values
    assert values["same_seed"] and not values["other_seed"], values
    if engine == "vllm" and ("float32" in case or "qwen2" not in case):
        assert set(values["bytes"]) == {"merge"}, values
    elif engine == "vllm":
        assert 0 < values["bytes"]["adapter"] < values["bytes"]["merge"], values


@pytest.mark.parametrize("case", TWO_GPUS)
def test_two_gpus_follow_the_reference(two_gpus: tuple[Path, str], case: str) -> None:
    folder, log = two_gpus
    values = result(folder, case, log)
    assert worst_difference(values) < TWO_GPUS[case], values


def test_starts_without_torchrun() -> None:
    """A plain `python run_sft.py` is a world of one over NCCL."""
    code = (
        "import torch, torch.distributed as dist; from megatron_lora.runtime.world import init_distributed\n"
        "world = init_distributed(); value = torch.ones(4, device=world.device)\n"
        "dist.all_reduce(value); dist.barrier()\n"
        "box = [None]; dist.all_gather_object(box, 7); print('sum', value.sum().item(), box, dist.get_backend())\n"
        "dist.destroy_process_group()"
    )
    launcher = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    environment = {name: value for name, value in os.environ.items() if name not in launcher}
    answer = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    assert "sum 4.0 [7] nccl" in answer.stdout, answer.stdout + answer.stderr
