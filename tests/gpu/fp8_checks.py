"""FP8 products on a real card against the same numbers multiplied in fp32: `python -m tests.gpu.fp8_checks [--times]`.

Each check prints what it found; one that fails does not stop the others. Exit status 1 if any failed.
"""

import sys
import traceback
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from megatron_lora.lora.fp8 import FEWEST_ROWS, Fp8Matrix, Fp8Weight, check_card, product, quantize_rows

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
# (out, in) of the linears of a layer.
LINEARS = {
    "1.5B": [(2048, 1536), (1536, 1536), (17920, 1536), (1536, 8960)],
    "7B": [(4608, 3584), (3584, 3584), (37888, 3584), (3584, 18944)],
}
TOKENS = {"1.5B": 16384, "7B": 8192}
Lines = Iterator[str]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(*shape, generator=generator, device="cuda").bfloat16()


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found.float() - wanted.float()).norm() / wanted.float().norm())


def emulated(a: Fp8Matrix, b: Fp8Matrix) -> Tensor:
    """a b^T of the rounded numbers, fp32."""
    return a.dense() @ b.dense().t()


def quantizing() -> Lines:
    """The kernel's rows are the plain path's up to a step here and there, whatever the shape and the stride."""
    for dtype in (E4M3, E5M2):
        for rows, columns in ((1, 16), (7, 100), (33, 4096), (130, 5000), (64, 18944)):
            x = drawn(rows, columns) * torch.logspace(-6, 3, rows, device="cuda")[:, None].bfloat16()
            x[rows // 2] = 0
            wide = drawn(rows, columns + 24)
            for name, given in (("whole", x), ("part", wide[:, 8 : columns + 8]), ("turned", x.t().contiguous().t())):
                found, wanted = quantize_rows(given, dtype), quantize_rows(given.cpu(), dtype)
                torch.testing.assert_close(found.scales.cpu(), wanted.scales, rtol=1e-6, atol=0)
                codes = found.values.view(torch.uint8).cpu().int() - wanted.values.view(torch.uint8).int()
                assert int(codes.abs().max()) <= 1, f"{dtype} {rows}x{columns} {name}: {int(codes.abs().max())} steps"
                share = float((codes != 0).float().mean())
                assert share < 0.002, f"{dtype} {rows}x{columns} {name}: {share:.2%} of the values differ"
    x = drawn(3, 64)
    x[0, 5], x[2, 7] = float("nan"), float("inf")
    finite = quantize_rows(x).dense().isfinite()
    assert not finite[0].all() and finite[1].all() and not finite[2].all(), finite
    yield "rows, strides, zeros, NaN and inf as on the plain path"


def products() -> Lines:
    """Each product is that of the rounded numbers; dense ones are a few per cent away."""
    cases = [
        (out, inner, tokens, gradients)
        for linears in LINEARS.values()
        for out, inner in linears
        for tokens in (1000, 17, 3, 1)
        for gradients in (E4M3, E5M2)
    ]
    failed = []
    for case in cases:
        name = "{}x{}, {} tokens, {}".format(*case)
        try:
            errors, dense = _errors(*case)
        except RuntimeError as error:
            failed.append(f"{name}: {str(error).splitlines()[0]}")
            continue
        if case[2] == 1000:
            yield f"{name}: y and dx off the rounded {errors[0]:.1e}, {errors[1]:.1e}, off the dense {dense}"
        # What fast sums lose is a small part of what rounding does.
        if max(errors) > 0.02 or dense[0] > 0.05 or dense[1] > (0.05 if case[3] == E4M3 else 0.09):
            failed.append(f"{name}: {errors}, {dense}")
    assert not failed, "\n".join(failed)


def _errors(out: int, inner: int, tokens: int, gradients: torch.dtype) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Of y (with a bias) and dx: relative errors beside the rounded numbers multiplied in fp32, and beside bf16."""
    w, bias = drawn(out, inner, seed=1) / inner**0.5, drawn(out, seed=4)
    x, dy = drawn(tokens, inner, seed=2), drawn(tokens, out, seed=3)
    weight = Fp8Weight(w, gradients)
    y, dx = weight.product(x, bias), weight.input_gradient(dy)
    rounded = emulated(quantize_rows(x), weight.rows) + bias, emulated(quantize_rows(dy, gradients), weight.columns)
    dense = x @ w.t() + bias, dy @ w
    return (
        (relative(y, rounded[0]), relative(dx, rounded[1])),
        (relative(y, dense[0]), relative(dx, dense[1])),
    )


def few_rows() -> Lines:
    """What cuBLAS has no product for, unpadded: the reason for `FEWEST_ROWS`."""
    for inner in (1536, 3584, 8960, 18944):
        weight, bias, missing = Fp8Weight(drawn(1536, inner)), drawn(1536, seed=1), []
        for rows in (1, 8, 16, 17, 32, 64, 100, 128, 200, FEWEST_ROWS):
            try:
                product(quantize_rows(drawn(rows, inner)), weight.rows, torch.bfloat16, bias, fewest=1)
            except RuntimeError:
                missing.append(rows)
        yield f"1536x{inner}: none for {missing or 'no number of'} rows"
        assert FEWEST_ROWS not in missing


def places() -> Lines:
    """A gradient goes into columns of another tensor, as under sequence parallelism."""
    weight, dy = Fp8Weight(drawn(512, 256)), drawn(64, 512, seed=1)
    both = torch.full((64, 288), torch.nan, dtype=torch.bfloat16, device="cuda")
    weight.input_gradient(dy, out=both[:, :256])
    assert torch.equal(both[:, :256], weight.input_gradient(dy)) and both[:, 256:].isnan().all()
    yield "into a part of a tensor"


def graphs() -> Lines:
    """A product can be recorded and replayed on other numbers."""
    weight, x = Fp8Weight(drawn(512, 256)), drawn(64, 256, seed=1)
    weight.product(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = weight.product(x)
    x.copy_(drawn(64, 256, seed=2))
    graph.replay()
    assert torch.equal(y, weight.product(x))
    yield "recorded and replayed"


def card() -> Lines:
    check_card(torch.device("cuda"), "key=true")
    yield f"{torch.cuda.get_device_name()} {torch.cuda.get_device_capability()}, torch {torch.__version__}"


CHECKS: list[Callable[[], Lines]] = [card, quantizing, few_rows, products, places, graphs]


def milliseconds(run: Callable[[], object], repeats: int = 20) -> float:
    for _ in range(3):
        run()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(repeats):
        run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / repeats


def times() -> Lines:
    """y and dx of a layer's four linears: bf16, FP8, and what quantizing takes of it."""
    for size, linears in LINEARS.items():
        total: dict[str, float] = {}
        for out, inner in linears:
            row, errors = _times(out, inner, TOKENS[size])
            yield f"{size} {out}x{inner}: {_shown(row)}; error of fast sums {errors[0]:.1e}, of exact {errors[1]:.1e}"
            total = {name: total.get(name, 0.0) + value for name, value in row.items()}
        yield f"{size}, {TOKENS[size]} tokens, a layer: {_shown(total)}; fp8 / bf16 {total['fp8'] / total['bf16']:.3f}"


def _times(out: int, inner: int, tokens: int) -> tuple[dict[str, float], tuple[float, float]]:
    """Milliseconds of y and dx of one linear; relative errors of y by fast and by exact sums."""
    w, x, dy = drawn(out, inner), drawn(tokens, inner), drawn(tokens, out)
    weight = Fp8Weight(w)
    xq, dyq = quantize_rows(x), quantize_rows(dy)

    def exact(a: Fp8Matrix, b: Fp8Matrix) -> Tensor:
        return torch._scaled_mm(a.values, b.values.t(), scale_a=a.scales, scale_b=b.scales.t(), out_dtype=w.dtype)

    row = {
        "bf16": milliseconds(lambda: (x @ w.t(), dy @ w)),
        "fp8": milliseconds(lambda: (weight.product(x), weight.input_gradient(dy))),
        "quantizing": milliseconds(lambda: (quantize_rows(x), quantize_rows(dy))),
        "y, exact sums": milliseconds(lambda: exact(xq, weight.rows)),
        "dx, exact sums": milliseconds(lambda: exact(dyq, weight.columns)),
        "y, fast sums": milliseconds(lambda: product(xq, weight.rows, w.dtype)),
        "dx, fast sums": milliseconds(lambda: product(dyq, weight.columns, w.dtype)),
    }
    wanted = emulated(xq, weight.rows)
    fast = product(xq, weight.rows, w.dtype)
    return row, (relative(fast, wanted), relative(exact(xq, weight.rows), wanted))


def _shown(row: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.3f} ms" for name, value in row.items())


def main() -> int:
    failed = False
    for check in [*CHECKS, *([times] if "--times" in sys.argv else [])]:
        try:
            for line in check():
                print(f"{check.__name__}: {line}", flush=True)
        except Exception:  # reported; the others still run
            failed = True
            print(f"{check.__name__} FAILED\n{traceback.format_exc()}", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
