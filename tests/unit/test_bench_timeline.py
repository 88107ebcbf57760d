"""tools.bench.timeline: phases, what lies inside them, and what lies in none."""

import json
from pathlib import Path

import pytest

from megatron_lora.runtime.spans import VARIABLE, span
from tools.bench.timeline import draw, last_step


def test_the_last_steps_phases_and_gaps(tmp_path: Path) -> None:
    spans = [
        ("step", 0.0, 5.0),
        ("generation", 10.0, 14.0),
        ("forward", 15.0, 15.5),
        ("forward", 16.0, 16.5),
        ("training", 15.0, 18.0),
        ("refit", 19.0, 20.0),
        ("step", 10.0, 20.0),
        ("generation", 21.0, 22.0),
    ]
    path = tmp_path / "spans.jsonl"
    path.write_text("".join(json.dumps({"name": n, "start": a, "end": b}) + "\n" for n, a, b in spans))
    found = last_step(path)
    assert [(phase.name, phase.start, phase.end) for phase in found.phases] == [
        ("generation", 0.0, 4.0),
        ("training", 5.0, 8.0),
        ("refit", 9.0, 10.0),
    ]
    assert [each.name for each in found.inner] == ["forward", "forward"]
    assert found.gap_share == pytest.approx(0.2)
    assert found.describe() == "step 10.00 s: generation 4.00, training 3.00, refit 1.00; 20.0% in no phase"
    draw([("vLLM", found)], tmp_path / "timeline.png")
    assert (tmp_path / "timeline.png").stat().st_size > 1000
    path.write_text("")
    with pytest.raises(ValueError, match="no whole step"):
        last_step(path)


def test_spans_are_recorded_where_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "spans.jsonl"
    monkeypatch.delenv(VARIABLE, raising=False)
    with span("step"):
        pass
    monkeypatch.setenv(VARIABLE, str(path))
    with span("step"), span("training"):
        pass
    monkeypatch.setenv("RANK", "1")
    with span("step"):
        pass
    assert [json.loads(line)["name"] for line in path.read_text().splitlines()] == ["training", "step"]
    assert last_step(path).phases[0].name == "training"
