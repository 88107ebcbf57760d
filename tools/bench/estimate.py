"""Tokens/s on GPUs that were not there, from the parts that were measured: an estimate, no measurement.

    python -m tools.bench.estimate --one results/fp8-7b/results.json --two results/growth-2/growth.json --out estimate

`--one` is a result of tools.bench on one GPU with the engines `ours-lora` and, for FP8, `ours-lora-fp8`; `--two` one of
tools.bench.growth with the series tp. A step's GPU time is taken apart by kind of kernel, and each kind is scaled by
what it depends on. With T tokens a micro-batch, S a sequence, L layers, hidden size h, V words, P weights of a layer's
linears, A weights of its adapters, m micro-batches a step:

    products       = (4 P L + 6 A L + 4 V h) T / (TP PP) / R      R: the measured step's rate, in bf16 or FP8
    attention      = 7 T S h L / (TP PP) / R'                     forward 2, backward 5: half of the square is masked
    other          = T h L / (TP PP) * c                          as long as the activations: norms, SwiGLU, rope, ...
    communication  = T h L / PP * 2 (TP - 1) / TP * d             what the measured step at TP=2 does not hide
    idle           = its share of the measured step
    step           = (sum of them) (m + (PP - 1) / VP)            a pipeline with VP virtual stages a rank
    tokens/s a GPU = m T / (step TP PP)

Not in it: the sum of the adapters' gradients over data-parallel ranks (0.3 GB for 8B, 0.2 GB a rank for 70B, once a
step), exchange between stages, stages of unequal length (the last has the head), the network between hosts. R, R', c
and d are those of the GPU that was measured.
"""

import argparse
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_lora.errors import UserError
from tools.bench.growth_report import PARTS
from tools.bench.task import shape_of

RANK = 32


@dataclass(frozen=True)
class Sizes:
    """Of a model of Llama's or Qwen2's kind."""

    layers: int
    hidden: int
    inner: int
    key_value: int
    vocabulary: int

    @property
    def weights(self) -> int:
        """Of a layer's linears."""
        return 2 * self.hidden * (self.hidden + self.key_value) + 3 * self.hidden * self.inner

    @property
    def adapter(self) -> int:
        """Of a layer's adapters, one A for what reads the same tensor."""
        return RANK * (
            (2 * self.hidden + 2 * self.key_value)
            + 2 * self.hidden
            + (self.hidden + 2 * self.inner)
            + (self.inner + self.hidden)
        )

    def product_work(self, tokens: int) -> float:
        layers = self.layers * (4 * self.weights + 6 * self.adapter)
        return (layers + 4 * self.vocabulary * self.hidden) * tokens

    def attention_work(self, tokens: int, length: int) -> float:
        return 7 * tokens * length * self.hidden * self.layers

    def activations(self, tokens: int) -> float:
        return tokens * self.hidden * self.layers


LLAMA_8B = Sizes(32, 4096, 14336, 1024, 128256)
LLAMA_70B = Sizes(80, 8192, 28672, 1024, 128256)


@dataclass(frozen=True)
class Plan:
    """A layout and a step: micro_batches of `rows` x `length` tokens on each data-parallel rank. vp: virtual stages."""

    name: str
    sizes: Sizes
    gpus: int
    tp: int
    pp: int
    vp: int
    rows: int
    length: int
    micro_batches: int
    published: str = ""


BRIDGE_70B = "Bridge, 8 H100, FP8: 2,643"
AUTOMODEL_70B = "Automodel, 8 H100, bf16, TP=2 x FSDP=4: 1,092"
PLANS = (
    Plan("Llama 3 8B", LLAMA_8B, 8, tp=1, pp=1, vp=1, rows=2, length=4096, micro_batches=1),
    Plan("Llama 3 70B", LLAMA_70B, 8, 2, 4, 20, 1, 4096, 32, f"{BRIDGE_70B}; {AUTOMODEL_70B}"),
    Plan("Llama 3 70B", LLAMA_70B, 64, 2, 4, 20, 1, 4096, 8, BRIDGE_70B),
)


@dataclass(frozen=True)
class Rates:
    """What one GPU does a millisecond: work of products and attention; and milliseconds for an activation's element of
    everything else, and of TP=2's communication. idle: share of a step."""

    products: float
    attention: float
    other: float
    communication: float
    idle: float


