"""tools.bench: its arithmetic, its report, and one real run of a small shape through each peer's code."""

import json
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from megatron_lora.conversion import safetensors_io
from megatron_lora.conversion.inventory import open_model
from megatron_lora.errors import UserError
from tools.bench import estimate, growth, growth_report, random_weights
from tools.bench.__main__ import main, parse
from tools.bench.measure import measure, parts_of
from tools.bench.processes import kill_tree
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
    assert "| transformers, full | out of memory | | | | | |\n" in table
    assert "| 8 | 100 ms | 2.0 GiB |\n| 16 | 90 ms | 2.5 GiB |" in table


def test_table_says_how_long_a_gpu_does_nothing() -> None:
    engines = RESULTS["engines"] | {"ours-lora": RESULTS["engines"]["ours-lora"] | {"idle_share": 0.034}}
    lines = markdown_table(RESULTS | {"engines": engines}).splitlines()
    assert lines[0].endswith("| GPU idle |") and lines[2].endswith("| 4.5000 | 3.4% |")
    assert len({line.count("|") for line in lines[:5]}) == 1


def test_table_says_what_adapters_cost() -> None:
    off = RESULTS["engines"] | {"ours-lora-launched": {"step_ms": 108.0}, "ours-lora-off": {"step_ms": 100.0}}
    sizes = {"tokens_per_s": 1, "peak_gib": 1.0, "first_loss": 1.0}
    engines = {name: sizes | row if "off" in name or "launched" in name else row for name, row in off.items()}
    assert "a step takes 1.080 times as long as with them off" in markdown_table(RESULTS | {"engines": engines})
    assert "times as long" not in markdown_table(RESULTS)


def test_growth_is_told_by_doublings_and_by_parts() -> None:
    def row(rank: int, milliseconds: float, products: float = 60.0) -> dict[str, Any]:
        parts = {"busy": 90.0, "products": products, "attention": 20.0, "communication": 0.0, "other": 10.0}
        found = {"step_ms": milliseconds, "tokens_per_s": 1, "peak_gib": 1.0, "idle_share": 0.1, "parts_ms": parts}
        return {"shape": "tiny", "rank": rank, "rows": 2, "length": 8} | found

    failed = {"shape": "tiny", "rank": 64, "rows": 2, "length": 8, "error": "out of memory"}
    rows = [row(8, 100.0), row(32, 400.0, products=360.0), failed]
    text = growth_report.table({"environment": {"device": "CPU"}, "series": {"rank": rows}})
    assert "| 8 | tiny | 16 | 100 ms | 1 | 1.0 GiB | 60 | 20 | 0 | 10 | 10.0% |  |" in text
    assert "| 32 | tiny | 16 | 400 ms | 1 | 1.0 GiB | 360 | 20 | 0 | 10 | 10.0% | 2.00 |" in text
    assert "| 64 | tiny | 16 | out of memory |" in text
    assert len({line.count("|") for line in text.splitlines() if line.startswith("|")}) == 1
    # Rank should cost nothing on a straight line; idle is 100 - 90 and 400 - 90.
    assert "gives 100 ms for the last, which took 400" in text
    assert "products +300, idle +300, attention +0" in text


def test_growth_has_the_points_of_its_series() -> None:
    options = growth.parse(["--out", "x", "--series", "tokens,size,context,tp,pp"])
    series = growth.series_of(options)
    assert [point.rows for point in series["tokens"]] == [1, 2, 4, 8]
    assert {point.rows * point.length for point in series["size"]} == {8192}
    assert [(point.length, point.cp, point.recompute) for point in series["context"]][-1] == (131072, 2, True)
    assert [point.num_processes for point in series["tp"] + series["pp"]] == [1, 2, 1, 2]
    with pytest.raises(UserError, match="--series width: wanted a list of rank, tokens"):
        growth.series_of(growth.parse(["--out", "x", "--series", "width"]))


