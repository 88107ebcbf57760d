"""Models whose config differs in one field: the loss of a policy against transformers', or who refuses the field."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_lora.conversion.config_gate import check_config
from megatron_lora.conversion.hf_model import read_hf_model
from megatron_lora.errors import UserError
from megatron_lora.objectives.sft import SFTObjective
from megatron_lora.policy.interface import Policy
from tests.support.config_flips import FAMILIES, SIZES, config_content, flips, refused_word
from tests.support.models import random_model
from tests.support.reference import make_rows, sum_of_target_logps

ROWS = make_rows(4, SIZES["vocab_size"])
LONGEST = 64
# What the fast suite looks at; the long one goes through every field of every family.
SAMPLE = {
    "llama": ("attention_bias-0", "hidden_act-4", "rope_parameters-3", "extra-rope_scaling-rope_theta"),
    "mistral": ("sliding_window-0", "head_dim-0", "extra-layer_types"),
    "qwen2": ("layer_types-0", "rms_norm_eps-0"),
    "qwen3": ("attention_bias-0", "num_key_value_heads-0"),
    "gemma3_text": ("final_logit_softcapping-0", "query_pre_attn_scalar-0", "use_bidirectional_attention-0"),
}


def all_flips() -> dict[str, tuple[str, dict[str, Any]]]:
    """Name -> (family, the fields that are set)."""
    return {f"{family}-{name}": (family, changes) for family in FAMILIES for name, changes in flips(family)}


def sampled_flips() -> list[str]:
    return [f"{family}-{name}" for family, names in SAMPLE.items() for name in names]


def sweep(
    folder: Path, names: list[str], policy_of: Callable[[Path], Policy], *, megatron: bool
) -> dict[str, dict[str, Any]]:
    """For each name either `refused`, the message, or `ours` and `transformers`, the mean losses of the rows."""
    known = all_flips()
    return {name: _compare(folder / name, *known[name], policy_of, megatron) for name in names}


def _compare(
    place: Path, family: str, changes: dict[str, Any], policy_of: Callable[[Path], Policy], megatron: bool
) -> dict[str, Any]:
    content = json.dumps(config_content(family, changes))
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    (place / "config.json").write_text(content)
    try:
        check_config(read_hf_model(place), megatron=megatron, max_length=LONGEST)
    except UserError as refusal:
        return {"refused": str(refusal)}
    # Not by save_pretrained, which would write another config and refuses some that it loads.
    model = random_model(AutoConfig.from_pretrained(place))
    save_file(dict(model.named_parameters()), place / "model.safetensors", metadata={"format": "pt"})
    ours, _ = policy_of(place).evaluate([[row] for row in ROWS], SFTObjective())
    return {"ours": ours, "transformers": _transformers_loss(place)}


@torch.no_grad()
def _transformers_loss(place: Path) -> float:
    model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32, attn_implementation="eager").eval()
    model.config.return_dict, model.config.use_cache = True, False
    return float(-sum_of_target_logps(model, ROWS) / sum(row.num_targets for row in ROWS))


def assert_honoured(found: dict[str, dict[str, Any]], *, megatron: bool) -> None:
    """Refusals name what is refused; every other loss is transformers' to 1e-4."""
    wrong = {}
    for name, result in found.items():
        word = refused_word(name, megatron=megatron)
        if word is not None:
            right = word in result.get("refused", "")
        else:
            right = "ours" in result and abs(result["ours"] / result["transformers"] - 1) < 1e-4
        if not right:
            wrong[name] = result
    assert wrong == {}
