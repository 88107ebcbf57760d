"""tools.bench.asynchronous: its table, what it refuses, what it reads of GPUs, and one real run of a small shape."""

import math
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.support.launch import ROOT
from tools.bench import asynchronous
from tools.bench.asynchronous import COLUMNS, WAYS, compilation, cut_off, main, parse, summary, table
from tools.bench.gpu_use import GpuUse
from tools.bench.grpo_step import end, train


def test_table_has_a_row_a_way() -> None:
    values = {name: float(number) for number, name in enumerate(COLUMNS)}
    without = {name: value for name, value in values.items() if name != "rollout_wait_seconds"}
    of_way = {
        "turns": without | {"ages": {}, "idle": {}, "steps": 0},
        "ahead": values | {"ages": {0: 0.25, 1: 0.75}, "idle": {0: 0.1, 1: 0.5}, "steps": 3},
        "colocated": without | {"ages": {}, "idle": {}, "steps": 3},
    }
    lines = table(of_way).splitlines()
    assert len(lines) == 2 + len(WAYS)
    assert {line.count("|") for line in lines} == {len(COLUMNS) + 5}
    assert "0: 25%, 1: 75%" in lines[3] and "10%, 50%" in lines[3] and "-" in lines[2]
    assert "warms up" in lines[2] and lines[3].endswith("| 3 |")


def test_a_summary_leaves_out_what_warms_up() -> None:
    steps = [
        {"step_time_seconds": seconds, "num_samples": 8, "staleness_share_0": 0.5, "staleness_share_1": 0.5}
        for seconds in (9.0, 5.0, 2.0, 4.0)
    ]
    found = summary(steps)
    assert found == {"step_time_seconds": 3.0, "samples_per_second": 3.0, "ages": {0: 0.5, 1: 0.5}, "steps": 2}
    assert summary(steps[:2])["step_time_seconds"] == 5.0 and summary(steps[:2])["steps"] == 0


def test_a_run_that_takes_too_long_is_ended_with_what_it_started(tmp_path: Path) -> None:
    code = "import subprocess,sys,time; c=subprocess.Popen(['sleep','600']); print(c.pid, flush=True); time.sleep(600)"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    child = psutil.Process(int(process.stdout.readline()))
    end(process, seconds=0.2)
    child.wait(5)
    assert process.poll() is not None and not child.is_running()


def test_what_is_left_of_the_budget_is_dealt_out_when_a_way_can_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asynchronous, "_began", 1000.0)
    assert cut_off(400.0, None, 2) == 1400.0  # the server is not there yet: it has all that there is
    assert cut_off(400.0, 1200.0, 2) == 1300.0
    assert cut_off(400.0, 1250.0, 1) == 1400.0
    assert cut_off(math.inf, 1250.0, 2) == math.inf


def test_a_run_is_cut_off_when_its_time_is_over(tmp_path: Path) -> None:
    with pytest.raises(subprocess.TimeoutExpired):
        train(["no=key"], 1, {}, until=lambda: 0.0)


def test_graphs_are_of_few_numbers_of_answers() -> None:
    options = parse(["--out", "x", "--prompts", "5", "--generations", "4", "--quick-start"])
    assert compilation(options)["cudagraph_capture_sizes"] == [1, 2, 4, 8, 16, 20] and compilation(options)["mode"] == 0
    assert list(compilation(parse(["--out", "x"]))) == ["cudagraph_capture_sizes"]


def test_a_gpu_is_idle_in_what_it_does_not_run_while_steps_count() -> None:
    counts = True
    use = GpuUse(lambda: counts)
    for line in ("0, 100", "1, 20", "0, 50", "1, [N/A]", "0, 90\n"):
        use.take(line)
    counts = False
    use.take("0, 0")
    assert use.idle_shares() == pytest.approx({0: 1 - (1 + 0.5 + 0.9) / 3, 1: 0.8})
    assert GpuUse(lambda: True).idle_shares() == {}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ways", "ahead,pigeon"], "turns, ahead, colocated"),
        (["--shape", "huge"], "qwen2.5-1.5b"),
        (["--steps", "2"], "wanted more than 2"),
    ],
)
def test_bad_options(tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_documented_commands_parse() -> None:
    text = (ROOT / "docs" / "benchmarks.md").read_text()
    commands = [line.split("bench.asynchronous ")[1] for line in text.splitlines() if "bench.asynchronous " in line]
    assert [parse(command.split()).ways for command in commands] == [["turns", "ahead"], ["colocated"]]


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_a_small_run_fills_the_table(tmp_path: Path) -> None:
    options = "--device cpu --shape tiny --dataset arithmetic --prompts 2 --generations 2 --new-tokens 8 --steps 4"
    command = [sys.executable, "-m", "tools.bench.asynchronous", "--out", str(tmp_path / "out"), *options.split()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1100)
    assert done.returncode == 0, done.stderr[-3000:]
    turns, ahead = [line.split("|")[2:-1] for line in (tmp_path / "out" / "table.md").read_text().splitlines()[2:]]
    place = list(COLUMNS).index
    for row in (turns, ahead):
        assert float(row[place("training_seconds")]) > 0 and float(row[place("step_time_seconds")]) > 0
    assert turns[place("rollout_wait_seconds")].strip() == "-" and ahead[len(COLUMNS)].strip() == "0: 0%, 1: 100%"
