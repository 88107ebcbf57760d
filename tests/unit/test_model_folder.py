"""Model folders with something wrong, planted one at a time: what is printed, before any weight is loaded.

`FAULTS` is the table: what was planted, how, and the words of the one message.
"""

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from megatron_lora.config.loader import check_recipe
from megatron_lora.conversion.inventory import expected_tensors, open_model
from megatron_lora.conversion.model_names import hf_shape, model_parameters, shard_parameter, unshard_parameter
from megatron_lora.conversion.safetensors_io import SafetensorsFolder
from megatron_lora.conversion.whole_model import convert_hf_to_megatron, convert_megatron_to_hf
from megatron_lora.errors import UserError
from megatron_lora.lora.families import FILE_NAMES
from megatron_lora.policy.weights_check import check_base, read_base
from tests.support.config_flips import BASE, GATED_FAMILIES, RARE_FAMILIES, SIZES

FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
GATE, EMBEDDING = "model.layers.1.mlp.gate_proj.weight", "model.embed_tokens.weight"
Change = Callable[[Path], object]


def save(folder: Path, family: str = "llama", seed: int = 0, shard: str = "5GB", **config: object) -> Path:
    torch.manual_seed(seed)
    made = CONFIG_MAPPING[family](**{**SIZES, **BASE[family], **config})
    AutoModelForCausalLM.from_config(made).save_pretrained(folder, max_shard_size=shard)
    return folder


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Change:
    def apply(folder: Path) -> None:
        stored = load_file(folder / FILE)
        change(stored)
        save_file({name: value.contiguous() for name, value in stored.items()}, folder / FILE)

    return apply


def renamed(old: str, new: str) -> Change:
    return tensors(lambda t: [t.__setitem__(name.replace(old, new, 1), t.pop(name)) for name in list(t) if old in name])


