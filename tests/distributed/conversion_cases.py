"""What the conversion tests go through: layouts over two ranks, models, adapters."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from megatron_lora.conversion.whole_model import convert_hf_to_megatron
from tests.support.models import FAMILIES, family_config, save_model
from tests.support.reference import TARGETS, save_adapter

LAYOUTS: dict[str, dict[str, Any]] = {
    "tp": {"tensor_model_parallel_size": 2},
    "pp": {"pipeline_model_parallel_size": 2},
    "vpp": {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
    "uneven": {
        "pipeline_model_parallel_size": 2,
        "num_layers_in_first_pipeline_stage": 1,
        "num_layers_in_last_pipeline_stage": 3,
    },
    "dp": {},
}
# Bases as they are, and untied or tied against the family's habit.
WHOLE = (*FAMILIES, "qwen2_untied", "llama3_tied")
ADAPTED = ("qwen2_wide", "llama3", "llama3_head", "gemma3", "qwen2_dora")


def model_of(case: str) -> str:
    return case.removesuffix("_head").removesuffix("_dora")


def folder_of(shared_folder: Path | str) -> Path:
    """Below the folder that a worker leaves its results in."""
    return Path(shared_folder) / "conversion"


def build(folder: Path) -> None:
    """Every base and HF adapter, and the bases as Megatron checkpoints."""
    for family in FAMILIES:
        save_model(folder / family, family)
    _save_retied(folder / "qwen2_untied", "qwen2", tied=False)
    _save_retied(folder / "llama3_tied", "llama3", tied=True)
    # Heads of 32, which vLLM has a kernel for.
    save_model(folder / "qwen2_wide", "qwen2", hidden_size=128)
    for case in ADAPTED:
        targets = [*TARGETS, "lm_head"] if case.endswith("_head") else TARGETS
        dora = case.endswith("_dora")
        save_adapter(folder / model_of(case), folder / f"{case}_adapter", targets=targets, use_dora=dora)
    for family in WHOLE:
        convert_hf_to_megatron(
            hf_model_name=str(folder / family),
            megatron_ckpt_path=str(folder / f"converted_{family}"),
            tp=2,
            pp=2,
            show_progress=False,
        )


def _save_retied(folder: Path, family: str, *, tied: bool) -> None:
    torch.manual_seed(0)
    config = family_config(family)
    config.tie_word_embeddings = tied
    model = AutoModelForCausalLM.from_config(config).float()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)


def prompt() -> list[int]:
    """Fixed tokens that every case's model knows."""
    return [(7919 * position + 3) % 101 for position in range(40)]
