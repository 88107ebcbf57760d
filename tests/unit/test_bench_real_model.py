"""The study of a real model: what it says of runs, and that a call whose time is up leaves the rest to the next."""

import json
from pathlib import Path

import pytest

from tools.bench import real_model
from tools.bench.gsm8k_accuracy import read_questions


def write_metrics(run: Path) -> None:
    run.mkdir(parents=True)
    lines = [
        {
            "kind": "train",
            "step": step,
            "loss": 1.0,
            "reward": step / 100,
            "step_time_seconds": 50.0 if step == 1 else 4.0,
            "refit_probe_error": 0.01 * step,
            "refit_probe_tolerance": 0.25,
            "rollout_logprob_error": 0.02,
        }
        for step in range(1, 21)
    ]
    lines.insert(5, {"kind": "validation", "step": 5, "accuracy": 0.25, "tokens_per_second": 9.0})
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_the_summary_has_medians_ends_of_curves_and_how_near_an_alarm_was(tmp_path: Path) -> None:
    write_metrics(tmp_path / "grpo")
    found = real_model.summarize(tmp_path / "grpo" / "metrics.jsonl")
    assert found["steps"] == 20
    assert found["medians"]["step_time_seconds"] == 4.0
    assert found["reward"] == {"first_10": pytest.approx(0.055), "last_10": pytest.approx(0.155), "largest": 0.2}
    assert found["largest_probe_error"] == pytest.approx(0.2)
    assert found["nearest_to_tolerance"] == pytest.approx(0.8)
    assert found["validation"] == [{"step": 5, "accuracy": 0.25, "tokens_per_second": 9.0}]


def test_a_call_without_time_starts_nothing_and_reports_what_there_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    work, report = tmp_path / "work", tmp_path / "report"
    (work / "model").mkdir(parents=True)
    (work / "sft.done").touch()
    (work / "accuracy.json").write_text(json.dumps({"base": {"exact": 0.1}, "sft": {"exact": 0.2}}))
    write_metrics(work / "sft")
    (work / "sft" / "latest_step.txt").write_text("20\n")
    assert real_model.main([str(work), "--report", str(report), "--minutes", "0.5"]) == 0
    assert "the same command goes on from here" in capsys.readouterr().out
    summary = json.loads((report / "summary.json").read_text())
    assert summary["accuracy"]["sft"]["exact"] == 0.2 and summary["sft"]["steps"] == 20 and "grpo" not in summary
    assert not (work / "grpo").exists()


def test_questions_that_are_not_there_are_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MEGATRON_LORA_GSM8K", str(tmp_path))
    with pytest.raises(Exception, match="set MEGATRON_LORA_GSM8K to a folder that holds GSM8K's test.jsonl"):
        read_questions(None)
    (tmp_path / "test.jsonl").write_text('{"question": "1 + 1?", "answer": "#### 2"}\n' * 3)
    assert len(read_questions(2)) == 2
