"""Kernels of the backward pass: the numbers in Triton's interpreter, the code for a card that is not there."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# In processes of their own: whether kernels are interpreted is decided when they are defined.
NUMBERS = """
import torch
from megatron_lora.lora.adapter_kernels import gated_backward, output_gradients
from megatron_lora.lora import adapter_kernels

def close(name, found, wanted):
    error = float((found.double() - wanted).norm() / wanted.norm())
    assert error < 1e-6, (name, error)

torch.manual_seed(0)
adapter_kernels.MOST_PARTS = 2
for tokens, width, rank in ((200, 96, 6), (64, 64, 16)):
    given, dy, dh = torch.randn(tokens, 2 * width), torch.randn(tokens, width), torch.randn(tokens, rank)
    exact = given.double().requires_grad_()
    gate, up = exact.chunk(2, -1)
    y = torch.nn.functional.silu(gate) * up
    y.backward(dy.double())
    gradient, da = gated_backward(given, dy, dh)
    close("given", gradient, exact.grad)
    close("A", da, dh.double().t() @ y.detach())

# A whole linear behind a SwiGLU, beside the same without the kernel.
from megatron_lora.lora.arithmetic import AdapterCall, TensorParallel, row_parallel
from megatron_lora.lora.base_weight import DenseWeight

def gate(given):
    half, up = given.chunk(2, -1)
    return torch.nn.functional.silu(half) * up

def gradients(fused):
    torch.manual_seed(1)
    given, w, a, b = torch.randn(70, 96), torch.randn(40, 48), torch.randn(6, 48), torch.randn(40, 6)
    given, a, b = given.requires_grad_(), a.requires_grad_(), b.requires_grad_()
    call = AdapterCall(TensorParallel(None, 1, 0, False), 2.0, gate=gate if fused else None)
    y = row_parallel(given * 1.0 if fused else gate(given), DenseWeight(w), a, b, call)
    y.backward(torch.randn(70, 40))
    return y.detach(), given.grad, a.grad, b.grad

for name, found, wanted in zip(("y", "given", "A", "B"), gradients(True), gradients(False), strict=True):
    close("gated " + name, found, wanted.double())

for tokens, outputs, rank in ((200, 300, 6), (64, 256, 16)):
    wide, h, b = torch.randn(tokens, outputs + 8), torch.randn(tokens, rank), torch.randn(outputs, rank)
    dy = wide[:, :outputs]
    dh, db = output_gradients(dy, h, b)
    close("h", dh, dy.double() @ b.double())
    close("B", db, dy.double().t() @ h.double())
"""
COMPILED = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from megatron_lora.lora import adapter_kernels as kernels

def compiled(kernel, pointers, numbers, constants):
    signature = {name: "*" + dtype for name, dtype in pointers.items()}
    signature |= dict.fromkeys(numbers, "i32") | dict.fromkeys(constants, "constexpr")
    source = ASTSource(kernel, signature, constexprs=constants)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32))

tile = {"ROWS": kernels.ROWS, "RANK": 32}
found = compiled(
    kernels._gated_backward,
    {"given_ptr": "bf16", "dy_ptr": "bf16", "dh_ptr": "bf16", "gradient_ptr": "bf16", "sums_ptr": "fp32"},
    ["tokens", "width", "rank", "rows_of_part"],
    tile | {"COLUMNS": kernels.COLUMNS},
)
print(found.metadata.shared, found.asm["ptx"].count("mma"))
found = compiled(
    kernels._output_gradients,
    {"dy_ptr": "bf16", "h_ptr": "bf16", "b_ptr": "bf16", "dh_ptr": "fp32", "db_ptr": "fp32"},
    ["stride", "tokens", "outputs", "rank", "rows_of_part"],
    tile | {"OUTPUTS": kernels.OUTPUTS},
)
print(found.metadata.shared, found.asm["ptx"].count("mma"))
"""


def ran(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=os.environ | environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_gradients_are_those_of_the_formula() -> None:
    ran(NUMBERS, TRITON_INTERPRET="1")


@pytest.mark.slow
def test_the_kernels_compile_for_a_card_that_is_not_there_and_use_its_tensor_cores() -> None:
    """As far as PTX for an H100; what they hold in shared memory fits it."""
    for line in ran(COMPILED, TRITON_INTERPRET="0").splitlines():
        shared, products = map(int, line.split())
        assert shared <= 227 * 1024 and products > 0, line
