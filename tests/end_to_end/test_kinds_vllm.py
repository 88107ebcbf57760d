"""GRPO from the command line with every kind of adapter, answers drawn by vLLM: what it is given, and that it computes
with what trains. And SFT that starts at a folder and trains nothing: what comes out is what went in, bit for bit."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.end_to_end.test_kinds import KINDS, Room, recipe
from tests.support.runs import adapter_of, metrics, write_recipe
from tests.support.trainer import run_commands

pytestmark = [pytest.mark.timeout(1800), pytest.mark.long]

STEPS = 3
# Linears of other ranks than the rest, some of larger ones than `dim`: an A of each in the fused linears.
BY_LINEAR: dict[str, Any] = {
    "type": "canonical_lora",
    "use_rslora": True,
    "lora_plus_ratio": 2.0,
    "rank_pattern": {"v_proj": 20, "linear_fc2": 2, "*.layers.1.self_attn.o_proj": 6},
    "alpha_pattern": {"k_proj": 3, "up_proj": 16},
}


@dataclass(frozen=True)
class Given:
    """What vLLM is given of a kind. merged: why no adapter; None: the adapter, or both as the recipe's `refit` asks."""

    peft: dict[str, Any]
    merged: str | None = None
    refit: str = "adapter"
    backend: str = "megatron"


GIVEN = {
    "canonical_by_linear": Given(BY_LINEAR),
    "canonical_by_linear, merged": Given(BY_LINEAR, refit="merge"),
    "canonical_by_linear, DTensor": Given(BY_LINEAR, backend="dtensor"),
    "qlora": Given(KINDS["qlora"]),
    "pissa": Given(KINDS["pissa"]),
    "dora_by_linear": Given(KINDS["dora_by_linear"], "vLLM serves no adapters of type 'dora'", "auto"),
    "canonical_saved": Given(KINDS["canonical_saved"], "vLLM serves no modules_to_save with an adapter", "auto"),
}
# What starts from the folder that such a run exports: ranks, alphas and scales are the folder's, and PiSSA's is a plain
# LoRA.
IMPORTED: dict[str, dict[str, Any]] = {
    "canonical_by_linear": {"type": "lora", "lora_plus_ratio": 2.0},
    "qlora": KINDS["qlora"],
    "pissa": {},
    "dora_by_linear": {"type": "dora"},
    "canonical_saved": {"type": "lora", "modules_to_save": KINDS["canonical_saved"]["modules_to_save"]},
}


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Room:
    return Room(tmp_path_factory.mktemp("kinds_vllm"))


@pytest.fixture(scope="module")
def answers(room: Room, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Every run, one after the other in one process; "folder": what it wrote."""
    folder = tmp_path_factory.mktemp("runs")
    commands = {kind: drawn_by_vllm(folder / kind, given, room) for kind, given in GIVEN.items()}
    for kind, peft in IMPORTED.items():
        start = folder / kind / "run" / f"step_{STEPS}" / "hf_adapter"
        commands[f"import {kind}"] = imported(folder / f"import {kind}", peft | {"init_adapter": str(start)}, room)
    found = run_commands(folder, commands)
    return {name: answer | {"folder": folder / name / "run"} for name, answer in found.items()}


def drawn_by_vllm(folder: Path, given: Given, room: Room) -> list[str]:
    values = recipe("grpo", room, given.peft)
    values["grpo"]["max_num_steps"] = STEPS
    policy = values["policy"]
    policy["megatron_cfg"]["tensor_model_parallel_size"] = 1
    if given.backend == "dtensor":
        policy["megatron_cfg"]["enabled"] = False
        policy["dtensor_cfg"] = {"lora_cfg": {"enabled": True, "dim": 4, "alpha": 8} | given.peft}
    policy["generation"] |= {"backend": "vllm", "refit": given.refit, "vllm_cfg": {"tensor_parallel_size": 1}}
    values["checkpointing"]["save_period"] = STEPS
    return command(folder, values)


def imported(folder: Path, peft: dict[str, Any], room: Room) -> list[str]:
    """A step too small to change any number."""
    values = recipe("sft", room, peft)
    values["sft"] = {"max_num_steps": 1, "val_period": 0}
    values["policy"]["megatron_cfg"] |= {"tensor_model_parallel_size": 1, "optimizer": {"lr": 1e-30}}
    return command(folder, values)


def command(folder: Path, values: dict[str, Any]) -> list[str]:
    return [str(write_recipe(folder, values)), f"checkpointing.checkpoint_dir={folder / 'run'}"]


@pytest.mark.parametrize("kind", GIVEN)
def test_vllm_computes_with_what_trains(kind: str, answers: dict[str, dict[str, Any]]) -> None:
    answer, given = answers[kind], GIVEN[kind]
    assert answer["status"] == 0, answer["stderr"][-3000:]
    mode = "merge" if given.merged else given.refit
    assert f"refit by {mode}{f': {given.merged}' if given.merged else ', as asked'}" in answer["stdout"]
    folder: Path = answer["folder"]
    info = json.loads((folder / f"step_{STEPS}" / "training_info.json").read_text())
    assert info["state"]["refit_mode"] == mode
    lines = metrics(folder)
    assert [line["adapter_version"] for line in lines] == list(range(STEPS))
    for name in ("rollout_logprob_error", "refit_probe_error"):
        assert max(line[name] for line in lines) < 1e-4, [line[name] for line in lines]
    # The answers' model is far from the base and from the last step's: one that stayed behind would show.
    assert lines[-1]["kl"] > 0.1, [line["kl"] for line in lines]


@pytest.mark.parametrize("kind", IMPORTED)
def test_a_folder_goes_in_and_comes_out_bit_for_bit(kind: str, answers: dict[str, dict[str, Any]]) -> None:
    answer = answers[f"import {kind}"]
    assert answer["status"] == 0, answer["stderr"][-3000:]
    # Trained, but for the size of the step.
    assert metrics(answer["folder"])[0]["grad_norm"] > 0
    before, after = adapter_of(answers[kind]["folder"] / f"step_{STEPS}"), adapter_of(answer["folder"] / "step_1")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], tensor) and tensor.any() for name, tensor in after.items())
