"""tools.bench.rollouts: its table, its refusals, and one real run of a small shape."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.launch import ROOT
from tools.bench.rollouts import COLUMNS, WAYS, main, parse, table


def test_table_has_a_row_a_way() -> None:
    values = {name: float(number) for number, name in enumerate(COLUMNS)}
    lines = table({way: values for way in WAYS}).splitlines()
    assert len(lines) == 2 + len(WAYS)
    assert {line.count("|") for line in lines} == {len(COLUMNS) + 2}


def test_the_documented_commands_parse() -> None:
    text = (ROOT / "docs" / "benchmarks.md").read_text()
    commands = [line.split("-m tools.bench.rollouts ")[1] for line in text.splitlines() if "bench.rollouts " in line]
    assert [parse(command.split()).nproc for command in commands] == [1, 2, 1, 1]


@pytest.mark.parametrize(
    ("arguments", "message"), [(["--ways", "pigeon"], "adapter, merge, native"), (["--shape", "huge"], "qwen2.5-1.5b")]
)
def test_bad_options(tmp_path: Path, capsys: pytest.CaptureFixture, arguments: list[str], message: str) -> None:
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.long
def test_a_small_run_fills_every_column(tmp_path: Path) -> None:
    options = "--device cpu --shape tiny --dataset arithmetic --prompts 2 --generations 2 --new-tokens 8 --steps 3"
    command = [sys.executable, "-m", "tools.bench.rollouts", "--out", str(tmp_path / "out"), *options.split()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [line.split("|")[2:-1] for line in (tmp_path / "out" / "table.md").read_text().splitlines()[2:]]
    adapter, merged, native = ([float(cell.replace(",", "")) for cell in row] for row in rows)
    place = list(COLUMNS).index
    assert adapter[place("refit_seconds")] > 0 and merged[place("refit_bytes")] > 0
    assert native[place("refit_bytes")] == 0
    assert all(row[place("training_seconds")] > 0 for row in (adapter, merged, native))