def config(**changes: object) -> Change:
    def apply(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return apply


def cast(name: str, dtype: torch.dtype) -> Change:
    return tensors(lambda t: t.__setitem__(name, t[name].to(dtype)))


def drop(name: str) -> Change:
    return tensors(lambda t: t.pop(name))


def add(name: str, *shape: int) -> Change:
    return tensors(lambda t: t.__setitem__(name, torch.zeros(*shape)))


def header(change: Callable[[dict], object]) -> Change:
    """Another header over the same data."""

    def apply(folder: Path) -> None:
        raw = (folder / FILE).read_bytes()
        length = struct.unpack("<Q", raw[:8])[0]
        content = json.loads(raw[8 : 8 + length])
        change(content)
        new = json.dumps(content).encode()
        (folder / FILE).write_bytes(struct.pack("<Q", len(new)) + new + raw[8 + length :])

    return apply


def sharded(folder: Path) -> None:
    (folder / FILE).unlink()
    save(folder, shard="20KB")


def twice_in_shards(folder: Path) -> None:
    sharded(folder)
    first, last = (
        folder / name for name in sorted({*json.loads((folder / INDEX).read_text())["weight_map"].values()})[:2]
    )
    stored = load_file(last)
    name = next(iter(load_file(first)))
    save_file(stored | {name: load_file(first)[name] + 1}, last)


def lost_shard(folder: Path) -> None:
    sharded(folder)
    sorted(folder.glob("model-*.safetensors"))[1].unlink()


def only_bin(folder: Path) -> None:
    torch.save(load_file(folder / FILE), folder / "pytorch_model.bin")
    (folder / FILE).unlink()


def gptq_tensors(folder: Path) -> None:
    drop(GATE)(folder)
    add("model.layers.1.mlp.gate_proj.qweight", 4, 48)(folder)
    cast("model.layers.1.mlp.gate_proj.qweight", torch.int32)(folder)


def write(name: str, text: str) -> Change:
    return lambda folder: (folder / name).write_text(text)


FAULTS: dict[str, tuple[Change, tuple[str, ...]]] = {
    "a missing matrix": (drop(GATE), ("missing", GATE)),
    "a missing embedding": (drop(EMBEDDING), ("missing", EMBEDDING)),
    "a missing norm": (drop("model.norm.weight"), ("missing", "model.norm.weight")),
    "a missing head": (drop("lm_head.weight"), ("missing", "lm_head.weight")),
    "names without model.": (renamed("model.", ""), ("missing", "there is", "another prefix")),
    "names under module.": (renamed("", "module."), (EMBEDDING, "module.", "another prefix")),
    "names of another family": (renamed("mlp.up_proj", "mlp.w3"), ("missing", "mlp.up_proj", "unexpected", "mlp.w3")),
    "biases that the config does not ask for": (
        add("model.layers.0.self_attn.q_proj.bias", 32),
        ("unexpected", "q_proj.bias"),
    ),
    "biases that the config asks for": (config(attention_bias=True), ("missing", "q_proj.bias")),
    "a layer too many": (add("model.layers.2.input_layernorm.weight", 32), ("unexpected", "model.layers.2")),
    "a layer too few": (config(num_hidden_layers=3), ("missing", "model.layers.2")),
    "a matrix of another shape": (
        tensors(lambda t: t.__setitem__(GATE, torch.zeros(48, 40))),
        ("shape", GATE, "[48, 40]", "[48, 32]"),
    ),
    "an embedding of another vocabulary": (config(vocab_size=120), ("shape", EMBEDDING, "[101, 32]", "[120, 32]")),
    "a matrix in int8": (cast(GATE, torch.int8), (GATE, "int8")),
    "a matrix in fp8": (cast(GATE, torch.float8_e4m3fn), (GATE, "float8_e4m3fn")),
    "a matrix of an unknown type": (header(lambda h: h[GATE].__setitem__("dtype", "F4")), (GATE, "F4")),
    "a matrix that does not fill its bytes": (header(lambda h: h[GATE].__setitem__("shape", [48, 31])), (FILE, GATE)),
    "a header that is no JSON": (
        lambda folder: (folder / FILE).write_bytes(struct.pack("<Q", 4) + b"{{{{" + bytes(64)),
        (FILE, "header"),
    ),
    "a file cut short": (lambda folder: os.truncate(folder / FILE, 5000), (FILE, "truncated")),
    "no weights": (lambda folder: (folder / FILE).unlink(), (FILE, INDEX)),
    "weights in pytorch_model.bin alone": (only_bin, ("pytorch_model.bin", "save_pretrained")),
    "a shard that is not there": (lost_shard, ("model-00002", "does not exist")),
    "an index that is no JSON": (
        lambda folder: (sharded(folder), write(INDEX, "{")(folder)),
        (INDEX, "damaged"),
    ),
    "an index without files": (
        lambda folder: (sharded(folder), write(INDEX, '{"weight_map": {}}')(folder)),
        (INDEX, "damaged"),
    ),
    "a tensor twice, and different": (twice_in_shards, ("model-00001", "model-00002", "differ")),
    "a tied head that differs": (config(tie_word_embeddings=True), ("lm_head.weight", EMBEDDING, "differ")),
    "a GPTQ config": (config(quantization_config={"quant_method": "gptq", "bits": 4}), ("quantization_config", "gptq")),
    "an fp8 config": (config(quantization_config={"quant_method": "fp8"}), ("quantization_config", "fp8")),
    "GPTQ tensors without a config": (gptq_tensors, ("missing", "gate_proj.weight", "gate_proj.qweight")),
    "an adapter beside the model": (write("adapter_config.json", "{}"), ("adapter_config.json",)),
    "weights under another file's name": (config(transformers_weights="other.safetensors"), ("transformers_weights",)),
    "no config.json": (lambda folder: (folder / "config.json").unlink(), ("config.json",)),
    "a config that is no JSON": (write("config.json", "{"), ("config",)),
    "a config that is a list": (write("config.json", "[]"), ("config",)),
    "code of its own": (config(model_type="mine", auto_map={"AutoConfig": "x.X"}), ("mine", "never run")),
}


def check(folder: Path, backend: str) -> list[str]:
    megatron = {"enabled": backend == "megatron"}
    policy = {"model_name": str(folder), "max_total_sequence_length": 64, "megatron_cfg": megatron}
    recipe = {"sft": {}, "policy": policy, "data": {"train": {"dataset_name": "gsm8k"}}}
    policy = check_recipe(recipe).recipe.policy
    return check_base(policy, read_base(policy))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("llama") / "model")


