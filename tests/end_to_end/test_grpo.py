"""GRPO from the command line on two CPU processes: with vLLM (both refits, a killed engine) and with the training model
itself (resume, dynamic sampling, several updates a rollout)."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.support.compare import largest_difference
from tests.support.launch import ROOT, RanksFailed
from tests.support.runs import (
    adapter_of,
    assert_names_are_known,
    metrics,
    run,
    save_base,
    start,
    wait_until,
    write_lines,
)

pytestmark = pytest.mark.timeout(1800)

long = pytest.mark.long

STEPS = 4
SAME = ("step", "reward", "loss", "grad_norm", "kl", "rollout_logprob_error", "response_length", "adapter_version")
TP = {"tensor_model_parallel_size": 2}
NATIVE = {"backend": "megatron"}
VLLM = {"backend": "vllm", "vllm_cfg": {"tensor_parallel_size": 2}}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("grpo") / "base")


def recipe(base: Path, generation: dict[str, Any], megatron: dict[str, Any] | None = None, **grpo: Any) -> dict:
    """Answers of up to 8 tokens to arithmetic prompts, rewarded for digits."""
    peft = {"enabled": True, "dim": 4, "alpha": 8}
    return {
        "grpo": {
            "max_num_steps": STEPS,
            "num_prompts_per_step": 4,
            "num_generations_per_prompt": 4,
            "val_period": 2,
            "max_val_samples": 8,
        }
        | grpo,
        "loss_fn": {"reference_policy_kl_penalty": 0.01},
        "env": {
            "reward_functions": [{"kind": "python", "name": "digits", "function": "tests.support.rewards:digit_share"}]
        },
        "policy": {
            "model_name": str(base),
            "precision": "float32",
            "train_global_batch_size": 16,
            "train_micro_batch_size": 4,
            "max_total_sequence_length": 32,
            "megatron_cfg": {"enabled": True, "peft": peft, "optimizer": {"lr": 1e-2}} | (megatron or {}),
            "dtensor_cfg": {"tensor_parallel_size": 2, "lora_cfg": peft | {"use_triton": False}},
            "generation": {"max_new_tokens": 8} | generation,
        },
        "data": {"train": {"dataset_name": "arithmetic"}, "validation": {"dataset_name": "arithmetic"}},
        "checkpointing": {"save_period": 1, "keep_top_k": None},
        "logger": {"num_val_samples_to_print": 2},
    }


@pytest.fixture(scope="module")
def whole(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("whole"), updates_twice(base), 2)


def updates_twice(base: Path, **grpo: Any) -> dict[str, Any]:
    """By the training model itself at PP=2, two optimizer steps a rollout."""
    values = recipe(base, NATIVE, {"pipeline_model_parallel_size": 2}, **grpo)
    values["policy"]["train_global_batch_size"] = 8
    return values


@long
def test_answers_by_the_training_model(whole: Path) -> None:
    lines = metrics(whole)
    assert [line["num_updates"] for line in lines] == [2] * STEPS
    assert [line["adapter_version"] for line in lines] == list(range(STEPS))
    assert max(line["rollout_logprob_error"] for line in lines) < 1e-5
    assert all(line["refit_seconds"] == 0 and line["refit_bytes"] == 0 for line in lines)
    # The second update of the first rollout is not on-policy any more: ratio and KL have moved.
    assert lines[0]["kl"] > 0 and abs(lines[0]["probs_ratio"] - 1) > 1e-6
    assert {line["step"] for line in metrics(whole, "validation")} == {2, 4}
    assert_names_are_known(whole)
    assert all(0 <= line["accuracy"] <= 1 for line in metrics(whole, "validation"))
    assert (whole / "reward.png").is_file() and (whole / "loss.png").is_file()


@long
def test_resumed_run_is_the_same_run(base: Path, whole: Path, tmp_path: Path) -> None:
    run(tmp_path, updates_twice(base, max_num_steps=2), 2)
    resumed = run(tmp_path, updates_twice(base), 2)
    found, wanted = ([[line[name] for name in SAME] for line in metrics(folder)] for folder in (resumed, whole))
    assert found == wanted
    first, second = (adapter_of(folder / f"step_{STEPS}") for folder in (resumed, whole))
    assert all(torch.equal(first[name], value) for name, value in second.items())


@long
def test_a_signal_abandons_the_step_before_its_update(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """16 answers a step: the signal comes while the third step's are rewarded."""
    values = recipe(base, NATIVE, val_period=0)
    values["checkpointing"]["save_period"] = 100
    whole = run(tmp_path / "whole", values, 1)
    monkeypatch.setenv("REWARD_CALLS", str(tmp_path / "calls"))
    values["env"]["reward_functions"][0]["function"] = "tests.support.rewards:digit_share_and_signal"
    stopped = run(tmp_path / "stopped", values, 1)
    assert [line["step"] for line in metrics(stopped)] == [1, 2]
    assert (stopped / "latest_step.txt").read_text().strip() == "2"
    resumed = run(tmp_path / "stopped", values, 1)
    found, wanted = ([[line[name] for name in SAME] for line in metrics(folder)] for folder in (resumed, whole))
    assert found == wanted