def sizes_of(name: str) -> Sizes:
    sizes = shape_of(name).sizes
    key_value = sizes["hidden_size"] // sizes["num_attention_heads"] * sizes["num_key_value_heads"]
    return Sizes(
        sizes["num_hidden_layers"], sizes["hidden_size"], sizes["intermediate_size"], key_value, sizes["vocab_size"]
    )


def rates_of(one: dict[str, Any], engine: str, two: dict[str, Any]) -> Rates:
    """Raises UserError where the results have not what is needed."""
    row, sizes = one["engines"].get(engine, {}), sizes_of(one["shape"])
    if "parts_ms" not in row:
        raise UserError(f"--one has no parts of {engine}; measure it with tools.bench on a GPU")
    tokens, parts = one["rows"] * one["length"], row["parts_ms"]
    split = [point for point in two["series"].get("tp", []) if point["tp"] == 2 and "parts_ms" in point]
    if not split:
        raise UserError("--two has no point with TP=2; measure it with tools.bench.growth --series tp on two GPUs")
    exchanged = sizes_of(split[0]["shape"]).activations(split[0]["rows"] * split[0]["length"])
    return Rates(
        products=sizes.product_work(tokens) / parts["products"],
        attention=sizes.attention_work(tokens, one["length"]) / parts["attention"],
        other=parts["other"] / sizes.activations(tokens),
        communication=split[0]["parts_ms"]["communication"] / exchanged,
        idle=max(0.0, row["idle_share"]),
    )


def estimate(plan: Plan, rates: Rates) -> dict[str, float]:
    """Milliseconds of a micro-batch on one GPU by part, of a step, and tokens/s a GPU."""
    tokens, share = plan.rows * plan.length, plan.tp * plan.pp
    activations = plan.sizes.activations(tokens)
    parts = {
        "products": plan.sizes.product_work(tokens) / share / rates.products,
        "attention": plan.sizes.attention_work(tokens, plan.length) / share / rates.attention,
        "communication": activations / plan.pp * 2 * (plan.tp - 1) / plan.tp * rates.communication,
        "other": activations / share * rates.other,
    }
    micro_batch = sum(parts.values()) / (1 - rates.idle)
    step = micro_batch * (plan.micro_batches + (plan.pp - 1) / plan.vp)
    return parts | {"step": step, "tokens_per_s_gpu": tokens * plan.micro_batches * 1e3 / step / share}


def table(found: list[tuple[Plan, str, dict[str, float]]]) -> str:
    parts = " | ".join(f"{part}, ms" for part in PARTS)
    lines = [
        f"| model | GPUs | layout | base | {parts} | step | tokens/s a GPU | published |",
        f"|{'---|' * (len(PARTS) + 7)}",
    ]
    for plan, base, values in found:
        layout = f"TP={plan.tp}, PP={plan.pp}, VP={plan.vp}, DP={plan.gpus // plan.tp // plan.pp}, "
        layout += f"{plan.micro_batches} x {plan.rows * plan.length:,} tokens"
        parts = " | ".join(f"{values[part]:.0f}" for part in PARTS)
        lines.append(
            f"| {plan.name} | {plan.gpus} | {layout} | {base} | {parts} | {values['step']:,.0f} ms | "
            f"{values['tokens_per_s_gpu']:,.0f} | {plan.published} |"
        )
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench.estimate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--one", type=Path, required=True, help="results.json of one GPU")
    parser.add_argument("--two", type=Path, required=True, help="growth.json of two GPUs")
    parser.add_argument("--out", type=Path, required=True, help="folder for estimate.json and table.md")
    options = parser.parse_args(arguments)
    try:
        one, two = json.loads(options.one.read_text()), json.loads(options.two.read_text())
        found = []
        for base, engine in (("bf16", "ours-lora"), ("FP8", "ours-lora-fp8")):
            if engine == "ours-lora" or engine in one["engines"]:
                rates = rates_of(one, engine, two)
                found += [(plan, base, estimate(plan, rates)) for plan in PLANS]
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    content = [{"model": plan.name, "gpus": plan.gpus, "base": base} | values for plan, base, values in found]
    for name, text in (("estimate.json", json.dumps(content, indent=1)), ("table.md", table(found))):
        temporary = options.out / f"{name}.part"
        temporary.write_text(text)
        os.replace(temporary, options.out / name)
    print(table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