@pytest.mark.parametrize("backend", ["megatron", "dtensor"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_told_in_one_message(fault: str, backend: str, llama: Path, tmp_path: Path) -> None:
    plant, words = FAULTS[fault]
    folder = Path(shutil.copytree(llama, tmp_path / "model"))
    assert check(folder, backend) == []
    plant(folder)
    with pytest.raises(UserError) as told:
        check(folder, backend)
    assert all(word in str(told.value) for word in words), told.value
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("fault", ["a missing matrix", "names without model.", "a GPTQ config", "a matrix in int8"])
def test_conversion_tells_the_same(fault: str, llama: Path, tmp_path: Path) -> None:
    plant, words = FAULTS[fault]
    folder = Path(shutil.copytree(llama, tmp_path / "model"))
    plant(folder)
    with pytest.raises(UserError) as told:
        convert_hf_to_megatron(hf_model_name=str(folder), megatron_ckpt_path=str(tmp_path / "out"), show_progress=False)
    assert all(word in str(told.value) for word in words), told.value
    assert not (tmp_path / "out").exists()


TAKEN: dict[str, Change] = {
    "no architectures": config(architectures=None),
    "the architecture of another head": config(architectures=["LlamaForSequenceClassification"]),
    "code beside a known family": config(auto_map={"AutoModelForCausalLM": "modeling_x.X"}),
    "rotary frequencies as buffers": add("model.layers.0.self_attn.rotary_emb.inv_freq", 4),
    "one matrix in another dtype": cast(GATE, torch.bfloat16),
    "shards": sharded,
}


@pytest.mark.parametrize("backend", ["megatron", "dtensor"])
@pytest.mark.parametrize("case", TAKEN)
def test_folders_that_are_taken(case: str, backend: str, llama: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(llama, tmp_path / "model"))
    TAKEN[case](folder)
    assert check(folder, backend) == []


def test_a_tied_head_that_is_stored_twice_is_taken(tmp_path: Path) -> None:
    folder = save(tmp_path / "model", tie_word_embeddings=True)
    tensors(lambda t: t.__setitem__("lm_head.weight", t[EMBEDDING].clone()))(folder)
    assert check(folder, "megatron") == []


def test_the_single_file_comes_before_an_index(llama: Path, tmp_path: Path) -> None:
    folder = save(tmp_path / "model", seed=7, shard="20KB")
    shutil.copy(llama / FILE, folder)
    _, weights = open_model(folder, folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder).get_parameter(GATE)
    assert torch.equal(weights.read(GATE), theirs) and list(weights.shards) == [FILE]


def test_a_tensor_twice_and_equal_is_one_tensor(llama: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(llama, tmp_path / "model"))
    sharded(folder)
    files = sorted({*json.loads((folder / INDEX).read_text())["weight_map"].values()})
    first = load_file(folder / files[0])
    save_file(load_file(folder / files[1]) | dict(list(first.items())[:1]), folder / files[1])
    weights = SafetensorsFolder(folder)
    assert sorted(name for names in weights.shards.values() for name in names) == sorted(weights.entries)


FURTHER = "model.layers.4.eh_proj.weight"


def test_layers_that_predict_further_tokens_are_kept(tmp_path: Path) -> None:
    folder = save(tmp_path / "model", "glm4_moe", num_hidden_layers=4)
    add(FURTHER, 8)(folder)
    with pytest.raises(UserError, match=f"unexpected {FURTHER}"):
        check(folder, "megatron")
    config(num_nextn_predict_layers=1)(folder)
    for backend in ("megatron", "dtensor"):
        [notice] = check(folder, backend)
        assert f"1 tensors of {folder} ({FURTHER}, ...)" in notice
    checkpoint, again = str(tmp_path / "checkpoint"), tmp_path / "again"
    convert_hf_to_megatron(hf_model_name=str(folder), megatron_ckpt_path=checkpoint, show_progress=False)
    convert_megatron_to_hf(megatron_ckpt_path=checkpoint, hf_ckpt_path=str(again), show_progress=False)
    first, second = load_file(folder / FILE), load_file(again / FILE)
    assert first.keys() == second.keys() and FURTHER in second
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("family", [family for family in FILE_NAMES if family in RARE_FAMILIES])
def test_names_of_files_come_back(family: str, tmp_path: Path) -> None:
    """transformers renames when it reads and writes: an adapter's names are its model's, an export's the files'."""
    folder, again = save(tmp_path / "model", family), tmp_path / "again"
    stored = load_file(folder / FILE)
    modules = {name for name, _ in AutoModelForCausalLM.from_pretrained(folder).named_modules()}
    _, weights = open_model("made here", folder)
    attention = {name.removesuffix(".weight") for name in weights.entries if ".self_attn." in name}
    shared = {name.removesuffix(".weight") for name in weights.entries if "shared_experts" in name}
    assert attention and attention | shared <= modules
    assert set(stored) - set(weights.entries) and {weights.file_name(name) for name in weights.entries} == set(stored)
    convert_hf_to_megatron(
        hf_model_name=str(folder), megatron_ckpt_path=str(tmp_path / "checkpoint"), show_progress=False
    )
    convert_megatron_to_hf(
        megatron_ckpt_path=str(tmp_path / "checkpoint"), hf_ckpt_path=str(again), show_progress=False
    )
    written = load_file(again / FILE)
    assert written.keys() == stored.keys() and all(torch.equal(written[name], stored[name]) for name in stored)


RECURRENT = ("qwen3_next", "qwen3_5_text", "nemotron_h")
BIASED = [("llama", {"attention_bias": True}), ("llama", {"mlp_bias": True}), ("qwen3", {"attention_bias": True})]
BIASED += [("gemma3_text", {"attention_bias": True, "tie_word_embeddings": False}), ("qwen2", {"attention_bias": True})]


@pytest.mark.parametrize(
    "family, changes", [(family, {}) for family in (*GATED_FAMILIES, *RARE_FAMILIES, *RECURRENT)] + BIASED
)
def test_the_table_of_names_is_the_models_own(family: str, changes: dict, tmp_path: Path) -> None:
    model, _ = open_model("made here", save(tmp_path / "model", family, **changes))
    shapes = model.shapes
    table = {
        name: hf_shape(parameter, name, shapes) for parameter in model_parameters(shapes) for name in parameter.hf_names
    }
    assert table == expected_tensors(model)
    for parameter in model_parameters(shapes):
        whole = torch.randn(parameter.shape)
        rows = -(-parameter.shape[0] // 2)
        parts = [shard_parameter(parameter, whole, rank, 2, rows, shapes) for rank in range(2)]
        assert torch.equal(unshard_parameter(parameter, parts, shapes), whole), parameter.name
