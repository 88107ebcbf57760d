"""Vision-language models: the language model within is what is described, trained and exported; the rest stays."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from megatron_lora.config.schema import PolicyConfig
from megatron_lora.conversion.export import export_lora_adapter_to_hf, import_hf_adapter, merge_lora_to_hf
from megatron_lora.conversion.fingerprint import fingerprint_base
from megatron_lora.conversion.hf_model import read_hf_model
from megatron_lora.conversion.inventory import expected_tensors, open_model
from megatron_lora.conversion.model_source import open_checkpoint
from megatron_lora.conversion.whole_model import convert_hf_to_megatron, convert_megatron_to_hf
from megatron_lora.errors import UserError
from megatron_lora.policy.weights_check import check_base, read_base
from megatron_lora.rollout.engines import ENGINES
from megatron_lora.runtime.world import World
from tests.support.models import family_config, random_model

FILE = "model.safetensors"
# As their files name the language model: those of before transformers 4.52, Qwen2-VL's, and the whole model's own.
FAMILIES = (
    "gemma3_tower",
    pytest.param("qwen2_vl_tower", marks=pytest.mark.long),
    pytest.param("qwen3_vl_tower", marks=pytest.mark.long),
    "qwen3_5_tower",
    # Files with one tensor of all experts of a layer.
    pytest.param("qwen3_5_moe_tower", marks=pytest.mark.long),
)
TARGETS = r".*language_model.*\.(q_proj|v_proj|o_proj|up_proj|in_proj_qkv|out_proj)"
# peft says so where a vision tower's linears have the same names.
pytestmark = pytest.mark.filterwarnings("error:Found missing adapter keys")
IDS = torch.arange(3, 27)[None]


@pytest.fixture(scope="module", params=FAMILIES)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / request.param
    random_model(family_config(request.param)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(base: Path) -> Path:
    """A random adapter that peft wrote of the whole model."""
    folder = base.parent / f"{base.name}-adapter"
    model: Any = get_peft_model(load(base), LoraConfig(r=3, lora_alpha=6, target_modules=TARGETS))
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="module")
def checkpoint(base: Path, adapter: Path) -> Path:
    """The same as this project's checkpoint."""
    folder = base.parent / f"{base.name}-checkpoint"
    import_hf_adapter(hf_adapter=str(adapter), adapter_ckpt_path=str(folder), hf_model_name=str(base))
    return folder


def load(folder: Path) -> Any:
    return AutoModelForImageTextToText.from_pretrained(folder, attn_implementation="eager").eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def policy(folder: Path, backend: str = "megatron", **more: Any) -> PolicyConfig:
    section: dict[str, Any] = {"megatron_cfg": {"enabled": True, "peft": {"enabled": True}}}
    if backend == "dtensor":
        section = {"megatron_cfg": {"enabled": False}, "dtensor_cfg": {"lora_cfg": {"enabled": True}}}
    values = {"model_name": str(folder), "precision": "float32", "max_total_sequence_length": 32}
    return PolicyConfig.model_validate(values | section | more)


def changed(folder: Path, out: Path, **text: Any) -> Path:
    """The model with other values in its text config."""
    out.mkdir()
    content = json.loads((folder / "config.json").read_text())
    content["text_config"] |= text
    (out / "config.json").write_text(json.dumps(content))
    (out / FILE).symlink_to(folder / FILE)
    return out


@pytest.mark.parametrize("backend", ["megatron", "dtensor"])
def test_taken_with_one_notice(base: Path, backend: str) -> None:
    config = policy(base, backend)
    [notice] = check_base(config, read_base(config))
    kept = sum("language_model" not in name and "lm_head" not in name for name, _ in load(base).named_parameters())
    assert f"its language model trains, on text; the other {kept} tensors" in notice


def test_names_are_the_whole_models(base: Path) -> None:
    model, weights = open_model(base, base)
    theirs = {name: tuple(value.shape) for name, value in load(base).state_dict().items()}
    described = expected_tensors(model)
    assert "model.language_model.layers.1.self_attn.q_proj.weight" in described
    assert ("lm_head.weight" in described) != model.shapes.tied_embeddings
    # What one tensor of all experts holds is described expert by expert.
    plain = {name: shape for name, shape in described.items() if ".experts." not in name}
    assert plain.items() <= theirs.items()
    for name in plain:
        assert torch.equal(weights.read(name), load_file(base / FILE)[weights.file_name(name)])


def test_there_and_back(base: Path, tmp_path: Path) -> None:
    folder, again = tmp_path / "megatron", tmp_path / "again"
    convert_hf_to_megatron(hf_model_name=str(base), megatron_ckpt_path=str(folder), show_progress=False)
    convert_megatron_to_hf(megatron_ckpt_path=str(folder), hf_ckpt_path=str(again), show_progress=False)
    first, second = load_file(base / FILE), load_file(again / FILE)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    assert fingerprint_base(again) == fingerprint_base(base)
    assert open_checkpoint(folder).weights.entries.keys() == open_model(base, base)[1].entries.keys()


