"""Results as a table and a bar chart; and into docs/benchmarks.md: `python -m tools.bench.report RESULTS_DIR...`."""

import argparse
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

from megatron_lora.errors import UserError

LABELS = {
    "ours-lora": "Megatron-LoRA, LoRA",
    "ours-lora-launched": "Megatron-LoRA, LoRA, cuda_graph_impl=none",
    "ours-lora-kept": "Megatron-LoRA, LoRA, recompute_adapter_inputs=[]",
    "ours-lora-norms": "Megatron-LoRA, LoRA, recompute_adapter_inputs=[layernorm]",
    "ours-lora-inputs": "Megatron-LoRA, LoRA, recompute_adapter_inputs=[layernorm, activation]",
    "ours-lora-fp8": "Megatron-LoRA, LoRA, base in FP8",
    "ours-lora-off": "Megatron-LoRA, adapters off, cuda_graph_impl=none",
    "ours-lora-experts": "Megatron-LoRA, LoRA, experts too",
    "ours-lora-experts-shared": "Megatron-LoRA, LoRA, experts too, one pair for all",
    "ours-full": "Megatron-LoRA, full",
    "dtensor-lora": "DTensor backend, LoRA",
    "dtensor-lora-plain": "DTensor backend, LoRA, use_triton=false",
    "dtensor-lora-compile": "DTensor backend, LoRA, compile=true",
    "dtensor-lora-offload": "DTensor backend, LoRA, cpu_offload=true",
    "peft-lora": "transformers + peft, LoRA",
    "peft-lora-bf16": "transformers + peft, LoRA, bf16 factors",
    "hf-full": "transformers, full",
    "bridge-lora": "Megatron-Bridge, LoRA",
    "bridge-lora-experts": "Megatron-Bridge, LoRA, experts too",
    "bridge-lora-experts-shared": "Megatron-Bridge, LoRA, experts too, one pair for all",
    "bridge-lora-fp8": "Megatron-Bridge, LoRA, its FP8 recipe",
    "bridge-lora-fp8-all-layers": "Megatron-Bridge, LoRA, FP8 in every layer",
    "bridge-full": "Megatron-Bridge, full",
}
REFERENCE = "ours-lora"
DOCUMENT = Path("docs/benchmarks.md")
IMAGES = "images"
OURS, PEER = "#1b7f79", "#9aa5b1"


def markdown_table(results: dict[str, Any]) -> str:
    """One row an engine; the last two columns are that engine's step time and memory over this project's LoRA."""
    engines = results["engines"]
    ours = engines.get(REFERENCE, {})
    idle = any("idle_share" in row for row in engines.values())
    lines = [
        "| engine | step | tokens/s | peak memory | step / ours | memory / ours | first loss |" + " GPU idle |" * idle,
        "|---|---|---|---|---|---|---|" + "---|" * idle,
    ]
    for name, row in engines.items():
        label = LABELS[name]
        if "step_ms" not in row:
            lines.append(f"| {label} | {_short(row.get('error', 'failed'))} |" + " |" * (5 + idle))
            continue
        slower = f"{row['step_ms'] / ours['step_ms']:.2f}" if "step_ms" in ours else ""
        larger = f"{row['peak_gib'] / ours['peak_gib']:.2f}" if ours.get("peak_gib") else ""
        lines.append(
            f"| {label} | {row['step_ms']:.0f} ms | {row['tokens_per_s']:,} | {row['peak_gib']:.1f} GiB | {slower} "
            f"| {larger} | {row['first_loss']:.4f} |" + (f" {_idle(row)} |" if idle else "")
        )
    return "\n".join([*lines, *_cost_lines(engines), *_sweep_lines(engines), ""])


def _idle(row: dict[str, Any]) -> str:
    return f"{max(0.0, row['idle_share']):.1%}" if "idle_share" in row else ""


def _cost_lines(engines: dict[str, Any]) -> list[str]:
    """The step beside the same one without the adapters' products, both kernel by kernel."""
    on, off = (engines.get(name, {}).get("step_ms") for name in ("ours-lora-launched", "ours-lora-off"))
    if not on or not off:
        return []
    return ["", f"What adapters cost: a step takes {on / off:.3f} times as long as with them off and dx kept."]


def _sweep_lines(engines: dict[str, Any]) -> list[str]:
    lines = []
    for name, row in engines.items():
        if not row.get("sweep"):
            continue
        lines += ["", f"{LABELS[name]}, by tokens a chunk of the head:", "", "| chunk | step | peak memory |"]
        lines.append("|---|---|---|")
        measured = {str(row["chunk"]): row, **row["sweep"]}
        for chunk in sorted(measured, key=int):
            lines.append(f"| {chunk} | {measured[chunk]['step_ms']:.0f} ms | {measured[chunk]['peak_gib']:.1f} GiB |")
    return lines


