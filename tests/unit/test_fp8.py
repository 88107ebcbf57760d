"""A frozen base in FP8: what is multiplied is the rounded rows, gradients are theirs, and what cannot be is refused."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_lora.config import check_recipe
from megatron_lora.config.schema_policy import PolicyConfig
from megatron_lora.conversion.hf_model import read_hf_model
from megatron_lora.errors import UserError
from megatron_lora.lora import fp8
from megatron_lora.lora.arithmetic import AdapterCall, TensorParallel
from megatron_lora.lora.fp8 import Fp8Weight, check_card, measured_error, quantize_rows
from megatron_lora.lora.methods import method_of
from megatron_lora.policy.fp8_base import fp8_names
from megatron_lora.policy.quantization import check_quantization
from tests.support.models import save_model
from tests.support.recorder import kept_for_backward

ALONE = TensorParallel(None, 1, 0, False)
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
ROOT = Path(__file__).resolve().parents[2]
FP8 = "policy.megatron_cfg.fp8_cfg"


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    found, wanted = found.detach().float(), wanted.detach().float()
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize(("dtype", "step"), [(E4M3, 2**-4), (E5M2, 2**-3)])
def test_a_row_reaches_as_far_as_its_format_and_is_off_by_half_a_step_at_most(dtype: torch.dtype, step: float) -> None:
    x = drawn(7, 100) * torch.logspace(-9, 6, 7)[:, None]
    x[3] = 0
    found = quantize_rows(x.bfloat16(), dtype)
    x = x.bfloat16().float()
    assert found.values.dtype == dtype and found.values.is_contiguous() and found.scales.shape == (7, 1)
    largest = torch.finfo(dtype).max
    assert torch.equal(found.values.float().abs().amax(1), torch.tensor([largest] * 3 + [0.0] + [largest] * 3))
    # Half a step of a normal number, and of the smallest ones beside a row's largest.
    smallest = x.abs().amax(1, keepdim=True) / largest * torch.finfo(dtype).smallest_normal * step
    assert ((found.dense() - x).abs() <= x.abs() * step * 1.0001 + smallest).all()
    assert not found.dense()[3].any()


def test_what_is_not_finite_stays_so() -> None:
    x = drawn(3, 32)
    x[0, 5], x[2, 7] = float("nan"), float("inf")
    finite = quantize_rows(x).dense().isfinite()
    assert not finite[0].all() and finite[1].all() and not finite[2].all()


def test_few_rows_get_rows_of_zeros_and_many_none() -> None:
    few = quantize_rows(drawn(3, 32))
    more = fp8.padded(few, 8)
    assert more.values.shape == (8, 32) and more.values.dtype == few.values.dtype
    assert torch.equal(more.dense()[:3], few.dense()) and not more.dense()[3:].any()
    assert fp8.padded(few, 3) is few


@pytest.mark.parametrize("gradients", [E4M3, E5M2])
def test_products_are_those_of_the_rounded_rows(gradients: torch.dtype) -> None:
    w, x, dy, bias = drawn(96, 256), drawn(40, 256, seed=1), drawn(40, 96, seed=2), drawn(96, seed=3)
    weight = Fp8Weight(w, gradients)
    y, dx = weight.product(x, bias), weight.input_gradient(dy)

    def rounded(rows: torch.Tensor, dtype: torch.dtype = E4M3) -> torch.Tensor:
        """The formula, one row after the other."""
        scales = [float(row.abs().max()) / torch.finfo(dtype).max for row in rows]
        return torch.stack([(row / scale).to(dtype).float() * scale for row, scale in zip(rows, scales, strict=True)])

    assert relative(y, rounded(x) @ rounded(w).T + bias) < 1e-3
    assert relative(dx, rounded(dy, gradients) @ rounded(w.T).T) < 1e-3
    assert 0.03 < relative(y - bias, x @ w.T) < 0.045
    assert 0.03 < relative(dx, dy @ w) < (0.045 if gradients == E4M3 else 0.08)
    both = torch.full((40, 300), torch.nan)
    assert weight.input_gradient(dy, out=both[:, :256]).data_ptr() == both.data_ptr()
    assert torch.equal(both[:, :256], dx) and both[:, 256:].isnan().all()
    assert weight.shape == (96, 256) and weight.num_bytes == 2 * w.numel() + 4 * (96 + 256)
    assert torch.equal(torch.cat([chunk for _, chunk in weight.row_chunks()]), weight.dense())


@pytest.mark.parametrize("parallel", ["column", "row"])
def test_adapters_over_it_are_computed_from_what_is_not_rounded(parallel: str) -> None:
    weight, method, call = Fp8Weight(drawn(96, 128).bfloat16()), method_of("lora"), AdapterCall(ALONE, 2.0)
    values: Any = {"A": drawn(4, 128, seed=1).bfloat16(), "B": drawn(96, 4, seed=2).bfloat16()}
    values = {key: value.requires_grad_() for key, value in values.items()}
    x, dy = drawn(5, 128, seed=3).bfloat16(), drawn(5, 96, seed=4).bfloat16()
    given = x.clone().requires_grad_()
    with kept_for_backward() as kept:
        if parallel == "column":
            y = method.column(given * 1.0, weight, None, values, None, call)
        else:
            y = method.row(given * 1.0, weight, values, None, call)
    assert y.dtype == torch.bfloat16
    assert not any(tensor.numel() >= 96 * 128 or tensor.dtype == E4M3 for tensor in kept)
    y.backward(dy)
    a, b = values["A"].detach().float(), values["B"].detach().float()
    x, dy = x.float(), dy.float()
    assert relative(y - weight.product(x), 2.0 * x @ a.T @ b.T) < 1e-2
    assert given.grad is not None
    assert relative(given.grad - weight.input_gradient(dy), 2.0 * dy @ b @ a) < 1e-2
    assert relative(values["A"].grad, 2.0 * (dy @ b).T @ x) < 1e-2
    assert relative(values["B"].grad, 2.0 * dy.T @ (x @ a.T)) < 1e-2


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bases")
    for family, sizes in (("qwen3", {"intermediate_size": 128}), ("qwen2", {}), ("qwen3_moe", {})):
        save_model(folder / family, family, **sizes)
    return folder


def policy(base: Path, **keys: Any) -> PolicyConfig:
    megatron = {"enabled": True, "fp8_cfg": {"enabled": True}, "peft": {"enabled": True} | keys.pop("peft", {})}
    megatron |= keys.pop("megatron_cfg", {})
    return PolicyConfig.model_validate(
        {"model_name": str(base), "precision": "bfloat16", "megatron_cfg": megatron} | keys
    )


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "full fine-tuning": ({"peft": {"enabled": False}}, "weights in FP8 take no gradient steps; train adapters"),
    "float32": ({"precision": "float32"}, "policy.precision=float32, .* use bfloat16"),
    "DoRA": ({"peft": {"type": "dora"}}, "peft.type=dora divides by norms"),
    "4 bits": ({"peft": {"quantization": "nf4", "lora_dtype": "bfloat16"}}, "quantization=nf4 holds the same weights"),
    "PiSSA": ({"peft": {"init_lora_weights": "pissa"}}, "init_lora_weights=pissa changes the base's weights"),
    "sizes of a rank": (
        {"megatron_cfg": {"tensor_model_parallel_size": 16}},
        "linear_proj of .* has 64 x 8 values on each tensor-parallel rank, and FP8 products take multiples of 16",
    ),
}


@pytest.mark.parametrize(("keys", "said"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_go_with_it_is_refused(keys: dict[str, Any], said: str, bases: Path) -> None:
    base = bases / "qwen3"
    with pytest.raises(UserError, match=f"{FP8}.enabled=true, but .*{said}.*{FP8}.enabled=false"):
        check_quantization(policy(base, **keys), read_hf_model(base))


def test_experts_are_refused_and_the_other_backend_does_not_read_it(bases: Path) -> None:
    with pytest.raises(UserError, match="has experts, whose products are not there in FP8"):
        check_quantization(policy(bases / "qwen3_moe"), read_hf_model(bases / "qwen3_moe"))
    (notice,) = check_quantization(policy(bases / "qwen3"), read_hf_model(bases / "qwen3"))
    assert "in FP8 (e4m3, scales rowwise)" in notice
    other = policy(bases / "qwen3", megatron_cfg={"enabled": False, "peft": {"enabled": False}})
    assert check_quantization(other, read_hf_model(bases / "qwen3")) == [] and not other.in_fp8


def test_the_names_are_those_of_the_layers_linears(bases: Path) -> None:
    shapes = read_hf_model(bases / "qwen2").shapes
    kinds = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")
    assert fp8_names(shapes) == {
        f"decoder.layers.{layer}.{kind}.weight" for layer in range(shapes.num_layers) for kind in kinds
    }


def test_products_are_tried_before_a_run_and_wrong_ones_show(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 0.02 < measured_error(torch.device("cpu")) < 0.06
    monkeypatch.setattr(fp8, "product", lambda a, b, *more: b.dense().sum() + a.values.float() @ b.dense().t())
    assert measured_error(torch.device("cpu")) > 1


@pytest.mark.slow
def test_the_kernel_compiles_for_a_card_that_is_not_there() -> None:
    """As far as PTX for an H100, in a process of its own: this one may run Triton's interpreter."""
    code = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from megatron_lora.lora.fp8_kernel import _quantize_rows
