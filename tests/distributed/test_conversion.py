"""Whole models and adapters between Hugging Face and Megatron checkpoints, on real ranks and in the real vLLM."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from megatron_lora.conversion.export import export_lora_adapter_to_hf, merge_lora_to_hf
from megatron_lora.conversion.whole_model import convert_megatron_to_hf
from tests.distributed.cases import Case
from tests.distributed.conversion_cases import ADAPTED, LAYOUTS, WHOLE, folder_of, model_of, prompt

ROOT = Path(__file__).parents[2]
SPLIT = [layout for layout in LAYOUTS if layout != "dp"]


# One case of all layouts: what each of them writes, every other reads.
CONVERSION = Case("conversion", 2, "conversion", "qwen3", adapter=None)


@pytest.fixture(params=[CONVERSION], ids=str)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


@pytest.fixture
def found(ranks_found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What each of two ranks found."""
    return ranks_found


@pytest.fixture
def folder(found: Any, workers: Any) -> Path:
    """Bases, HF adapters on them, the bases as Megatron checkpoints, and what every layout saved."""
    return folder_of(workers.folder)


def bits(folder: Path) -> dict[str, tuple[torch.dtype, bytes]]:
    tensors = {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
    return {name: (tensor.dtype, tensor.numpy().tobytes()) for name, tensor in tensors.items()}


@pytest.mark.parametrize("layout", SPLIT)
@pytest.mark.parametrize("family", WHOLE)
def test_megatron_to_hf_is_bit_exact(family: str, layout: str, folder: Path, found: Any, tmp_path: Path) -> None:
    step = folder / f"whole_{family}_{layout}"
    convert_megatron_to_hf(
        megatron_ckpt_path=str(step),
        hf_ckpt_path=str(tmp_path / "out"),
        hf_model_name=str(folder / family),
        show_progress=False,
    )
    assert bits(tmp_path / "out") == bits(folder / family)


@pytest.mark.parametrize("family", WHOLE)
def test_the_converters_checkpoint_loads_on_every_layout(family: str, found: list[dict[str, Any]]) -> None:
    for rank in found:
        assert {layout: rank[f"load_{family}_{layout}"] for layout in SPLIT} == {layout: [] for layout in SPLIT}


@pytest.mark.parametrize("family", WHOLE)
def test_there_and_back_is_bit_exact(family: str, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert_megatron_to_hf(
        megatron_ckpt_path=str(folder / f"converted_{family}"), hf_ckpt_path=str(out), show_progress=False
    )
    assert bits(out) == bits(folder / family)
    for name in ("config.json", "generation_config.json"):
        assert (out / name).read_text() == (folder / family / name).read_text()
    _, loading = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(loading.values()), loading


@pytest.mark.parametrize("adapted", ADAPTED)
def test_adapter_checkpoints_load_on_every_other_layout(adapted: str, found: list[dict[str, Any]]) -> None:
    pairs = [f"{adapted}_{source}_{target}" for source in LAYOUTS for target in LAYOUTS]
    for rank in found:
        assert {pair: rank[pair] for pair in pairs} == {pair: [] for pair in pairs}


@pytest.mark.parametrize("adapted", ADAPTED)
def test_live_weights_are_pefts_merge_on_every_layout(adapted: str, folder: Path, found: Any) -> None:
    base = AutoModelForCausalLM.from_pretrained(folder / model_of(adapted))
    names = {name for name, _ in base.named_parameters()}
    merged = PeftModel.from_pretrained(base, str(folder / f"{adapted}_adapter")).merge_and_unload().state_dict()
    for layout in LAYOUTS:
        live = load_file(folder / f"live_{adapted}_{layout}.safetensors")
        assert live.keys() == names
        for name, tensor in live.items():
            torch.testing.assert_close(tensor, merged[name], rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("adapted", ADAPTED)
def test_exports_from_tp2_are_the_adapter_and_pefts_merge(
    adapted: str, folder: Path, found: Any, tmp_path: Path
) -> None:
    step = str(folder / f"adapter_{adapted}_tp")
    export_lora_adapter_to_hf(adapter_ckpt=step, hf_ckpt_path=str(tmp_path / "adapter"), check_logits=True)
    before = load_file(folder / f"{adapted}_adapter/adapter_model.safetensors")
    after = load_file(tmp_path / "adapter/adapter_model.safetensors")
    before.pop("base_model.model.lm_head.base_layer.weight", None)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    merge_lora_to_hf(adapter_ckpt=step, hf_ckpt_path=str(tmp_path / "merged"), check_logits=True, show_progress=False)
    live = load_file(folder / f"live_{adapted}_dp.safetensors")
    merged = load_file(tmp_path / "merged/model.safetensors")
    assert live.keys() == merged.keys()
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, live[name], rtol=1e-5, atol=1e-6)


def test_a_megatron_checkpoint_is_a_base_to_merge_into(
    folder: Path, found: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    arguments = {"adapter_ckpt": str(folder / "adapter_llama3_vpp"), "check_logits": True, "show_progress": False}
    with caplog.at_level("INFO", logger="megatron_lora.conversion"):
        merge_lora_to_hf(**arguments, hf_ckpt_path=str(tmp_path / "a"), base_ckpt=str(folder / "converted_llama3"))
        # A run of full fine-tuning that changed nothing, at PP=2.
        merge_lora_to_hf(**arguments, hf_ckpt_path=str(tmp_path / "b"), base_ckpt=str(folder / "whole_llama3_pp"))
    assert "logits agree" in caplog.text and "are not those that the adapter was trained on" not in caplog.text
    merge_lora_to_hf(**arguments, hf_ckpt_path=str(tmp_path / "c"))
    assert bits(tmp_path / "a") == bits(tmp_path / "b") == bits(tmp_path / "c")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c"]


VLLM = {"llama3": ("llama3", "llama3_head"), "qwen2_wide": ("qwen2_wide",)}


@pytest.mark.parametrize("base", ["llama3", pytest.param("qwen2_wide", marks=pytest.mark.long)])
def test_vllm_gives_pefts_log_probabilities(base: str, folder: Path, found: Any) -> None:
    """Exports of TP=2 checkpoints, unmerged and merged: GQA, qkv biases, padded vocabulary, an adapter on lm_head."""
    expected = {base: target_logps(AutoModelForCausalLM.from_pretrained(folder / base))}
    for case in VLLM[base]:
        step = str(folder / f"adapter_{case}_tp")
        export_lora_adapter_to_hf(adapter_ckpt=step, hf_ckpt_path=str(folder / f"out_{case}"))
        merge_lora_to_hf(adapter_ckpt=step, hf_ckpt_path=str(folder / f"merged_{case}"), show_progress=False)
        model = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(folder / base), str(folder / f"{case}_adapter")
        )
        expected[f"out_{case}"] = expected[f"merged_{case}"] = target_logps(model)
        assert (expected[f"out_{case}"] - expected[base]).abs().max() > 1, "the adapter must show"
    adapters, merged = [[f"{kind}_{case}" for case in VLLM[base]] for kind in ("out", "merged")]
    result = subprocess.run(
        [sys.executable, "-m", "tests.distributed.conversion_vllm_worker", str(folder), base, *adapters]
        + ["--merged", *merged],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=880,
    )
    assert result.returncode == 0, result.stderr[-6000:]
    actual = json.loads((folder / f"vllm_{base}.json").read_text())
    assert actual.keys() == expected.keys()
    for name, values in actual.items():
        torch.testing.assert_close(
            torch.tensor(values), expected[name], rtol=0, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}"
        )


def target_logps(model: torch.nn.Module) -> torch.Tensor:
    """[S - 1] log-probabilities of the prompt's tokens from the second on, nats."""
    tokens = torch.tensor(prompt())
    with torch.no_grad():
        logits = model(tokens[None]).logits[0, :-1].float()
    return torch.log_softmax(logits, -1).gather(1, tokens[1:, None]).squeeze(1)