def _short(error: str) -> str:
    if "out of memory" in error.lower():
        return "out of memory"
    return error.splitlines()[0][:80].replace("|", "/")


def describe(results: dict[str, Any]) -> str:
    """One paragraph: what was measured, on what, with which versions."""
    environment = results.get("environment") or {}
    versions = ", ".join(f"{name} {version}" for name, version in environment.get("versions", {}).items() if version)
    layout = "one GPU" if results["nproc"] == 1 else f"{results['nproc']} GPUs, TP={results['tp']}"
    layout += " with sequence parallelism" if results["sp"] else ""
    tokens = results["rows"] * results["length"]
    return (
        f"{environment.get('device', '')}, {layout}; {results['rows']} x {results['length']} = {tokens:,} tokens a "
        f"step, rank {results['rank']} on every linear, median of {results['steps']} steps after {results['warmup']}. "
        f"{versions}."
    )


def draw_chart(results: dict[str, Any], path: Path) -> None:
    """Tokens per second and peak memory, one bar an engine."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [(LABELS[name], name, row) for name, row in results["engines"].items()]
    if not any("step_ms" in row for _, _, row in rows):
        return
    labels = [label for label, _, _ in rows]
    colors = [OURS if name.startswith(("ours", "dtensor")) else PEER for _, name, _ in rows]
    figure, axes = plt.subplots(1, 2, figsize=(11, 0.55 * len(rows) + 1.6), sharey=True)
    for axis, key, form, title in (
        (axes[0], "tokens_per_s", "{:,.0f}", "tokens per second (more is better)"),
        (axes[1], "peak_gib", "{:.1f}", "peak memory, GiB (less is better)"),
    ):
        bars = axis.barh(labels, [row.get(key, 0) for _, _, row in rows], color=colors)
        values = [form.format(row[key]) if key in row else _short(row.get("error", "failed")) for _, _, row in rows]
        axis.bar_label(bars, values, padding=3)
        axis.set_title(title, fontsize=10)
        axis.margins(x=0.18)
        axis.locator_params(axis="x", nbins=5)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].invert_yaxis()
    figure.suptitle(f"Training step, {results['shape']}, {(results.get('environment') or {}).get('device', '')}")
    figure.tight_layout()
    temporary = path.with_name(path.name + ".part")
    figure.savefig(temporary, dpi=130, format="png")
    os.replace(temporary, path)
    plt.close(figure)


def slot(results: dict[str, Any]) -> str:
    """The name of the place in the document that these results fill."""
    return f"step-{results['name']}" + (f"-tp{results['tp']}" if results["tp"] > 1 else "")


def fill(text: str, results: dict[str, Any], image: str) -> str:
    """The document with the slot's content replaced. Slots are `<!-- bench:NAME -->` ... `<!-- end -->`."""
    name = slot(results)
    pattern = re.compile(rf"(<!-- bench:{re.escape(name)} -->\n).*?(<!-- end -->)", re.DOTALL)
    if not pattern.search(text):
        raise UserError(f"the document has no place for {name}; add <!-- bench:{name} --> and, below, <!-- end -->")
    content = f"{describe(results)}\n\n{markdown_table(results)}\n![{results['shape']}]({image})\n"
    return pattern.sub(lambda match: match[1] + content + match[2], text)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.bench.report", description=__doc__)
    parser.add_argument("results", nargs="+", type=Path, help="folders that tools.bench wrote")
    parser.add_argument("--document", type=Path, default=DOCUMENT)
    options = parser.parse_args(arguments)
    try:
        for folder in options.results:
            put_into_document(folder, options.document)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def put_into_document(folder: Path, document: Path) -> None:
    """Table into the document's slot, chart into images/ beside it."""
    source = folder / "results.json"
    if not source.exists():
        raise UserError(f"{source} is not there; name a folder that `python -m tools.bench --out` wrote")
    results = json.loads(source.read_text())
    image = f"{IMAGES}/bench-{slot(results)}.png"
    text = fill(document.read_text(), results, image)
    (document.parent / IMAGES).mkdir(exist_ok=True)
    draw_chart(results, document.parent / image)
    temporary = document.with_name(document.name + ".part")
    temporary.write_text(text)
    temporary.replace(document)
    print(f"{document}: {slot(results)}")


if __name__ == "__main__":
    sys.exit(main())
