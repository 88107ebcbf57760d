"""Times of an adapted layer's parts, each by the ways there are: the four linears over a frozen weight, forward and
backward, and the SwiGLU with A's gradient behind it.

    python -m tools.bench.adapter_products --shapes qwen2.5-1.5b,qwen2.5-7b

One table a shape, milliseconds (median), and how far each way's gradients are from the plain way's. `frozen`: the base
alone. `plain`: products one after the other, as `lora/arithmetic.py` has them. `onto`: the update first, the base's
product added to it. `one read`: dB and dh by `adapter_kernels.output_gradients`. On a CPU only what needs no kernel.
"""

import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from megatron_lora.errors import UserError
from tools.bench.options import build_parser, check_device
from tools.bench.task import Shape, shape_of

Gradients = dict[str, Tensor]
Ways = dict[str, Callable[[], Gradients]]


def linears_of(shape: Shape) -> dict[str, tuple[int, int]]:
    """Megatron's fused linears of a layer: name -> (outputs, inputs)."""
    sizes = shape.sizes
    hidden, ffn = sizes["hidden_size"], sizes["intermediate_size"]
    head = sizes.get("head_dim", hidden // sizes["num_attention_heads"])
    queries, keys = sizes["num_attention_heads"] * head, sizes["num_key_value_heads"] * head
    return {
        "qkv": (queries + 2 * keys, hidden),
        "proj": (hidden, queries),
        "fc1": (2 * ffn, hidden),
        "fc2": (hidden, ffn),
    }


def ways_of_a_linear(outputs: int, inputs: int, tokens: int, rank: int, device: str, dtype: torch.dtype) -> Ways:
    """Forward and backward of one linear: way -> its results by name."""
    draw = torch.Generator(device).manual_seed(0)

    def drawn(*size: int) -> Tensor:
        return torch.randn(*size, generator=draw, device=device, dtype=dtype)

    x, w, dy = drawn(tokens, inputs), drawn(outputs, inputs) * inputs**-0.5, drawn(tokens, outputs)
    a, b = drawn(rank, inputs) * inputs**-0.5, drawn(outputs, rank) * rank**-0.5

    def frozen() -> Gradients:
        return {"y": x @ w.t(), "dx": dy @ w}

    def plain() -> Gradients:
        h = x @ a.t()
        y = (x @ w.t()).addmm_(h, b.t())
        dh = dy @ b
        dx = (dy @ w).addmm_(dh, a)
        return {"y": y, "dx": dx, "dA": dh.t() @ x, "dB": dy.t() @ h}

    def onto() -> Gradients:
        h = x @ a.t()
        y = (h @ b.t()).addmm_(x, w.t())
        dh = dy @ b
        dx = (dh @ a).addmm_(dy, w)
        return {"y": y, "dx": dx, "dA": dh.t() @ x, "dB": dy.t() @ h}

    def one_read() -> Gradients:
        from megatron_lora.lora.adapter_kernels import output_gradients

        h = x @ a.t()
        y = (x @ w.t()).addmm_(h, b.t())
        wide_dh, db = output_gradients(dy, h, b)
        dh = wide_dh.to(dtype)
        dx = (dy @ w).addmm_(dh, a)
        return {"y": y, "dx": dx, "dA": dh.t() @ x, "dB": db.to(dtype)}

    ways: Ways = {"frozen": frozen, "plain": plain, "onto": onto}
    return ways | ({"one read": one_read} if device == "cuda" else {})


def ways_of_a_gate(width: int, tokens: int, rank: int, device: str, dtype: torch.dtype) -> Ways:
    """A SwiGLU's backward pass with the gradient of the A behind it: with its output kept, computed again, and by
    `adapter_kernels.gated_backward`."""
    from megatron.core.fusions.fused_bias_swiglu import swiglu, swiglu_back

    draw = torch.Generator(device).manual_seed(0)
    given, dy, dh = (
        torch.randn(tokens, columns, generator=draw, device=device, dtype=dtype) for columns in (2 * width, width, rank)
    )
    kept = swiglu(given)

    def with_kept() -> Gradients:
        return {"given": swiglu_back(dy, given), "dA": dh.t() @ kept}

    def again() -> Gradients:
        return {"given": swiglu_back(dy, given), "dA": dh.t() @ swiglu(given)}

    def kernel() -> Gradients:
        from megatron_lora.lora.adapter_kernels import gated_backward

        gradient, da = gated_backward(given, dy, dh)
        return {"given": gradient, "dA": da.to(dtype)}

    ways: Ways = {"kept": with_kept, "again": again}
    return ways | ({"kernel": kernel} if device == "cuda" else {})


def ways_of_a_norm(width: int, tokens: int, device: str, dtype: torch.dtype) -> Ways:
    """What computing an RMSNorm's output again takes."""
    x, weight = torch.randn(tokens, width, device=device, dtype=dtype), torch.ones(width, device=device, dtype=dtype)
    return {"again": lambda: {"x": torch.nn.functional.rms_norm(x, (width,), weight, 1e-6)}}


def milliseconds(run: Callable[[], object], device: str, repeats: int) -> float:
    """The median."""
    times = []
    for _ in range(repeats + 2):
        if device == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            run()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
        else:
            began = time.perf_counter()
            run()
            times.append((time.perf_counter() - began) * 1e3)
    return statistics.median(times[2:])


def errors(found: Gradients, plain: Gradients) -> str:
    """|found - plain| / |plain| of each result that both have."""
    return ", ".join(
        f"{name} {float((found[name].float() - plain[name].float()).norm() / plain[name].float().norm()):.1e}"
        for name in found
        if name in plain
    )


def main() -> int:
    parser = build_parser("tools.bench.adapter_products", __doc__)
    parser.add_argument("--shapes", default="qwen2.5-1.5b,qwen2.5-7b")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    try:
        check_device(options.device)
        shapes = {name: shape_of(name) for name in options.shapes.split(",")}
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    device = options.device
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    for name, shape in shapes.items():
        tokens, width = shape.rows * shape.length, shape.sizes["intermediate_size"]
        parts = {
            part: ways_of_a_linear(*sizes, tokens, options.rank, device, dtype)
            for part, sizes in linears_of(shape).items()
        }
        print(f"\n{name}: {tokens} tokens, rank {options.rank}, {dtype}, ms a layer\n")
        print("| part | way | ms | off |\n|---|---|---|---|")
        parts["swiglu"] = ways_of_a_gate(width, tokens, options.rank, device, dtype)
        parts["norm"] = ways_of_a_norm(shape.sizes["hidden_size"], tokens, device, dtype)
        totals: dict[str, float] = {}
        for part, ways in parts.items():
            plain = ways.get("plain", ways.get("kept", ways.get("again", dict)))()
            for way, run in ways.items():
                took, off = milliseconds(run, device, options.repeats), errors(run(), plain)
                print(f"| {part} | {way} | {took:.3f} | {off} |", flush=True)
                if part in linears_of(shape):
                    totals[way] = totals.get(way, 0.0) + took
        for way, total in totals.items():
            print(f"| the four | {way} | {total:.3f} | |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