def test_an_adapter_has_the_names_of_the_whole_model(
    base: Path, adapter: Path, checkpoint: Path, tmp_path: Path
) -> None:
    export_lora_adapter_to_hf(adapter_ckpt=str(checkpoint), hf_ckpt_path=str(tmp_path / "hf"))
    file = "adapter_model.safetensors"
    theirs, ours = load_file(adapter / file), load_file(tmp_path / "hf" / file)
    assert theirs.keys() == ours.keys() and all(torch.equal(theirs[name], ours[name]) for name in theirs)
    wanted = logits(PeftModel.from_pretrained(load(base), str(adapter)))
    found = logits(PeftModel.from_pretrained(load(base), str(tmp_path / "hf")))
    config = json.loads((tmp_path / "hf" / "adapter_config.json").read_text())
    assert config["target_modules"].startswith(r"model\.language_model\.")
    assert torch.equal(found, wanted) and (wanted - logits(load(base))).abs().max() > 0.1


@pytest.mark.parametrize("through", ["folder", "checkpoint"])
def test_a_merged_model_keeps_what_sees(
    base: Path, adapter: Path, checkpoint: Path, through: str, tmp_path: Path
) -> None:
    given = base
    if through == "checkpoint":
        given = tmp_path / "megatron"
        convert_hf_to_megatron(hf_model_name=str(base), megatron_ckpt_path=str(given), show_progress=False)
    merged = tmp_path / "merged"
    merge_lora_to_hf(
        adapter_ckpt=str(checkpoint),
        hf_ckpt_path=str(merged),
        base_ckpt=str(given),
        check_logits=True,
        show_progress=False,
    )
    before, after = load_file(base / FILE), load_file(merged / FILE)
    assert before.keys() == after.keys()
    adapted = {name for name in before if not torch.equal(before[name], after[name])}
    assert adapted and all("layers" in name and "proj" in name and "vis" not in name for name in adapted)
    wanted = logits(PeftModel.from_pretrained(load(base), str(adapter)))
    assert (logits(load(merged)) - wanted).abs().max() < 1e-4
    assert json.loads((merged / "config.json").read_text()) == json.loads((base / "config.json").read_text())


def test_overrides_are_of_the_language_model(base: Path) -> None:
    model = read_base(policy(base, hf_config_overrides={"rms_norm_eps": 0.01}))
    assert model.config.rms_norm_eps == 0.01
    with pytest.raises(UserError, match="hf_config_overrides.rms_norm_epsilon: transformers' .*Text"):
        read_base(policy(base, hf_config_overrides={"rms_norm_epsilon": 0.01}))


def test_full_fine_tuning_is_refused(base: Path) -> None:
    config = policy(base, megatron_cfg={"enabled": True, "peft": {"enabled": False}})
    with pytest.raises(UserError, match="a vision-language model, whose language model trains through adapters alone"):
        check_base(config, read_base(config))


@pytest.mark.parametrize("engine", ["vllm", "servers"])
def test_vllm_is_refused_for_rollouts(base: Path, engine: str) -> None:
    with pytest.raises(UserError, match="is a vision-language model, .* set policy.generation.backend=megatron"):
        ENGINES[engine].check(policy(base), World.alone())


def test_a_missing_tensor_is_named(base: Path, tmp_path: Path) -> None:
    tensors = load_file(base / FILE)
    lost = next(name for name in tensors if name.endswith("layers.1.self_attn.q_proj.weight") and "vis" not in name)
    del tensors[lost]
    folder = changed(base, tmp_path / "model")
    (folder / FILE).unlink()
    save_file(tensors, folder / FILE)
    with pytest.raises(UserError, match="missing model.language_model.layers.1.self_attn.q_proj.weight"):
        check_base(policy(folder), read_base(policy(folder)))


def test_a_cap_that_the_whole_model_leaves_out_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    config = family_config("gemma3_tower")
    config.text_config.final_logit_softcapping = 3.0
    random_model(config).save_pretrained(folder)
    with pytest.raises(UserError, match="final_logit_softcapping=3.0: transformers' vision-language class"):
        check_base(policy(folder), read_base(policy(folder)))


def test_a_config_of_before_text_config(tmp_path: Path) -> None:
    """Qwen2.5-VL's published config.json has the language model's fields beside those of the whole."""
    new = family_config("qwen2_5_vl_tower")
    flat = new.text_config.to_dict() | {"model_type": "qwen2_5_vl", "vision_config": new.vision_config.to_dict()}
    rope = flat.pop("rope_parameters")
    flat |= {
        "rope_theta": rope["rope_theta"],
        "rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]},
    }
    (tmp_path / "config.json").write_text(json.dumps(flat | {"tie_word_embeddings": True}))
    model = read_hf_model(tmp_path)
    assert model.family == "qwen2" and model.shapes.tied_embeddings
    assert model.shapes.hidden_size == new.text_config.hidden_size
    assert model.config.rope_parameters == {"rope_type": "default", "rope_theta": rope["rope_theta"]}
