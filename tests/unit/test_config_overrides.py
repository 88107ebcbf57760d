"""`policy.hf_config_overrides`: the model is read as if the folder's config.json had said so, in either spelling."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from megatron_lora.config.schema import PolicyConfig
from megatron_lora.conversion.adapter_checkpoint import write_adapter
from megatron_lora.conversion.config_gate import check_config
from megatron_lora.conversion.export import export_lora_adapter_to_hf, merge_lora_to_hf, read_peft_folder
from megatron_lora.conversion.hf_model import HFModel, read_hf_model
from megatron_lora.errors import UserError
from megatron_lora.lora.peft_reading import from_hf
from megatron_lora.policy.weights_check import check_base, overridden_fields
from megatron_lora.rollout.vllm_engine import engine_arguments
from megatron_lora.runtime.world import World
from tests.support.config_flips import config_content
from tests.support.models import save_model
from tests.support.reference import save_adapter

YARN = {
    "rope_type": "yarn",
    "factor": 4,
    "original_max_position_embeddings": 16,
    "truncate": True,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1,
    "mscale_all_dim": 0,
}
LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 700.0}
BY_LAYER = {
    "full_attention": {"rope_type": "default", "rope_theta": 900.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 90.0},
}
# What the folder's config.json says, in three ways, all with the base 500.
FOLDERS: dict[str, dict[str, Any]] = {
    "old": {"rope_theta": 500.0},
    "old_scaled": {"rope_theta": 500.0, "rope_scaling": LINEAR | {"rope_theta": 500.0}},
    "new": {"rope_parameters": LINEAR | {"rope_theta": 500.0}},
}


def written(folder: Path, family: str, changes: dict[str, Any], overrides: dict[str, Any] | None = None) -> HFModel:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config_content(family, changes)))
    return read_hf_model(folder, overrides=overrides)


@pytest.mark.parametrize("name", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("folder", FOLDERS)
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_rotary_embeddings_are_replaced_in_either_spelling(family: str, folder: str, name: str, tmp_path: Path) -> None:
    for rope, base in ((YARN, 500.0), (YARN | {"rope_theta": 1000000}, 1e6), ({"rope_type": "default"}, 500.0)):
        model = written(tmp_path, family, FOLDERS[folder], {name: rope, "max_position_embeddings": 64})
        plain = written(
            tmp_path / "plain", family, {"rope_parameters": rope | {"rope_theta": base}, "max_position_embeddings": 64}
        )
        (ours, factor), (wanted, wanted_factor) = model.rotary[""], plain.rotary[""]
        assert torch.equal(ours, wanted) and factor == wanted_factor
        assert model.config.max_position_embeddings == 64
        assert "factor" not in model.config.rope_parameters or model.config.rope_parameters["rope_type"] == "yarn"
        (notice,) = check_config(model, megatron=True, max_length=64)
        assert "policy.hf_config_overrides" in notice and "max_position_embeddings" in notice


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_base_alone_is_replaced_in_either_spelling(folder: str, tmp_path: Path) -> None:
    model = written(tmp_path, "llama", FOLDERS[folder], {"rope_theta": 2000})
    before = written(tmp_path, "llama", FOLDERS[folder])
    assert before.config.rope_parameters["rope_theta"] == 500.0
    assert model.config.rope_parameters == before.config.rope_parameters | {"rope_theta": 2000}


@pytest.mark.parametrize(
    "overrides, full, local",
    [
        ({"rope_scaling": {"rope_type": "linear", "factor": 8.0}}, ("linear", 900.0), 90.0),
        ({"rope_theta": 5000.0}, ("default", 5000.0), 90.0),
        ({"rope_local_base_freq": 40.0}, ("default", 900.0), 40.0),
        ({"rope_parameters": {**BY_LAYER, "sliding_attention": {"rope_theta": 30.0}}}, ("default", 900.0), 30.0),
    ],
)
def test_gemma_has_two_rotary_embeddings(overrides: Any, full: Any, local: float, tmp_path: Path) -> None:
    rope = written(tmp_path, "gemma3_text", {"rope_parameters": BY_LAYER}, overrides).config.rope_parameters
    assert (rope["full_attention"]["rope_type"], rope["full_attention"]["rope_theta"]) == full
    assert rope["sliding_attention"]["rope_theta"] == local
    assert rope["sliding_attention"].get("factor") is None


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"max_position_embedings": 64}, "has no such field; did you mean max_position_embeddings?"),
        ({"zzz": 1}, "LlamaConfig has no such field; it has "),
        ({"model_type": "qwen2"}, "is a 'llama' model, which no key changes"),
        ({"rope_scaling": {}, "rope_parameters": {}}, "two names of one"),
        ({"hidden_act": "no"}, "with policy.hf_config_overrides cannot be honoured: hidden_act='no'"),
        ({"num_attention_heads": 3}, "config.json with policy.hf_config_overrides={'num_attention_heads': 3}: "),
        ({"rope_scaling": {"rope_type": "yarn"}}, "factor"),
        ({"rope_scaling": {"rope_type": "su", "factor": 2.0}}, "'su'"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "depends on the batch beyond 128 tokens"),
    ],
)
def test_what_cannot_be_is_refused_by_name(overrides: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as refused:
        check_config(written(tmp_path, "llama", {}, overrides), megatron=True, max_length=256)
    assert message in str(refused.value) and "\n" not in str(refused.value)


def test_fields_that_training_does_not_read_are_named(tmp_path: Path) -> None:
    notices = check_config(written(tmp_path, "llama", {}, {"use_cache": False}), megatron=True, max_length=64)
    assert notices == ["policy.hf_config_overrides: use_cache without effect on training"]


def test_sizes_that_the_weights_do_not_have_are_refused(tmp_path: Path) -> None:
    model = save_model(tmp_path / "base", "qwen2")
    policy = PolicyConfig(model_name=str(model), hf_config_overrides={"intermediate_size": 40})
    with pytest.raises(UserError, match=r"with policy.hf_config_overrides describes: of another shape: model.layers"):
        check_base(policy, read_hf_model(model, overrides=policy.hf_config_overrides))


def test_vllm_is_given_what_transformers_read(tmp_path: Path) -> None:
    model = written(tmp_path, "llama", FOLDERS["new"], {"rope_scaling": YARN, "max_position_embeddings": 64})
    policy = PolicyConfig(
        model_name=str(tmp_path), hf_config_overrides={"rope_scaling": YARN, "max_position_embeddings": 64}
    )
    change = engine_arguments(policy, World.alone(), None, [], model.config)["hf_overrides"]
    theirs = change(written(tmp_path, "llama", FOLDERS["new"]).config)
    assert theirs.max_position_embeddings == 64 and theirs.rope_parameters == model.config.rope_parameters
    assert theirs.rope_parameters["rope_type"] == "yarn" and theirs.rope_parameters["rope_theta"] == 500.0
    plain = PolicyConfig(model_name=str(tmp_path))
    assert overridden_fields(plain, model.config) == {}
    assert "hf_overrides" not in engine_arguments(plain, World.alone(), None, [], model.config)


def test_a_merged_export_has_them_and_an_adapters_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    base = save_model(tmp_path / "base", "qwen2")
    config, tensors = read_peft_folder(save_adapter(base, tmp_path / "adapter"))
    overrides = {"rope_scaling": YARN | {"factor": 4.0}, "max_position_embeddings": 64}
    step = tmp_path / "step_1"
    spec, factors = from_hf(config, tensors, read_hf_model(base).shapes, str(base), None)
    write_adapter(step / "policy" / "weights", spec, factors)
    policy = {"model_name": str(base), "hf_config_overrides": overrides}
    (step / "config.yaml").write_text(yaml.safe_dump({"policy": policy}))
    # The check's own forward passes have them on both sides.
    merge_lora_to_hf(adapter_ckpt=str(step), hf_ckpt_path=str(tmp_path / "merged"), check_logits=True)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").config
    assert merged.rope_parameters["rope_type"] == "yarn" and merged.max_position_embeddings == 64
    assert merged.rope_parameters["rope_theta"] == read_hf_model(base).config.rope_parameters["rope_theta"]
    export_lora_adapter_to_hf(adapter_ckpt=str(step), hf_ckpt_path=str(tmp_path / "exported"), check_logits=True)
    assert "policy.hf_config_overrides" in caplog.text and "yarn" in caplog.text
