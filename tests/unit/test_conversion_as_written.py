"""What was written is what the converters read: a changed bit in a checkpoint, an export or an import is refused by
name, and a killed converter leaves nothing that stays."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_lora.checksums import seal
from megatron_lora.conversion.adapter_checkpoint import write_adapter
from megatron_lora.conversion.export import (
    export_lora_adapter_to_hf,
    import_hf_adapter,
    merge_lora_to_hf,
    read_peft_folder,
)
from megatron_lora.errors import UserError
from megatron_lora.lora.describe import describe_config
from megatron_lora.lora.layout import AdapterSpec, build_layout, module_name
from tests.support.launch import ROOT

CONFIG = {
    "model_type": "llama", "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 2, "vocab_size": 13, "tie_word_embeddings": False,
}  # fmt: skip


@pytest.fixture
def step(tmp_path: Path) -> Path:
    """A sealed step folder of a small adapter; its base has a config and no weights."""
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text(json.dumps(CONFIG))
    shapes = describe_config(CONFIG)
    names = [module_name(kind, layer) for layer in range(2) for kind in shapes.kinds[:-1]]
    spec = AdapterSpec(str(base), shapes, [build_layout(name, 3, 6, shapes) for name in names])
    torch.manual_seed(0)
    tensors = {name: torch.randn(shape) for name, shape in spec.factor_shapes().items()}
    folder = tmp_path / "step_3"
    write_adapter(folder / "policy" / "weights", spec, tensors)
    seal(folder)
    return folder


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def export(step: Path, out: Path) -> Path:
    return Path(export_lora_adapter_to_hf(adapter_ckpt=str(step), hf_ckpt_path=str(out)))


@pytest.mark.parametrize("share", [0.1, 0.35, 0.6, 0.9])
@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "adapter.json", "metadata.json"])
def test_a_changed_bit_in_a_checkpoint_is_refused(step: Path, tmp_path: Path, name: str, share: float):
    path = step / "policy" / "weights" / name
    flip(path, int(path.stat().st_size * share))
    for convert in (export_lora_adapter_to_hf, merge_lora_to_hf):
        with pytest.raises(UserError):
            convert(adapter_ckpt=str(step), hf_ckpt_path=str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_numbers_that_read_well_are_refused_too(step: Path, tmp_path: Path):
    """A bit of a tensor's data: nothing else than the checksum tells."""
    path = step / "policy" / "weights" / "__0_0.distcp"
    content = path.read_bytes()
    needle = export(step, tmp_path / "whole")
    value = next(iter(load_file(needle / "adapter_model.safetensors").values())).numpy().tobytes()[:16]
    assert content.count(value) == 1
    flip(path, content.index(value))
    with pytest.raises(UserError, match=r"step_3 is not as it was written: policy/weights/__0_0.distcp has another"):
        export(step, tmp_path / "out")


def test_an_exported_adapter_is_checked_by_its_own_fingerprint(step: Path, tmp_path: Path):
    out = export(step, tmp_path / "adapter")
    read_peft_folder(out)
    weights = out / "adapter_model.safetensors"
    flip(weights, weights.stat().st_size - 5)
    with pytest.raises(UserError, match="adapter_model.safetensors is not as it was written: .*fingerprint"):
        import_hf_adapter(hf_adapter=str(out), adapter_ckpt_path=str(tmp_path / "imported"))
    # Another tool's copy has no fingerprint: there is nothing to compare.
    save_file(load_file(weights), weights)
    read_peft_folder(out)


def test_an_import_is_checked_when_it_is_read(step: Path, tmp_path: Path):
    adapter = export(step, tmp_path / "adapter")
    imported = Path(import_hf_adapter(hf_adapter=str(adapter), adapter_ckpt_path=str(tmp_path / "imported")))
    again = export(imported, tmp_path / "again")
    assert (
        load_file(again / "adapter_model.safetensors").keys() == load_file(adapter / "adapter_model.safetensors").keys()
    )
    flip(imported / "policy" / "weights" / "__0_0.distcp", 3000)
    with pytest.raises(UserError, match="imported.* (is not as it was written|is damaged)"):
        export(imported, tmp_path / "out")


def test_a_swapped_hf_adapter_of_a_step_is_refused(step: Path, tmp_path: Path):
    shutil.copytree(export(step, tmp_path / "adapter"), step / "hf_adapter")
    seal(step)
    read_peft_folder(step / "hf_adapter")
    config = step / "hf_adapter" / "adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": 6', '"lora_alpha": 60'))
    with pytest.raises(UserError, match="hf_adapter/adapter_config.json has another content"):
        read_peft_folder(step / "hf_adapter")
    # Edited on purpose: from a copy.
    shutil.copytree(step / "hf_adapter", tmp_path / "mine")
    assert read_peft_folder(tmp_path / "mine")[0]["lora_alpha"] == 60


KILLED = """
import sys, time
from pathlib import Path
from megatron_lora.conversion.output_folder import output_folder
with output_folder(Path(sys.argv[1])) as out:
    (out / "half").write_text("x")
    print("writing", flush=True)
    time.sleep(600)
"""


def test_what_a_killed_converter_left_goes_with_the_next_one(step: Path, tmp_path: Path):
    out = tmp_path / "out[1]"
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(out)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "writing\n"
    [left] = tmp_path.glob(".out*")
    export(step, tmp_path / "other")
    with pytest.raises(UserError, match="exists already"):
        export(step, tmp_path / "other")
    assert left.is_dir(), "a process that lives keeps its own"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    elsewhere = left.with_name(f".{out.name}.partial-another{socket.gethostname()}-1")
    elsewhere.mkdir()
    export(step, out)
    assert not left.exists() and elsewhere.is_dir()