@pytest.mark.parametrize(
    "penalty",
    [
        {},
        pytest.param({"use_kl_in_reward": True}, marks=long),
        pytest.param({"reference_policy_kl_penalty": 0.0}, marks=long),
    ],
    ids=str,
)
def test_equal_rewards_move_no_weight(base: Path, tmp_path: Path, penalty: dict[str, Any]) -> None:
    """The base alone takes other kernels than the base with B = 0; Adam made steps of their difference."""
    values = recipe(base, NATIVE | {"top_p": 0.7, "top_k": 20}, val_period=0, max_num_steps=3)
    values["env"]["reward_functions"][0]["function"] = "tests.support.rewards:always_one"
    values["loss_fn"] |= penalty
    folder = run(tmp_path, values, 1)
    lines = metrics(folder)
    assert [line["num_updates"] for line in lines] == [0, 0, 0]
    without_reference = penalty.get("reference_policy_kl_penalty") == 0
    assert [line.get("kl") for line in lines] == [None if without_reference else 0.0] * 3
    assert [line["zero_variance_groups"] for line in lines] == [4, 4, 4]
    assert max(line["rollout_logprob_error"] for line in lines) < 1e-5
    first, last = (adapter_of(folder / f"step_{step}") for step in (1, 3))
    assert not any(value.any() for name, value in last.items() if "lora_B" in name)
    assert all(torch.equal(first[name], value) for name, value in last.items())


@pytest.fixture(scope="module")
def by_adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    generation = VLLM | {"refit": "adapter"}
    return run(tmp_path_factory.mktemp("adapter"), recipe(base, generation, TP, max_num_steps=8), 2)


def test_vllm_carries_the_adapter_at_every_step(by_adapter: Path) -> None:
    lines = metrics(by_adapter)
    assert max(line["rollout_logprob_error"] for line in lines) < 1e-4
    assert max(line["refit_probe_error"] for line in lines) < 1e-4
    assert [line["adapter_version"] for line in lines] == list(range(8))
    assert all(line["refit_seconds"] > 0 and line["generation_tokens_per_second"] > 0 for line in lines)
    rewards = [line["reward"] for line in lines]
    assert sum(rewards[-2:]) > sum(rewards[:2])


@long
def test_merged_refits_give_the_same_curve(base: Path, by_adapter: Path, tmp_path: Path) -> None:
    merged = run(tmp_path, recipe(base, VLLM | {"refit": "merge"}, TP, max_num_steps=8), 2)
    ours, theirs = metrics(merged), metrics(by_adapter)
    for name in ("reward", "loss", "kl"):
        pairs = [(a[name], b[name]) for a, b in zip(ours, theirs, strict=True)]
        # Two roundings of one model: equal until a draw falls between them, so one answer may differ in a step.
        assert sum(abs(a - b) for a, b in pairs) / len(pairs) < 0.02, (name, pairs)
    assert max(line["rollout_logprob_error"] for line in ours) < 1e-4
    assert min(line["refit_bytes"] for line in ours) > 10 * max(line["refit_bytes"] for line in theirs)


