"""Bases in 4 bits: the values are bitsandbytes' own, whatever is fused and sliced, and what cannot be is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes import functional as bnb
from transformers import AutoModelForCausalLM

from megatron_lora.config.schema_adapters import LoraConfig, PeftConfig
from megatron_lora.config.schema_policy import PolicyConfig
from megatron_lora.conversion.experts import unpacked
from megatron_lora.conversion.fingerprint import fingerprint_base, fingerprint_weights
from megatron_lora.conversion.four_bit_folder import FourBitFolder, QuantizedWeights
from megatron_lora.conversion.hf_model import read_hf_model
from megatron_lora.conversion.inventory import open_model
from megatron_lora.conversion.model_names import fuse, model_parameters, shard_parameter
from megatron_lora.conversion.safetensors_io import SafetensorsFolder, write_tensor_dict
from megatron_lora.errors import UserError
from megatron_lora.lora.arithmetic import AdapterCall, TensorParallel
from megatron_lora.lora.describe import describe_config
from megatron_lora.lora.four_bit import (
    FourBitExperts,
    FourBitMatrix,
    FourBitWeight,
    check_blocks,
    layer_linears,
    quantize,
    weight_names,
)
from megatron_lora.lora.methods import method_of
from megatron_lora.policy.quantization import check_quantization, local_experts, local_matrix, open_base
from tests.support.four_bit import save_dequantized, save_four_bit, save_with_experts
from tests.support.models import family_config, save_model
from tests.support.recorder import kept_for_backward

ALONE = TensorParallel(None, 1, 0, False)
FORMS = [("nf4", False), ("nf4", True), ("fp4", False), ("fp4", True)]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("base") / "qwen3_even", "qwen3_even")


@pytest.fixture(scope="module", params=FORMS, ids=lambda form: f"{form[0]}{'_double' if form[1] else ''}")
def stored(request: pytest.FixtureRequest, base: Path) -> Path:
    kind, double = request.param
    return save_four_bit(base, base.parent / f"{kind}{double}", kind, double=double)


def policy(base: Path, tp: int = 1, backend: str = "megatron", **adapter: Any) -> PolicyConfig:
    adapter = {"enabled": True, "lora_dtype": "float32"} | adapter
    if backend == "megatron":
        sections = {"megatron_cfg": {"enabled": True, "tensor_model_parallel_size": tp, "peft": adapter}}
    else:
        sections = {"dtensor_cfg": {"tensor_parallel_size": tp, "lora_cfg": adapter | {"use_triton": tp == 1}}}
    return PolicyConfig.model_validate({"model_name": str(base), "precision": "float32"} | sections)


@pytest.mark.parametrize(("kind", "double"), FORMS)
def test_values_are_bitsandbytes_own(kind: Any, double: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(300, 192, generator=torch.Generator().manual_seed(1))
    packed, state = bnb.quantize_4bit(weight, compress_statistics=double, quant_type=kind)
    # Several pieces, of which the last is shorter.
    monkeypatch.setattr("megatron_lora.lora.four_bit.CHUNK_ELEMENTS", 192 * 7)
    matrix = quantize(weight, kind, double=double)
    assert torch.equal(matrix.packed.view(-1, 1), packed)
    assert torch.equal(matrix.dense(torch.float32), bnb.dequantize_4bit(packed, state))
    assert matrix.num_bytes < weight.nbytes * (0.14 if double else 0.15) + 300 * 12


def test_a_stored_folder_is_read_as_it_is(stored: Path, base: Path) -> None:
    model, weights = open_model(stored, stored)
    assert isinstance(weights, FourBitFolder)
    loaded = AutoModelForCausalLM.from_pretrained(stored, device_map="cpu")
    for name in weights.four_bit:
        theirs = loaded.get_parameter(name)
        wanted = bnb.dequantize_4bit(theirs.data, theirs.quant_state)
        assert torch.equal(weights.read(name).float(), wanted.float()), name
    assert len(weights.four_bit) == 7 * model.shapes.num_layers
    assert set(weights.entries) == set(open_model(base, base)[1].entries)
    assert fingerprint_base(stored) == fingerprint_weights(weights) != fingerprint_base(base)


@pytest.mark.parametrize("tp", [1, 2])
def test_ranks_hold_the_values_of_one_process(stored: Path, base: Path, tp: int) -> None:
    sources = [open_base(policy(stored, tp))[1]]
    sources += [open_base(policy(base, tp, quantization="nf4", double_quantization=d))[1] for d in (False, True)]
    shapes = read_hf_model(stored).shapes
    for weights in sources:
        for entry in model_parameters(shapes):
            parts = [weights.read(name) for name in entry.hf_names]
            for rank in range(tp):
                matrix = local_matrix(entry, weights, shapes, rank, tp)
                if matrix is None:
                    assert "linear" not in entry.name or "norm" in entry.name
                    continue
                wanted = shard_parameter(entry, fuse(entry, parts, shapes), rank, tp, 0, shapes)
                assert torch.equal(matrix.dense(parts[0].dtype), wanted), (entry.name, rank)


def weight_of(matrix: FourBitMatrix) -> FourBitWeight:
    return FourBitWeight(matrix, torch.float32)


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("parallel", ["column", "row"])
def test_products_are_those_of_the_dense_values_and_keep_nothing_of_them(kind: str, parallel: str) -> None:
    torch.manual_seed(2)
    weight = weight_of(quantize(torch.randn(96, 128), double=True))
    dense = weight.dense()
    values: Any = {"A": torch.randn(4, 128), "B": torch.randn(96, 4), "magnitude": torch.rand(96) + 1}
    values = {key: value.requires_grad_() for key, value in values.items()}
    x, dy = torch.randn(5, 128), torch.randn(5, 96)
    method, call = method_of(kind), AdapterCall(ALONE, 2.0)
    found, wanted = x.clone().requires_grad_(), x.clone().requires_grad_()
    derived = method.derive(weight, values, 2.0, None)
    with kept_for_backward() as kept:
        if parallel == "column":
            y = method.column(found * 1.0, weight, None, values, derived, call)
        else:
            y = method.row(found * 1.0, weight, values, derived, call)
    assert not any(tensor.numel() >= dense.numel() for tensor in kept)
    y.backward(dy)
    truth = wanted @ dense.t() + (wanted @ values["A"].t() * 2.0) @ values["B"].t()
    if kind == "dora":
        norm = (dense + 2.0 * values["B"] @ values["A"]).norm(dim=1).detach()
        truth = truth * (values["magnitude"] / norm)
    torch.testing.assert_close(y, truth, rtol=1e-4, atol=1e-4)
    gradients = torch.autograd.grad(truth, [wanted], dy)
    torch.testing.assert_close(found.grad, gradients[0], rtol=1e-4, atol=1e-4)


def test_merging_reads_the_values_that_were_trained_over(base: Path, tmp_path: Path) -> None:
    dense = open_model(base, save_dequantized(base, tmp_path / "dense", double=True))[1]
    held = open_base(policy(base, quantization="nf4", double_quantization=True))[1]
    assert isinstance(held, QuantizedWeights)
    assert all(torch.equal(held.read(name), dense.read(name)) for name in dense.entries)


@pytest.mark.parametrize("config", [PeftConfig, LoraConfig])
@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"enabled": True, "quantization": "nf4"}, "needs lora_dtype"),
        ({"enabled": False, "quantization": "nf4", "lora_dtype": "float32"}, "full fine-tuning"),
        ({"enabled": True, "double_quantization": True}, "needs quantization=nf4"),
        ({"enabled": True, "quantization": "int8", "lora_dtype": "float32"}, "nf4"),
    ],
)
def test_keys_that_contradict_each_other_are_refused(config: Any, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        config(**settings)


@pytest.mark.parametrize("backend", ["megatron", "dtensor"])
def test_a_stored_base_is_not_trained_without_adapters_or_in_another_form(
    stored: Path, base: Path, backend: str
) -> None:
    model = read_hf_model(stored)
    kind = model.content["quantization_config"]["bnb_4bit_quant_type"]
    assert f"({kind})" in check_quantization(policy(stored, backend=backend), model)[0]
    for settings, said in (
        ({"enabled": False}, "full fine-tuning"),
        ({"lora_dtype": None}, "lora_dtype is null"),
        ({"init_lora_weights": "pissa"}, "stored in 4 bits, where the change that .*=pissa makes"),
    ):
        with pytest.raises(UserError, match=said):
            check_quantization(policy(stored, backend=backend, **settings), model)
    if kind == "fp4":
        with pytest.raises(UserError, match="asks for quantization=nf4"):
            check_quantization(policy(stored, backend=backend, quantization="nf4"), model)
    with pytest.raises(UserError, match=r"tensor.*parallel_size=4 cuts through blocks of 64 .* use 1 or 2"):
        check_quantization(policy(stored, 4, backend=backend), model)
    assert check_quantization(policy(base, backend=backend), read_hf_model(base)) == []


def test_sizes_that_are_no_whole_blocks_are_refused() -> None:
    linears = layer_linears(describe_config(family_config("qwen3").to_dict()))
    with pytest.raises(UserError, match="blocks of 64 values within rows, and those of linear_fc2 have 96"):
        check_blocks(linears, 1, "tp")
    with pytest.raises(UserError, match="a weight's rows have 96"):
        quantize(torch.randn(4, 96))


def test_a_damaged_description_is_named(stored: Path, tmp_path: Path) -> None:
    whole = SafetensorsFolder(stored)
    name = "model.layers.0.mlp.up_proj.weight.absmax"
    (tmp_path / "config.json").write_text((stored / "config.json").read_text())
    tensors = {key: whole.read(key) for key in whole.entries if key != name}
    write_tensor_dict(tmp_path / "model.safetensors", tensors)
    with pytest.raises(UserError, match=f"lacks {name}"):
        open_model(tmp_path, tmp_path)


@pytest.mark.parametrize("family", ["qwen3", "qwen3_5", "nemotron_h", "qwen3_moe", "gpt_oss"])
def test_every_layers_linears_are_held_in_4_bits(family: str, tmp_path: Path):
    """Of a model with two kinds of layers, those of both; of one with experts these, as its files have them."""
    folder = save_model(tmp_path / "base", family)
    model, weights = open_model(folder, folder)
    linears = {
        name
        for name, entry in weights.entries.items()
        if len(entry.shape) > 1 and ".layers." in name and not name.endswith(("_bias", "conv1d.weight"))
    }
    names = weight_names(model.shapes)
    assert names <= linears
    routers = ("mlp.gate.weight", "mixer.gate.weight", "router.weight")
    assert all(name.endswith(routers) for name in linears - names), linears - names


@pytest.mark.parametrize(("family", "etp"), [("qwen3_moe_even", 1), ("qwen3_moe_even", 2), ("gpt_oss_even", 1)])
@pytest.mark.parametrize("double", [False, True])
def test_a_rank_holds_its_experts_packed(family: str, etp: int, double: bool, tmp_path: Path) -> None:
    """The last two of four experts, each rank's part of them: the values of one process, in about half a byte each."""
    folder = save_model(tmp_path / "base", family)
    asked = policy(folder, quantization="nf4", double_quantization=double)
    model, weights = open_base(asked)
    table = {entry.name: entry for entry in model_parameters(model.shapes)}
    for kind in ("experts.linear_fc1", "experts.linear_fc2"):
        linear, name = model.shapes.linear(kind), f"decoder.layers.3.mlp.{kind}"
        entries = [table[f"{name}.{n}.weight"] for n in (2, 3)] if not linear.packed else [table[f"{name}.weight"]]
        for rank in range(etp):
            matrix = local_experts(entries, [2, 3], weights, model.shapes, rank, etp)
            assert matrix is not None
            held = FourBitExperts(matrix, 2, torch.float32)
            wanted = [expert_of(entries, place, weights, model.shapes, rank, etp) for place in (0, 1)]
            assert torch.equal(held.dense(), torch.stack(wanted))
            assert all(torch.equal(held.expert(place).dense(), wanted[place]) for place in (0, 1))
            scales = 1 / 64 if double else 4 / 64
            of_rows = 12 * matrix.shape[0] + 4 * 4 * matrix.scales.numel() / 256 + 16 if double else 0
            assert matrix.num_bytes <= 2 * wanted[0].numel() * (0.5 + scales) + of_rows + 16