def test_what_a_gpu_does_is_told_apart() -> None:
    spans = [
        ("nvjet_tst_128x256", 0.0, 4.0),
        ("ncclDevKernel_ReduceScatter", 3.0, 7.0),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop", 6.0, 8.0),
        ("elementwise_kernel", 20.0, 21.0),
        ("Memcpy DtoD", 20.5, 22.0),
    ]
    assert parts_of(spans) == {"busy": 10.0, "communication": 2.0, "attention": 2.0, "products": 4.0, "other": 2.0}
    assert parts_of([])["busy"] == 0.0


def test_random_weights_need_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safetensors_io, "read_tensor", safetensors_io.read_tensor)  # put back afterwards
    folder = tmp_path / "model"
    random_weights.write_hollow_model(SHAPES["tiny-experts"], folder, torch.float32)
    file = (folder / "model.safetensors").stat()
    assert file.st_blocks * 512 < file.st_size / 2
    random_weights.make_weights_on(torch.device("cpu"))
    _, weights = open_model(folder, folder)
    names = ["model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.experts.3.up_proj.weight"]
    first, second = (weights.read(name) for name in names)
    assert tuple(second.shape) == (64, 128) and 0.019 < second.std() < 0.021
    assert first.flatten()[:64].tolist() != second.flatten()[:64].tolist()
    assert torch.equal(weights.read(names[0]), first)
    assert weights.read("model.norm.weight").unique().tolist() == [1.0]


def test_an_estimate_of_what_was_measured_is_what_was_measured() -> None:
    parts = {"busy": 450.0, "products": 300.0, "attention": 50.0, "communication": 0.0, "other": 100.0}
    row = {"parts_ms": parts, "idle_share": 0.1}
    one = {"shape": "qwen2.5-7b", "rows": 2, "length": 4096, "engines": {"ours-lora": row}}
    split = {"shape": "qwen2.5-7b", "rows": 2, "length": 4096, "tp": 2, "parts_ms": {"communication": 40.0}}
    rates = estimate.rates_of(one, "ours-lora", {"series": {"tp": [split]}})
    same = estimate.Plan("7B", estimate.sizes_of("qwen2.5-7b"), 1, 1, 1, 1, 2, 4096, 1)
    found = estimate.estimate(same, rates)
    assert found["step"] == pytest.approx(500) and found["tokens_per_s_gpu"] == pytest.approx(8192 / 0.5)
    # Two GPUs share all but the communication; a pipeline of two stages takes the time of 5 micro-batches for 4.
    assert estimate.estimate(replace(same, tp=2), rates)["step"] == pytest.approx((450 / 2 + 40) / 0.9)
    assert estimate.estimate(replace(same, pp=2, micro_batches=4), rates)["step"] == pytest.approx(500 / 2 * 5)
    with pytest.raises(UserError, match="ours-lora-fp8"):
        estimate.rates_of(one, "ours-lora-fp8", {"series": {}})


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_bench_leaves_no_process(how: signal.Signals) -> None:
    """The ranks of a launcher have a session each, and are told by no signal to its group."""
    rank = (
        "from tools.bench.processes import *; import time; die_with_parent(); print('up', flush=True); time.sleep(600)"
    )
    launcher = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {rank!r}], start_new_session=True)"
    bench = "import os, sys; from tools.bench.processes import *; "
    bench += f"start([sys.executable, '-c', {launcher!r}], os.environ).wait()"
    process = subprocess.Popen([sys.executable, "-c", bench], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "up\n"
    started = psutil.Process(process.pid).children(recursive=True)
    assert len(started) == 2
    process.send_signal(how)
    process.wait(10)
    _, left = psutil.wait_procs(started, timeout=10)
    assert not left


def test_an_engine_whose_time_is_up_is_ended_with_its_ranks() -> None:
    code = "import subprocess; rank = subprocess.Popen(['sleep', '600'], start_new_session=True); "
    code += "print(rank.pid, flush=True); input()"
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    rank = psutil.Process(int(process.stdout.readline()))
    kill_tree(process)
    assert process.poll() is not None and not rank.is_running()


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
