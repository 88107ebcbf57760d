"""tools.bench: its arithmetic, its report, and one real run of a small shape through each peer's code."""

import json
from pathlib import Path
from typing import Any

import pytest

from tools.bench import growth
from tools.bench.__main__ import main, parse
from tools.bench.measure import measure
from tools.bench.report import LABELS, fill, markdown_table, put_into_document, slot
from tools.bench.task import SHAPES
from tools.bench.worker import ENGINES

RESULTS = {
    "shape": "tiny",
    "name": "tiny",
    "rows": 2,
    "length": 32,
    "rank": 4,
    "warmup": 1,
    "steps": 2,
    "nproc": 1,
    "tp": 1,
    "sp": False,
    "environment": {"device": "CPU", "versions": {"torch": "2.11.0"}},
    "engines": {
        "ours-lora": {"ok": True, "step_ms": 100.0, "tokens_per_s": 640, "peak_gib": 2.0, "first_loss": 4.5, "chunk": 8}
        | {"sweep": {"16": {"step_ms": 90.0, "peak_gib": 2.5}}},
        "peft-lora": {"ok": True, "step_ms": 250.0, "tokens_per_s": 256, "peak_gib": 3.0, "first_loss": 4.5},
        "hf-full": {"ok": False, "error": "OutOfMemoryError: CUDA out of memory. Tried to allocate"},
    },
}


def test_median_throughput_and_losses() -> None:
    losses = iter([5.0, 4.0, 3.0, 2.0, 1.0])
    result = measure(lambda: next(losses), tokens=1000, warmup=2, steps=3)
    assert (result["first_loss"], result["last_loss"]) == (5.0, 1.0)
    assert len(result["times_ms"]) == 3 and result["step_ms"] == sorted(result["times_ms"])[1]
    assert result["peak_gib"] > 0


def test_table_has_ratios_and_names_what_failed() -> None:
    table = markdown_table(RESULTS)
    assert "| transformers + peft, LoRA | 250 ms | 256 | 3.0 GiB | 2.50 | 1.50 | 4.5000 |" in table
    assert "| transformers, full | out of memory |" in table
    assert "| 8 | 100 ms | 2.0 GiB |\n| 16 | 90 ms | 2.5 GiB |" in table


def test_table_says_what_adapters_cost() -> None:
    off = RESULTS["engines"] | {"ours-lora-launched": {"step_ms": 108.0}, "ours-lora-off": {"step_ms": 100.0}}
    sizes = {"tokens_per_s": 1, "peak_gib": 1.0, "first_loss": 1.0}
    engines = {name: sizes | row if "off" in name or "launched" in name else row for name, row in off.items()}
    assert "a step takes 1.080 times as long as with them off" in markdown_table(RESULTS | {"engines": engines})
    assert "times as long" not in markdown_table(RESULTS)


def test_growth_is_told_by_doublings() -> None:
    def row(rank: int, milliseconds: float) -> dict[str, Any]:
        return {"rank": rank, "rows": 2, "length": 8, "step_ms": milliseconds, "tokens_per_s": 1, "peak_gib": 1.0}

    rows = [row(8, 100.0), row(32, 400.0), {"rank": 64, "rows": 2, "length": 8, "error": "out of memory"}]
    text = growth.table({"environment": {"device": "CPU"}, "shape": "tiny", "series": {"rank": rows}})
    assert "| 8 | 16 | 100 ms | 1 | 1.0 GiB |  |" in text and "| 32 | 16 | 400 ms | 1 | 1.0 GiB | 2.00 |" in text
    assert "| 64 | 16 | out of memory | | | |" in text


def test_every_engine_has_a_label() -> None:
    assert set(LABELS) == set(ENGINES)


def test_parameters_of_the_shapes() -> None:
    """Qwen2.5's published sizes: 1.54 and 7.62 billion parameters."""
    for name, wanted in (("qwen2.5-1.5b", 1.54e9), ("qwen2.5-7b", 7.62e9)):
        sizes = SHAPES[name].sizes
        hidden, kv = sizes["hidden_size"], sizes["num_key_value_heads"] * 128
        attention = 2 * hidden * hidden + 2 * hidden * kv + hidden + 2 * kv
        layer = attention + 3 * hidden * sizes["intermediate_size"] + 2 * hidden
        embeddings = sizes["vocab_size"] * hidden * (1 if sizes["tie_word_embeddings"] else 2)
        total = layer * sizes["num_hidden_layers"] + embeddings + hidden
        assert abs(total - wanted) / wanted < 0.005


def test_report_fills_its_place_and_leaves_the_rest(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(json.dumps(RESULTS))
    document = tmp_path / "benchmarks.md"
    document.write_text("before\n<!-- bench:step-tiny -->\nold\n<!-- end -->\nafter\n")
    for _ in range(2):
        put_into_document(tmp_path, document)
        text = document.read_text()
        assert text.startswith("before\n") and text.endswith("<!-- end -->\nafter\n")
        assert "old" not in text and text.count("| 250 ms |") == 1 and "64 tokens a step" in text
    assert (tmp_path / "images" / "bench-step-tiny.png").stat().st_size > 1000


def test_every_documented_command_parses_and_has_its_place() -> None:
    text = Path("docs/benchmarks.md").read_text().replace("\\\n", " ")
    commands = [line.split("-m tools.bench ")[1] for line in text.splitlines() if "-m tools.bench " in line]
    assert len(commands) >= 3
    for command in commands:
        options = parse(command.split())
        assert set(options.engines.split(",")) <= set(ENGINES)
        results = RESULTS | {"name": options.name or options.shape, "tp": options.tp}
        fill(text, results, "image.png")
        assert slot(results) in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--engines", "theirs"], "ours-lora"),
        (["--engines", "peft-lora", "--nproc", "2", "--tp", "2"], "ours and bridge alone"),
        (["--engines", "ours-lora", "--tp", "2"], "--nproc 2"),
        (["--shape", "huge", "--device", "cpu"], "qwen2.5-1.5b"),
    ],
)
def test_bad_options(tmp_path: Path, capsys: pytest.CaptureFixture, arguments: list[str], message: str) -> None:
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.long
@pytest.mark.timeout(900)
def test_small_run_measures_the_same_model_in_every_engine(tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["--shape", "tiny", "--device", "cpu", "--steps", "2", "--warmup", "1", "--chunk", "16"]
    arguments += [
        "--engines",
        "ours-lora,peft-lora,bridge-lora,ours-lora-off",
        "--sweep-chunks",
        "8",
        "--profile",
        "--out",
        str(out),
    ]
    assert main(arguments) == 0
    results = json.loads((out / "results.json").read_text())
    losses = [row["first_loss"] for row in results["engines"].values()]
    assert len(losses) == 4 and max(losses) - min(losses) < 1e-4
    off = results["engines"].pop("ours-lora-off")
    assert off["last_loss"] == off["first_loss"]
    assert all(row["last_loss"] < row["first_loss"] for row in results["engines"].values())
    assert results["engines"]["ours-lora"]["sweep"]["8"]["step_ms"] > 0
    assert "aten::" in (out / "profile-ours-lora.txt").read_text()
    assert (out / "chart.png").exists() and "Megatron-Bridge, LoRA" in (out / "table.md").read_text()
    assert main(arguments) == 2
