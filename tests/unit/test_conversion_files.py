"""Safetensors streaming, fingerprints and the all-or-nothing output folder."""

import json
import os
import re
import resource
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_lora.conversion.adapter_checkpoint import weights_folder
from megatron_lora.conversion.export import read_peft_folder
from megatron_lora.conversion.fingerprint import fingerprint_adapter, fingerprint_base
from megatron_lora.conversion.output_folder import output_folder
from megatron_lora.conversion.safetensors_io import (
    SafetensorsFolder,
    read_header,
    read_tensor,
    write_tensor_dict,
    write_tensors,
)
from megatron_lora.conversion.shard_writer import check_shards, write_shards
from megatron_lora.errors import UserError


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "a": torch.randn(3, 5),
        "b": torch.randn(70, 40).bfloat16(),
        "c.d": torch.arange(6),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 4),
    }


def test_what_is_written_the_library_reads_and_the_other_way_round(tmp_path, tensors):
    write_tensor_dict(tmp_path / "ours.safetensors", tensors, {"key": "value"})
    theirs = load_file(tmp_path / "ours.safetensors")
    assert theirs.keys() == tensors.keys() and all(torch.equal(theirs[name], tensors[name]) for name in tensors)
    save_file(tensors, tmp_path / "theirs.safetensors")
    entries, _ = read_header(tmp_path / "theirs.safetensors")
    assert all(torch.equal(read_tensor(entries[name]), tensors[name]) for name in tensors)
    assert read_header(tmp_path / "ours.safetensors")[1]["key"] == "value"


def test_a_stream_that_is_not_the_announced_one_is_refused(tmp_path):
    shapes = {"a": (torch.float32, (2,)), "b": (torch.float32, (3,))}
    with pytest.raises(ValueError, match="not what the header says"):
        write_tensors(tmp_path / "x", shapes, [("a", torch.zeros(3))])
    with pytest.raises(ValueError, match="fewer tensors"):
        write_tensors(tmp_path / "x", shapes, [("a", torch.zeros(2))])


def test_a_tensor_is_read_and_written_in_pieces(tmp_path, tensors):
    """One of all experts of a layer, between others."""
    packed = torch.arange(24.0).view(2, 4, 3)
    save_file({"a": tensors["a"], "packed": packed, "z": tensors["c.d"]}, tmp_path / "model.safetensors")
    folder = SafetensorsFolder(tmp_path)
    order = [name for name in folder.shards["model.safetensors"] if name != "packed"]
    pieces = {f"{expert}.{part}": (2, 3) for expert in range(2) for part in ("gate", "up")}
    folder.split("packed", pieces)
    assert torch.equal(torch.cat([folder.read(name) for name in pieces]), packed.view(8, 3))
    described = {name: (entry.dtype, entry.shape) for name, entry in folder.entries.items()}
    out = tmp_path / "out"
    out.mkdir()
    write_shards(out, folder, described, folder.read, title="", show_progress=False)
    check_shards(out, folder, described)
    assert [name for name in folder.shards["model.safetensors"] if name not in pieces] == order
    written = load_file(out / "model.safetensors")
    assert written.keys() == {"a", "packed", "z"} and torch.equal(written["packed"], packed)
    whole = {"packed": (torch.float32, (2, 4, 3))}
    for parts in ([packed[0]], [packed[0], packed[0], packed[0]], [packed.view(4, 2, 3)]):
        with pytest.raises(ValueError):
            write_tensors(tmp_path / "x", whole, (("packed", part) for part in parts))


@pytest.mark.parametrize("keep", [4, 40, -8])
def test_a_truncated_file_is_refused(tmp_path, tensors, keep):
    path = tmp_path / "model.safetensors"
    write_tensor_dict(path, tensors)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match="model.safetensors is truncated"):
        SafetensorsFolder(tmp_path)


def test_a_folder_without_safetensors_or_with_a_missing_shard_is_refused(tmp_path):
    with pytest.raises(UserError, match="must be in safetensors"):
        SafetensorsFolder(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "gone.safetensors"}}))
    with pytest.raises(UserError, match="gone.safetensors does not exist"):
        SafetensorsFolder(tmp_path)


def write_sharded(folder, tensors, num_files):
    folder.mkdir()
    names = sorted(tensors)
    weight_map = {}
    for number in range(num_files):
        part = {name: tensors[name] for name in names[number::num_files]}
        write_tensor_dict(folder / f"part-{number}.safetensors", part)
        weight_map |= dict.fromkeys(part, f"part-{number}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_the_base_fingerprint_ignores_sharding_and_sees_weights(tmp_path, tensors):
    write_sharded(tmp_path / "two", tensors, 2)
    write_sharded(tmp_path / "three", tensors, 3)
    assert fingerprint_base(tmp_path / "two") == fingerprint_base(tmp_path / "three")
    write_sharded(tmp_path / "other", tensors | {"b": tensors["b"] * 1.01}, 2)
    assert fingerprint_base(tmp_path / "other") != fingerprint_base(tmp_path / "two")


def test_the_adapter_fingerprint_sees_every_bit_and_no_order(tensors):
    reordered = dict(reversed(tensors.items()))
    assert fingerprint_adapter(reordered) == fingerprint_adapter(tensors)
    changed = tensors["b"].clone()
    changed[69, 39] = torch.nextafter(changed[69, 39], torch.tensor(9.0).bfloat16())
    assert fingerprint_adapter(tensors | {"b": changed}) != fingerprint_adapter(tensors)


def test_a_folder_beside_the_wanted_one_is_answered_with_that(tmp_path):
    for step in (2, 10):
        for name in ("policy/weights/adapter.json", "hf_adapter/adapter_config.json"):
            path = tmp_path / f"run/step_{step}" / name
            path.parent.mkdir(parents=True)
            path.touch()
    step = tmp_path / "run/step_10"
    for given in (tmp_path / "run", step / "hf_adapter"):
        with pytest.raises(UserError, match=re.escape(f"adapter.json; did you mean {step}?")):
            weights_folder(given)
    for given in (tmp_path / "run", step):
        with pytest.raises(UserError, match=re.escape(f"did you mean {step}/hf_adapter?")):
            read_peft_folder(given)


def test_output_is_all_or_nothing(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(RuntimeError), output_folder(out) as folder:
        (folder / "half").write_text("x")
        raise RuntimeError
    assert not any(tmp_path.iterdir())
    with output_folder(out) as folder:
        (folder / "whole").write_text("x")
        assert not out.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    with pytest.raises(UserError, match="exists already"), output_folder(out):
        pass
    for elsewhere in ("/proc/none/out", out / "whole" / "out", tmp_path / ("long" * 100)):
        with pytest.raises(UserError, match="cannot be written"), output_folder(elsewhere):
            pass
    with pytest.raises(FileNotFoundError), output_folder(tmp_path / "other"):  # of the work inside: no user's mistake
        (tmp_path / "missing").read_text()


FULL_DISK = """
import sys
from pathlib import Path
import torch
from megatron_lora.conversion.output_folder import output_folder
from megatron_lora.conversion.safetensors_io import write_tensor_dict
from megatron_lora.errors import UserError
try:
    with output_folder(sys.argv[1]) as folder:
        write_tensor_dict(folder / "x", {"x": torch.zeros(1000, 1000)})
except UserError as error:
    print(error)
"""


def limit_file_size():
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))


@pytest.mark.slow
def test_a_full_disk_leaves_nothing(tmp_path):
    result = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path / "out")],
        preexec_fn=limit_file_size,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert "no space left" in result.stdout, result.stderr
    assert not any(tmp_path.iterdir())
