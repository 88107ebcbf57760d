"""Modules that train whole beside adapters: which a recipe or a folder may name, and their names in a PEFT folder."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig as Peft
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from megatron_lora.config.schema_adapters import LoraConfig, PeftConfig
from megatron_lora.conversion.export import import_hf_adapter, merge_lora_to_hf, read_peft_folder, write_peft_folder
from megatron_lora.conversion.hf_model import read_hf_model
from megatron_lora.errors import UserError
from megatron_lora.lora.describe import describe
from megatron_lora.lora.layout import AdapterSpec
from megatron_lora.lora.model_spec import ModelSizes
from megatron_lora.lora.peft_format import to_hf
from megatron_lora.lora.peft_reading import from_hf
from megatron_lora.policy.adapter_start import starting_adapter
from tests.support.models import save_model
from tests.support.reference import make_rows, save_adapter, token_logps
from tests.unit.test_lora_methods import SHAPES

EXPERTS = describe(
    ModelSizes(
        "qwen3_moe", 16, 24, 3, 4, 2, 4, 20, False, num_experts=4, num_experts_per_token=2, moe_ffn_hidden_size=12
    )
)
NAMES = ["embed_tokens", "input_layernorm", "model.norm", "lm_head"]


def planned(names: list[str], shapes: Any = SHAPES, **options: Any) -> AdapterSpec:
    config = PeftConfig(enabled=True, modules_to_save=names, **options)
    return starting_adapter(config, shapes, "no/such-folder").spec


def test_names_paths_and_wildcards() -> None:
    found = planned(["norm", "layers.0.input_layernorm", "*.layers.1.post*", "lm_head"]).saved
    assert found == {
        "model.layers.0.input_layernorm.weight": (16,),
        "model.layers.1.post_attention_layernorm.weight": (16,),
        "model.norm.weight": (16,),
        "lm_head.weight": (20, 16),
    }
    of_megatron = planned(["decoder.final_layernorm", "output_layer", "word_embeddings"]).saved
    assert list(of_megatron) == ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
    plain = planned([])
    assert planned(["norm"]).num_trainable == plain.num_trainable + 16


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        (["nrom"], {}, "near names: norm"),
        (["q_proj"], {}, "is a linear of the layers, which trains through an adapter"),
        (
            ["gate"],
            {"shapes": EXPERTS},
            "'gate' in .*trains through an adapter .so does a router.; name it in target",
        ),
        (["*.mlp.gate"], {"shapes": EXPERTS}, "mlp.gate' in .*trains through an adapter .so does a router"),
        (["lm_head"], {"target_modules": ["lm_head"]}, "trains lm_head whole, and target_modules adapts it"),
    ],
)
def test_what_cannot_train_whole_is_refused(names: list[str], options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        planned(names, **options)


@pytest.mark.parametrize("name", ["embed_tokens", "lm_head", "word_embeddings", "output_layer"])
def test_tied_embeddings_are_refused(name: str) -> None:
    with pytest.raises(UserError, match=r"peft.modules_to_save has .*\(tied\)"):
        planned([name], replace(SHAPES, tied_embeddings=True))


@pytest.mark.parametrize("config", [PeftConfig, LoraConfig])
def test_one_name_has_to_be_a_list(config: Any) -> None:
    with pytest.raises(ValueError, match=r"wanted a list: \[norm\]"):
        config(modules_to_save="norm")
    assert config(modules_to_save=None).modules_to_save == []


def test_a_folder_of_peft_goes_in_and_out(tmp_path: Any) -> None:
    """Bit for bit; a stock peft loads what comes out; merging puts the modules in."""
    base = save_model(tmp_path / "base", "llama3")
    theirs = save_adapter(base, tmp_path / "adapter", modules_to_save=NAMES, share_a=False)
    config, tensors = read_peft_folder(theirs)
    spec, fused = from_hf(config, tensors, read_hf_model(base).shapes, str(base))
    assert len(spec.saved) == 3 + spec.shapes.num_layers
    written, again = to_hf(AdapterSpec.from_json(spec.to_json()), fused)
    assert set(again) == set(tensors)
    assert all(torch.equal(again[name], value) for name, value in tensors.items())
    write_peft_folder(tmp_path / "out", written, again)
    step, merged = tmp_path / "step", tmp_path / "merged"
    import_hf_adapter(hf_adapter=str(theirs), adapter_ckpt_path=str(step), hf_model_name=str(base))
    merge_lora_to_hf(adapter_ckpt=str(step), hf_ckpt_path=str(merged), check_logits=True, show_progress=False)
    logps = []
    with torch.no_grad():
        for folder in (theirs, tmp_path / "out", None):
            model: Any = AutoModelForCausalLM.from_pretrained(base if folder else merged)
            model = PeftModel.from_pretrained(model, folder) if folder else model
            logps.append(torch.cat([token_logps(model, row) for row in make_rows(2, 101)]))
    assert torch.equal(logps[0], logps[1])
    torch.testing.assert_close(logps[2], logps[0], rtol=1e-4, atol=1e-4)
    with pytest.raises(UserError, match="set it to"):
        starting_adapter(PeftConfig(init_adapter=str(tmp_path / "out")), spec.shapes, str(base))


def test_a_folders_names_mean_what_peft_means_by_them(tmp_path: Any) -> None:
    """`norm` is every module whose name ends so there, and the last norm alone in a recipe without a folder."""
    base = save_model(tmp_path / "base", "llama3")
    theirs = save_adapter(base, tmp_path / "adapter", modules_to_save=["norm"], share_a=False)
    shapes = read_hf_model(base).shapes

    def start(names: list[str]) -> AdapterSpec:
        return starting_adapter(PeftConfig(init_adapter=str(theirs), modules_to_save=names), shapes, str(base)).spec

    assert len(start(["norm"]).saved) == 2 * shapes.num_layers + 1
    assert start(["norm", "*_layernorm"]).saved == start(["norm"]).saved
    with pytest.raises(UserError, match=r"modules_to_save=\['norm'\] whole, and .*=\[\]; set it to \['norm'\]"):
        start([])


def test_a_folder_for_other_modules_is_refused(tmp_path: Any) -> None:
    base = save_model(tmp_path / "base", "llama3")
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), Peft(target_modules=["q_proj"], modules_to_save=["mlp.up_proj"])
    )
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(UserError, match="is a linear of the layers"):
        import_hf_adapter(
            hf_adapter=str(tmp_path / "adapter"), adapter_ckpt_path=str(tmp_path / "step"), hf_model_name=str(base)
        )
