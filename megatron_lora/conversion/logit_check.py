"""Forward passes of both sides of an export on a fixed prompt, in fp32: they must agree."""

import gc
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.utils.logging import disable_progress_bar

from megatron_lora.conversion.experts import expert_views
from megatron_lora.conversion.safetensors_io import write_tensor_dict
from megatron_lora.lora.layout import AdapterSpec, ModelSpec
from megatron_lora.lora.merge import merge_targets
from megatron_lora.lora.peft_format import to_hf

PROMPT_TOKENS = 32
# Largest difference allowed, over the largest absolute logit; by the dtype the merged weights were rounded to.
TOLERANCES = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def check_adapter_logits(base: Path, spec: AdapterSpec, factors: dict[str, Tensor], adapter: Path) -> float:
    """Base with the fused factors added to its weights, against base + peft reading the folder `adapter`.

    Returns the relative difference; raises RuntimeError where it is too large.
    """
    return _compare(_fused_logits(base, spec, factors), _peft_logits(base, spec, adapter), torch.float32)


def check_merged_logits(
    base: Path, spec: AdapterSpec, factors: dict[str, Tensor], merged: Path, dtype: torch.dtype
) -> float:
    """Base + peft against the merged folder. Returns the relative difference; raises RuntimeError where too large."""
    with tempfile.TemporaryDirectory() as folder:
        config, tensors = to_hf(spec, factors, experts="packed")
        (Path(folder) / "adapter_config.json").write_text(json.dumps(config))
        write_tensor_dict(Path(folder) / "adapter_model.safetensors", tensors)
        expected = _peft_logits(base, spec, Path(folder))
    return _compare(expected, _logits(_load(merged, spec.shapes), spec.shapes.vocab_size), dtype)


def _compare(expected: Tensor, actual: Tensor, dtype: torch.dtype) -> float:
    difference = float((expected - actual).abs().max() / expected.abs().max())
    if not difference <= TOLERANCES[dtype]:
        raise RuntimeError(
            f"self-check failed: logits differ by {difference:.2e} of the largest, allowed is {TOLERANCES[dtype]:.0e}"
        )
    return difference


def _fused_logits(base: Path, spec: AdapterSpec, factors: dict[str, Tensor]) -> Tensor:
    model = _load(base, spec.shapes)
    modules, experts = dict(model.named_modules()), expert_views(model, spec.shapes)
    for name, target in merge_targets(spec).items():
        weight = experts[name] if name in experts else modules[name].get_parameter("weight").data
        weight.add_(target.weight_update(factors).of_rows(weight))
    for name in spec.saved:
        modules[name.removesuffix(".weight")].get_parameter("weight").data.copy_(factors[name])
    return _logits(model, spec.shapes.vocab_size)


def _peft_logits(base: Path, spec: AdapterSpec, adapter: Path) -> Tensor:
    return _logits(PeftModel.from_pretrained(_load(base, spec.shapes), str(adapter)), spec.shapes.vocab_size)


def _load(folder: Path, shapes: ModelSpec) -> torch.nn.Module:
    disable_progress_bar()
    kind: Any = AutoModelForImageTextToText if shapes.tower else AutoModelForCausalLM
    return kind.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False)


def _logits(model: torch.nn.Module, vocab_size: int) -> Tensor:
    """[PROMPT_TOKENS, vocabulary] fp32."""
    model.eval()
    tokens = torch.arange(1, PROMPT_TOKENS + 1) * 7919 % vocab_size
    with torch.no_grad():
        logits = model(tokens[None]).logits[0].float()
    del model
    gc.collect()
    return logits
