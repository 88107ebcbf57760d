"""What a run exported, in stock transformers and peft: the same log-probabilities."""

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from megatron_lora.conversion.export import write_peft_folder
from tests.distributed.cases import scored_rows
from tests.support.reference import token_logps

TOLERANCE = 1e-4


def assert_peft_scores_alike(found: dict[str, Any], base: Path, folder: Path, start: Path | None) -> None:
    """start: the adapter of the reference policy; None: the base alone is."""
    model: Any = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
    with torch.no_grad():
        plain = [token_logps(model, row) for row in scored_rows()]
    beginning = PeftModel.from_pretrained(model, start) if start is not None else model
    with torch.no_grad():
        begun = [token_logps(beginning, row) for row in scored_rows()]
    model = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
    model = PeftModel.from_pretrained(model, folder_of(found["exported"], folder))
    merged = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
    merged.load_state_dict(found["merged"], strict=False)
    with torch.no_grad():
        columns = (scored_rows(), found["scores"], plain, found["base"], begun, found["reference"])
        for row, scores, unadapted, without, wanted, reference in zip(*columns, strict=True):
            assert (token_logps(model, row) - scores[1:]).abs().max() < TOLERANCE
            assert (token_logps(merged, row) - scores[1:]).abs().max() < TOLERANCE
            assert (unadapted - without[1:]).abs().max() < TOLERANCE
            assert (wanted - reference[1:]).abs().max() < TOLERANCE


def folder_of(exported: tuple[dict[str, Any], dict[str, Any]], folder: Path) -> Path:
    write_peft_folder(folder, *exported)
    return folder