for dtype, block in (("fp8e4nv", 1024), ("fp8e5", 4096)):
    signature = dict(x_ptr="*bf16", values_ptr="*" + dtype, scales_ptr="*fp32", stride="i32", columns="i32")
    signature |= dict(floor="fp32", LARGEST="constexpr", BLOCK="constexpr")
    source = ASTSource(_quantize_rows, signature, constexprs={"LARGEST": 448.0, "BLOCK": block})
    print(triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"].count("cvt.rn.satfinite"))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert all(int(line) > 0 for line in done.stdout.splitlines())


def test_products_that_fail_are_a_users_mistake_whatever_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    class CompilationError(Exception):
        """Triton's is no RuntimeError."""

    def fails(device: torch.device) -> float:
        raise CompilationError("at 2:11:\nmore")

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "card")
    monkeypatch.setattr(fp8, "measured_error", fails)
    with pytest.raises(UserError, match="no FP8 product .* for card .CompilationError: at 2:11:.; set it to false"):
        check_card(torch.device("cuda"), "key=true")
    monkeypatch.setattr(fp8, "measured_error", lambda device: 0.5)
    with pytest.raises(UserError, match="FP8 products on card are 50% off"):
        check_card(torch.device("cuda"), "key=true")


def test_a_machine_without_it_is_named() -> None:
    said = r"key=true needs a GPU .* capability 8.9 or higher.* this process has no GPU; .* set it to false"
    with pytest.raises(UserError, match=said):
        check_card(torch.device("cpu"), "key=true")


@pytest.mark.parametrize("name", ["blockwise", "tensorwise", "delayed", "mxfp8"])
def test_other_ways_of_scaling_are_refused_where_it_is_on(name: str) -> None:
    def recipe(fp8: Any) -> dict[str, Any]:
        policy = {"model_name": "m", "megatron_cfg": {"fp8_cfg": fp8}}
        return {"sft": {}, "policy": policy, "data": {"train": {"data_path": "rows.jsonl"}}}

    assert check_recipe(recipe(None)) and check_recipe(recipe({"enabled": False, "fp8_recipe": name}))
    with pytest.raises(
        UserError, match=f"fp8_recipe={name} is a way of scaling that is not there: .* use fp8_recipe=rowwise"
    ):
        check_recipe(recipe({"enabled": True, "fp8_recipe": name}))