def expert_of(entries: Any, place: int, weights: Any, shapes: Any, rank: int, size: int) -> torch.Tensor:
    """One expert's part on a rank, by the dense way."""
    if entries[0].packed is not None:
        return unpacked(shapes.linear(entries[0].packed), False, weights.read(entries[0].hf_names[0]), 2 + place)
    entry = entries[place]
    return shard_parameter(entry, fuse(entry, list(map(weights.read, entry.hf_names)), shapes), rank, size, 0, shapes)


def test_experts_that_were_stored_in_4_bits_are_read_as_they_are(tmp_path: Path) -> None:
    """As transformers 4 wrote them, a matrix of each: 5 leaves them dense."""
    base = save_model(tmp_path / "base", "qwen3_moe_even")
    stored = save_with_experts(base, tmp_path / "stored")
    model, weights = open_base(policy(stored))
    name = "model.layers.1.mlp.experts.3.down_proj.weight"
    assert isinstance(weights, FourBitFolder) and name in weights.four_bit
    wanted = QuantizedWeights(open_model(base, base)[1], weight_names(model.shapes)).read(name)
    assert torch.equal(weights.read(name), wanted)
    asked = policy(stored)
    asked.megatron_cfg.expert_tensor_parallel_size = 4
    with pytest.raises(UserError, match=r"expert_tensor_parallel_size=4 cuts through blocks .* use 1 or 2"):
        open_base(asked)


def test_experts_in_4_bits_are_refused_where_they_cannot_be(tmp_path: Path) -> None:
    uneven, even = (save_model(tmp_path / name, name) for name in ("qwen3_moe", "qwen3_moe_even"))
    asked = policy(even, quantization="nf4", backend="dtensor")
    with pytest.raises(UserError, match="one dense tensor of all of a layer's.*megatron_cfg.enabled=true"):
        check_quantization(asked, read_hf_model(even))
    with pytest.raises(UserError, match=r"those of experts.linear_fc2 have 48"):
        check_quantization(policy(uneven, quantization="nf4"), read_hf_model(uneven))
