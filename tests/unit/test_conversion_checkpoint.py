"""Adapter checkpoints on disk: ours in Megatron-Core and Megatron-Core's, from two ranks, in ours; damaged ones."""

import os
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_lora.conversion.adapter_checkpoint import read_adapter, write_adapter
from megatron_lora.conversion.torch_dist import StoredTensor, TorchDistFolder, write_torch_dist
from megatron_lora.errors import UserError
from megatron_lora.lora.describe import describe
from megatron_lora.lora.layout import AdapterSpec, build_layout, module_name
from megatron_lora.lora.model_spec import ModelSizes
from tests.support.launch import ROOT

SHAPES = describe(ModelSizes("llama", 8, 12, 2, 4, 2, 2, 13, False))


def make_adapter() -> tuple[AdapterSpec, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    names = [module_name(kind, layer) for layer in range(2) for kind in SHAPES.kinds[:-1]] + ["output_layer"]
    spec = AdapterSpec("base", SHAPES, [build_layout(name, 3, 6, SHAPES) for name in names])
    return spec, {name: torch.randn(shape) for name, shape in spec.factor_shapes().items()}


MEGATRON = '''
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_lora.runtime.cpu import install_cpu_stand_ins
from megatron_lora.conversion.adapter_checkpoint import read_adapter
from megatron_lora.lora.sharding import placement, shard


def sharded(spec, tensors, rank, size, fill):
    """Megatron's sharded tensors of one rank, the vocabulary padded to 16."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    state = {}
    for module in spec.modules:
        for factor in "AB":
            key = f"{module.name}.lora_{factor}"
            local = shard(tensors[key], factor, module.kind, rank, size, spec.shapes, padded_vocab_size=16)
            local = local if fill else torch.zeros_like(local)
            place = placement(factor, module.kind, spec.shapes, rank, size, padded_vocab_size=16)
            if place.axis is None:
                state[key] = ShardedTensor.from_rank_offsets(key, local, replica_id=rank)
                continue
            parts = 2 if module.kind == "linear_fc1" else 1
            for part, piece in enumerate(local.chunk(parts, place.axis)):
                offsets = (place.axis, part * size + rank, parts * size)
                padded = module.kind == "output_layer"
                state[f"{key}/{part}"] = ShardedTensor.from_rank_offsets(
                    key, piece, offsets, allow_shape_mismatch=padded
                )
    return state


def main(ours, theirs):
    install_cpu_stand_ins()
    from megatron.core import dist_checkpointing

    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    spec, tensors = read_adapter(ours)
    wanted = sharded(spec, tensors, rank, size, fill=True)
    loaded = dist_checkpointing.load(sharded(spec, tensors, rank, size, fill=False), ours, strict="raise_all")
    for key, value in wanted.items():
        assert torch.equal(loaded[key], value.data), key
    dist_checkpointing.save(wanted, theirs, validate_access_integrity=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
'''


@pytest.mark.long
@pytest.mark.timeout(300)
def test_megatron_reads_ours_and_we_read_megatrons(tmp_path):
    spec, tensors = make_adapter()
    write_adapter(tmp_path / "ours", spec, tensors)
    (tmp_path / "theirs").mkdir()
    script = tmp_path / "ranks.py"
    script.write_text(MEGATRON)
    subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
            *(str(script), str(tmp_path / "ours"), str(tmp_path / "theirs")),
        ],
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    spec.save(tmp_path / "theirs" / "adapter.json")
    read_spec, read = read_adapter(tmp_path / "theirs")
    assert read_spec == spec
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensors[name]) for name in tensors)


@pytest.fixture
def step(tmp_path) -> Path:
    write_adapter(tmp_path / "step_1" / "policy" / "weights", *make_adapter())
    return tmp_path / "step_1"


def test_a_step_folder_comes_back(step):
    spec, tensors = make_adapter()
    for folder in (step, step / "policy", step / "policy" / "weights"):
        read_spec, read = read_adapter(folder)
        assert read_spec == spec and all(torch.equal(read[name], tensors[name]) for name in tensors)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def corrupt(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[: len(content) // 2] = bytes(len(content) // 2)
    path.write_bytes(content)


def other_adapter(weights: Path) -> None:
    spec, _ = make_adapter()
    spec.modules.pop()
    spec.save(weights / "adapter.json")


def other_shapes(weights: Path) -> None:
    spec, _ = make_adapter()
    spec.modules[0] = build_layout(spec.modules[0].name, 4, 6, SHAPES)
    spec.save(weights / "adapter.json")


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda weights: (weights / "__0_0.distcp").unlink(), "lacks its shard __0_0.distcp"),
        (lambda weights: truncate(weights / "__0_0.distcp"), "__0_0.distcp is truncated"),
        (lambda weights: corrupt(weights / "__0_0.distcp"), "damaged"),
        (lambda weights: (weights / ".metadata").unlink(), "holds no weights"),
        (lambda weights: truncate(weights / ".metadata"), "damaged"),
        (lambda weights: (weights / "adapter.json").unlink(), "holds full weights and no adapter.json"),
        (lambda weights: truncate(weights / "adapter.json"), "adapter.json is not readable JSON"),
        (lambda weights: shutil.rmtree(weights), "holds no policy/weights/adapter.json"),
        (other_adapter, "unexpected .*output_layer.lora_A"),
        (other_shapes, r"linear_qkv.lora_A has shape \(3, 8\), adapter.json says \(4, 8\)"),
    ],
)
def test_a_damaged_checkpoint_is_refused_with_the_reason(step, damage, message):
    damage(step / "policy" / "weights")
    with pytest.raises(UserError, match=message):
        read_adapter(step)


@pytest.mark.slow
def test_writing_holds_a_few_tensors_not_the_checkpoint(tmp_path: Path) -> None:
    """Twelve tensors of 64 MB, in a process of its own whose peak memory is read."""
    code = """
import sys; from pathlib import Path
import torch
from megatron_lora.conversion.torch_dist import StoredTensor, write_torch_dist
def peak(): return int(next(l for l in open('/proc/self/status') if l.startswith('VmHWM')).split()[1]) / 1024
entries = {f'w{n}': StoredTensor(torch.float32, (4096, 4096)) for n in range(12)}
write_torch_dist(Path(sys.argv[1]) / 'first', {'w': StoredTensor(torch.float32, (8,))}, lambda name: torch.ones(8))
before = peak()
write_torch_dist(Path(sys.argv[1]) / 'all', entries, lambda name: torch.full((4096, 4096), float(name[1:])))
print(peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 5 * 64
    stored = TorchDistFolder(tmp_path / "all").read(["w3", "w11"])
    assert [float(value.unique()) for value in stored.values()] == [3.0, 11.0]


def test_a_machine_with_a_gpu_writes_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch then fetches ahead, and a tensor's memory is freed when the next one is fetched."""
    entries = {f"w{n}": StoredTensor(torch.float32, (8,)) for n in range(4)}
    stream = SimpleNamespace(synchronize=lambda: None)
    with monkeypatch.context() as patched:
        patched.setattr(torch.cuda, "is_available", lambda: True)
        patched.setattr(torch.cuda, "current_stream", lambda: stream)
        patched.setattr(torch.cuda, "stream", nullcontext)
        write_torch_dist(tmp_path / "all", entries, lambda name: torch.full((8,), float(name[1:])))
    stored = TorchDistFolder(tmp_path / "all").read(entries)
    assert [float(stored[name].unique()) for name in entries] == [0.0, 1.0, 2.0, 3.0]