@long
def test_killed_engine_ends_the_run_and_it_resumes(base: Path, by_adapter: Path, tmp_path: Path) -> None:
    values = recipe(base, VLLM | {"refit": "adapter"}, TP, max_num_steps=8)
    process = start(tmp_path, values, 2)
    wait_until(lambda: (tmp_path / "run" / "step_2" / "training_info.json").is_file(), process)
    os.kill(pid_of_rank(process, 1), signal.SIGKILL)
    output, _ = process.communicate(timeout=300)
    assert process.returncode != 0, output
    latest = int((tmp_path / "run" / "latest_step.txt").read_text())
    assert 2 <= latest < 8
    resumed = run(tmp_path, values, 2)
    assert [line["step"] for line in metrics(resumed)] == list(range(1, 9))
    difference = largest_difference(adapter_of(resumed / "step_8"), adapter_of(by_adapter / "step_8"))
    assert difference < 1e-5


@long
def test_ranks_do_not_outlive_torchrun(base: Path, tmp_path: Path) -> None:
    process = start(tmp_path, recipe(base, NATIVE, max_num_steps=10_000), 2)
    wait_until(lambda: (tmp_path / "run" / "step_1" / "training_info.json").is_file(), process)
    ranks = [Path(f"/proc/{pid_of_rank(process, rank)}") for rank in range(2)]
    process.kill()
    process.communicate(timeout=60)
    deadline = time.monotonic() + 30
    while any(rank.exists() for rank in ranks):
        assert time.monotonic() < deadline, "ranks still run"
        time.sleep(0.2)


def pid_of_rank(process: subprocess.Popen[str], rank: int) -> int:
    """The trainer process of a rank below torchrun."""
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and _is_child(folder, process.pid):
            environment = (folder / "environ").read_bytes().split(b"\0")
            if f"RANK={rank}".encode() in environment:
                return int(folder.name)
    raise AssertionError(f"no process of rank {rank}")


def _is_child(folder: Path, parent: int) -> bool:
    try:
        return f"PPid:\t{parent}\n" in (folder / "status").read_text()
    except OSError:
        return False


@long
def test_dtensor_backend_with_vllm_chooses_a_refit(base: Path, tmp_path: Path) -> None:
    values = recipe(base, VLLM | {"refit": "auto"}, max_num_steps=2)
    folder = run(tmp_path, values, 2, "policy.megatron_cfg.enabled=false")
    assert max(line["rollout_logprob_error"] for line in metrics(folder)) < 1e-4
    info = json.loads((folder / "step_2" / "training_info.json").read_text())
    assert info["state"]["refit_mode"] in ("adapter", "merge")


def _dynamic(values: dict[str, Any]) -> None:
    values["grpo"] |= {"use_dynamic_sampling": True, "batch_multiplier": 0.5, "max_num_steps": 2}


def _filters(values: dict[str, Any]) -> None:
    values["grpo"]["adv_estimator"] = {"name": "reinforce_plus_plus"}
    values["grpo"] |= {"overlong_filtering": True, "seq_logprob_error_threshold": 1.5, "max_num_steps": 2}
    values["loss_fn"] |= {"use_kl_in_reward": True, "token_level_loss": False}
    values["loss_fn"] |= {"use_importance_sampling_correction": True}


@long
@pytest.mark.parametrize("change", [_dynamic, _filters])
def test_options_run(change: Callable[[dict[str, Any]], None], base: Path, tmp_path: Path) -> None:
    values = recipe(base, NATIVE | {"temperature": 1.3})
    change(values)
    lines = metrics(run(tmp_path, values, 1))
    assert len(lines) == 2 and max(line["rollout_logprob_error"] for line in lines) < 1e-5
    if change is _dynamic:
        # A batch has 2 prompts, a step 4.
        assert all(line["generation_batches"] >= 2 and line["zero_variance_groups"] == 0 for line in lines)
        assert all(line["num_samples"] == 16 for line in lines)
    else:
        assert all(line["masked_by_logprob_error"] == 0 for line in lines)
        # Random answers seldom end by themselves, and those cut off carry no loss.
        assert all(line["num_target_tokens"] < 16 * line["response_length"] for line in lines)


