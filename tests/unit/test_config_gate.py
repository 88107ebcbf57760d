"""Every field of every family's config is honoured, known to change nothing, or refused by name: no traceback."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from megatron_lora.conversion import config_gate
from megatron_lora.conversion.config_gate import check_config
from megatron_lora.conversion.hf_model import HFModel, read_hf_model
from megatron_lora.errors import UserError
from tests.support.config_flips import BASE, GATED_FAMILIES, RARE_FAMILIES, SIZES, config_content, flips, refused_word

FLIPS = [(family, name, changes) for family in GATED_FAMILIES for name, changes in flips(family)]


def write_config(folder: Path, family: str, **changes: Any) -> HFModel:
    (folder / "config.json").write_text(json.dumps(config_content(family, changes)))
    return read_hf_model(folder)


@pytest.mark.parametrize("family", [*GATED_FAMILIES, *RARE_FAMILIES])
def test_every_field_is_in_a_table(family: str) -> None:
    declared = {field.name for field in dataclasses.fields(CONFIG_MAPPING[family])}
    known = config_gate.BUILT_FROM | config_gate.WITHOUT_EFFECT | config_gate.MUST_BE.keys()
    assert declared <= known | set(config_gate.NOT_APPLIED.get(family, ()))


@pytest.mark.parametrize("family, name, changes", FLIPS, ids=[f"{family}-{name}" for family, name, _ in FLIPS])
def test_a_flipped_field_is_taken_or_refused_by_name(family, name, changes, tmp_path) -> None:
    word = refused_word(f"{family}-{name}", megatron=True)
    if word is None:
        check_config(write_config(tmp_path, family, **changes), megatron=True, max_length=64)
    else:
        with pytest.raises(UserError) as refused:
            check_config(write_config(tmp_path, family, **changes), megatron=True, max_length=64)
        assert word in str(refused.value) and "\n" not in str(refused.value)


def test_a_rotary_dim_that_transformers_does_not_read_is_refused(tmp_path) -> None:
    def notices(**changes: Any) -> list[str]:
        return check_config(write_config(tmp_path, "minimax_m2", rotary_dim=4, **changes), megatron=True, max_length=64)

    with pytest.raises(UserError, match="rotary_dim=4: .* rotates 8 of 8 features; set partial_rotary_factor"):
        notices()
    [notice] = notices(partial_rotary_factor=0.5)
    assert "transformers ignores them" in notice and "rotary_dim=4" in notice


def test_what_transformers_computes_alone_the_other_backend_takes(tmp_path) -> None:
    rope = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1000.0, "original_max_position_embeddings": 16}
    model = write_config(tmp_path, "gemma3_text", rope_parameters={"full_attention": rope, "sliding_attention": {}})
    assert check_config(model, megatron=False, max_length=64) == []
    with pytest.raises(UserError, match=r"attention factors .* policy.megatron_cfg.enabled=false"):
        check_config(model, megatron=True, max_length=64)


@pytest.mark.parametrize("rope_type, limit", [("dynamic", 128), ("longrope", 64)])
def test_rope_that_depends_on_the_batch_is_refused_beyond_its_limit(rope_type: str, limit: int, tmp_path) -> None:
    rope = {"rope_type": rope_type, "factor": 2.0, "rope_theta": 1000.0}
    if rope_type == "longrope":
        rope |= {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "original_max_position_embeddings": 64}
    model = write_config(tmp_path, "llama", rope_parameters=rope)
    for megatron in (True, False):
        check_config(model, megatron=megatron, max_length=limit)
        with pytest.raises(UserError, match=f"'{rope_type}' depends on the batch beyond {limit} tokens"):
            check_config(model, megatron=megatron, max_length=limit + 1)


def test_what_is_not_applied_is_named(tmp_path) -> None:
    changes = {"attention_dropout": 0.1, "eos_token_id": [1, 900], "logit_scale": 0.5, "rope_interleaved": False}
    notices = check_config(write_config(tmp_path, "llama", **changes), megatron=True, max_length=64)
    assert len(notices) == 3
    assert "attention_dropout=0.1" in notices[0] and "eos_token_id=[1, 900]" in notices[1]
    assert "logit_scale=0.5" in notices[2] and "rope_interleaved" not in notices[2]


def test_a_field_that_a_newer_transformers_has_must_be_at_its_default(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(config_gate, "BUILT_FROM", config_gate.BUILT_FROM - {"mlp_bias"})
    check_config(write_config(tmp_path, "llama", mlp_bias=False), megatron=True, max_length=64)
    with pytest.raises(UserError, match="mlp_bias=True: this release does not know the field; the default is False"):
        check_config(write_config(tmp_path, "llama", mlp_bias=True), megatron=True, max_length=64)


@pytest.mark.parametrize(
    "changes, word",
    [
        ({"hidden_act": ["gelu"]}, "hidden_act"),
        ({"num_hidden_layers": "two"}, "num_hidden_layers"),
        ({"hidden_size": 30}, "hidden"),
        ({"model_type": "no_such_model"}, "no_such_model"),
        ({"model_type": None}, "model_type"),
        ({"model_type": "no_such_model", "auto_map": {"AutoConfig": "x.X"}}, "never run"),
        ({"torch_dtype": "no_such_dtype"}, "no_such_dtype"),
        ({"rope_parameters": {"rope_type": "su", "factor": 2.0}}, "'su'"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "factor"),
        ({"rope_scaling": {"type": "linear", "factor": 0.0}}, "rope_parameters"),
        ({"num_attention_heads": 0}, "num_attention_heads"),
        ({"vocab_size": -3}, "vocab_size"),
    ],
)
def test_a_config_that_transformers_does_not_take_is_one_message(changes: dict, word: str, tmp_path) -> None:
    with pytest.raises(UserError) as refused:
        check_config(write_config(tmp_path, "llama", **changes), megatron=True, max_length=64)
    assert word in str(refused.value)


def test_the_legacy_form_of_linear_rope_is_applied_once(tmp_path) -> None:
    model = write_config(tmp_path, "llama", rope_theta=100000, rope_scaling={"factor": 4.0, "type": "linear"})
    frequencies, factor = model.rotary[""]
    expected = 100000.0 ** -(torch.arange(0, 8, 2) / 8) / 4.0
    assert torch.allclose(frequencies, expected) and factor == 1.0


def test_shapes_come_from_the_classes_defaults_too(tmp_path) -> None:
    content = config_content("qwen3", {})
    del content["head_dim"]
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert read_hf_model(tmp_path).shapes.head_dim == 128


def test_the_home_folder_is_resolved(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    write_config(tmp_path / "model", "llama")
    assert read_hf_model("~/model").source == str(tmp_path / "model")


def test_the_empty_model_is_transformers_own(tmp_path) -> None:
    model = write_config(tmp_path, "gemma3_text", tie_word_embeddings=False, return_dict=False)
    config = CONFIG_MAPPING["gemma3_text"](**SIZES | BASE["gemma3_text"], tie_word_embeddings=False)
    wanted = {name: value.shape for name, value in AutoModelForCausalLM.from_config(config).named_parameters()}
    assert {name: value.shape for name, value in model.empty.named_parameters()} == wanted
    assert all(value.is_meta for value in model.empty.parameters())


def test_folders_that_hold_no_model(tmp_path) -> None:
    with pytest.raises(UserError, match=r"has no config\.json"):
        read_hf_model(tmp_path)
    with pytest.raises(UserError, match="there is no such folder"):
        read_hf_model(tmp_path / "missing")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="is no folder or hub model that loads"):
        read_hf_model(tmp_path)
    with pytest.raises(UserError, match="is a file"):
        read_hf_model(tmp_path / "config.json")
