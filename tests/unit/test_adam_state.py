"""Adam's state in the files of either backend is read as one and the same. (Written by real runs: test_backends.py.)"""

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

from megatron_lora.conversion.model_names import fuse, hf_shape, model_parameters
from megatron_lora.conversion.torch_dist import COMMON_STATE
from megatron_lora.errors import UserError
from megatron_lora.lora.describe import describe
from megatron_lora.lora.layout import AdapterSpec, build_layout, module_name
from megatron_lora.lora.model_spec import ModelSizes
from megatron_lora.lora.peft_format import PREFIX, to_hf
from megatron_lora.policy.adam_state import MOMENTS, optimizer_backend, read_adam

SHAPES = describe(ModelSizes("llama", 8, 12, 2, 4, 2, 2, 13, False))
NAMES = [module_name(kind, layer) for layer in range(2) for kind in SHAPES.kinds[:-1]] + ["output_layer"]
SPEC = AdapterSpec("base", SHAPES, [build_layout(name, 3, 6, SHAPES) for name in NAMES])


def save(folder: Path, state: dict[str, Any]) -> Path:
    planner = DefaultSavePlanner(flatten_state_dict=False)
    dcp.save(state, storage_writer=dcp.FileSystemWriter(folder), planner=planner, no_dist=True)
    return folder


def save_megatrons(folder: Path, moments: Mapping[str, Mapping[str, Tensor]]) -> Path:
    """moments: under Megatron's names; rows of the vocabulary are padded."""
    common = {"optimizer": {"step": 7}, "scheduler": {"num_steps": 7}}
    tensors = {
        f"optimizer.{kind}.{name}": torch.nn.functional.pad(value, (0, 0, 0, 3)) if value.shape[0] == 13 else value
        for kind, named in moments.items()
        for name, value in named.items()
    }
    return save(folder, {**tensors, COMMON_STATE: [common]})


def save_dtensors(folder: Path, moments: Mapping[str, Mapping[str, Tensor]]) -> Path:
    """moments: under the names of a transformers or peft model's parameters."""
    values = {f"state.{name}.step": torch.tensor(7.0) for name in moments[MOMENTS[0]]}
    common = pickle.dumps({"schedule": {"num_steps": 7}, "values": values, "groups": {}})
    tensors = {f"state.{name}.{kind}": value for kind, named in moments.items() for name, value in named.items()}
    return save(folder, {**tensors, "common": torch.frombuffer(bytearray(common), dtype=torch.uint8)})


def drawn_adapter() -> dict[str, dict[str, Tensor]]:
    torch.manual_seed(0)
    return {kind: {name: torch.randn(shape) for name, shape in SPEC.factor_shapes().items()} for kind in MOMENTS}


def named_by_peft(fused: dict[str, Tensor]) -> dict[str, Tensor]:
    """As the parameters are called, a shared A once."""
    names = {
        name.removeprefix(PREFIX).replace(".weight", ".default.weight"): v for name, v in to_hf(SPEC, fused)[1].items()
    }
    again = ("k_proj.lora_A", "v_proj.lora_A", "up_proj.lora_A")
    return {name: value for name, value in names.items() if not any(part in name for part in again)}


def test_an_adapters_state_is_the_same_from_either_backend(tmp_path: Path) -> None:
    fused = drawn_adapter()
    mine = read_adam(save_megatrons(tmp_path / "megatron", fused), SPEC, SHAPES)
    named = {kind: named_by_peft(value) for kind, value in fused.items()}
    other = read_adam(save_dtensors(tmp_path / "dtensor", named), SPEC, SHAPES)
    assert (mine.step, mine.schedule) == (other.step, other.schedule) == (7, {"num_steps": 7})
    for kind in MOMENTS:
        assert set(other.moments[kind]) < set(mine.moments[kind])  # but for the A that linears share
        assert all(torch.equal(mine.moments[kind][name], value) for name, value in other.moments[kind].items())
    assert [optimizer_backend(tmp_path / name) for name in ("megatron", "dtensor", "none")] == [
        "megatron",
        "dtensor",
        None,
    ]


def test_a_whole_models_state_is_the_same_from_either_backend(tmp_path: Path) -> None:
    torch.manual_seed(0)
    parameters = model_parameters(SHAPES)
    named = {
        kind: {name: torch.randn(hf_shape(p, name, SHAPES)) for p in parameters for name in p.hf_names}
        for kind in MOMENTS
    }
    fused = {
        kind: {p.name: fuse(p, [values[name] for name in p.hf_names], SHAPES) for p in parameters}
        for kind, values in named.items()
    }
    mine = read_adam(save_megatrons(tmp_path / "megatron", fused), None, SHAPES)
    other = read_adam(save_dtensors(tmp_path / "dtensor", named), None, SHAPES)
    for kind, values in named.items():
        assert set(mine.moments[kind]) == set(other.moments[kind]) == set(values)
        for name, value in values.items():
            assert torch.equal(mine.moments[kind][name], value)
            assert torch.equal(other.moments[kind][name], value)


def test_another_optimizers_folder_has_no_moments(tmp_path: Path) -> None:
    folder = save_dtensors(tmp_path / "sgd", {"momentum_buffer": {"x": torch.ones(2)}} | {MOMENTS[0]: {}})
    state = read_adam(folder, SPEC, SHAPES)
    assert state.moments == {} and state.schedule == {"num_steps": 7}


def test_a_folder_of_another_adapter_is_refused(tmp_path: Path) -> None:
    fused = drawn_adapter()
    del fused[MOMENTS[1]]["output_layer.lora_B"]
    folder = save_megatrons(tmp_path / "megatron", fused)
    with pytest.raises(UserError, match=r"another model or adapter: it lacks optimizer.exp_avg_sq.output_layer.lora_B"):
        read_adam(folder, SPEC, SHAPES)