@long
def test_dynamic_sampling_ends_with_its_last_epoch(base: Path, tmp_path: Path) -> None:
    """Half of the prompts' answers are all equal, so a step takes the four batches of an epoch."""
    rows = [{"prompt": f"{n}+{n}=", "answer": str(2 * n), "judged": n % 2 == 0} for n in range(8)]
    data = write_lines(tmp_path / "rows.jsonl", rows)
    values = recipe(base, NATIVE, use_dynamic_sampling=True, batch_multiplier=0.5, max_num_epochs=2, max_num_steps=50)
    values["grpo"] |= {"val_period": 0}
    values["env"]["reward_functions"][0]["function"] = "tests.support.rewards:letters_where_judged"
    values["data"] = {"shuffle": False, "train": {"dataset_name": None, "data_path": str(data)}, "validation": None}
    folder = run(tmp_path, values, 1)
    assert [line["generation_batches"] for line in metrics(folder)] == [4, 4]
    assert (folder / "latest_step.txt").read_text().strip() == "2"


@long
def test_a_reward_that_always_fails_stops_the_run(base: Path, tmp_path: Path) -> None:
    values = recipe(base, NATIVE, val_period=0, max_num_steps=50)
    values["env"]["reward_functions"].append(
        {"kind": "python", "name": "judge", "function": "tests.support.rewards:always_fails"}
    )
    with pytest.raises(RanksFailed, match="reward 'judge' failed on every answer of 3 batches.*no such judge"):
        run(tmp_path, values, 2)
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1, 2]


@long
def test_dynamic_sampling_gives_up_with_a_reason(base: Path, tmp_path: Path) -> None:
    values = recipe(base, NATIVE, use_dynamic_sampling=True, dynamic_sampling_max_gen_batches=2, val_period=0)
    values["env"]["reward_functions"][0]["function"] = "tests.support.rewards:always_one"
    with pytest.raises(RanksFailed, match="dynamic sampling found 0 groups"):
        run(tmp_path, values, 1)


@long
@pytest.mark.parametrize("peft", [{}, {"quantization": "nf4", "lora_dtype": "float32"}], ids=["dense", "nf4"])
def test_adapters_on_experts_with_vllm(peft: dict[str, Any], tmp_path: Path) -> None:
    """EP=2, an engine for each rank, whose choice of experts the trainer follows; the files say the same as the run."""
    # vLLM's product of experts on a CPU takes multiples of 32.
    base = save_base(tmp_path / "base", "qwen3_moe", moe_intermediate_size=64)
    values = recipe(
        base, {"backend": "vllm", "vllm_cfg": {"tensor_parallel_size": 1}}, {"expert_model_parallel_size": 2}
    )
    values["policy"]["megatron_cfg"]["peft"] |= {"target_modules": ["linear_qkv", "linear_fc1", "linear_fc2"]} | peft
    values["policy"]["router_replay"] = {"enabled": True}
    folder = run(tmp_path, values, 2)
    lines = metrics(folder)
    assert [line["adapter_version"] for line in lines] == list(range(STEPS))
    assert max(line["rollout_logprob_error"] for line in lines) < 1e-4
    # In fp32 both choose alike; what an engine would report of other tokens or layers is not what the trainer chooses.
    assert max(line["routing_mismatch"] for line in lines) < 0.01
    first, last = (adapter_of(folder / f"step_{step}") for step in (1, STEPS))
    assert any(".mlp.experts.base_layer.lora_A" in name for name in last)
    assert not [name for name in last if torch.equal(first[name], last[name])]
    for mode in ("adapter", "merged"):
        convert("--mode", mode, "--adapter-ckpt", folder / f"step_{STEPS}", "--hf-ckpt-path", tmp_path / mode)
    exported = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert exported.keys() == last.keys()
    assert all(torch.equal(exported[name], value) for name, value in last.items())


def convert(*arguments: Any) -> None:
    command = [sys.executable, "conversion/convert_lora_to_hf.py", *map(str, arguments), "--check-logits"]
    subprocess.run(command, cwd=ROOT, check=True)
