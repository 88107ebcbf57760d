"""metrics.jsonl, the trackers, the terminal and the pictures, each written for real and read back."""

import io
import json
import os
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from megatron_lora.config.schema_run import LoggerConfig
from megatron_lora.errors import UserError
from megatron_lora.metrics import RunReporter, check_trackers
from megatron_lora.reporting.console import RunConsole
from megatron_lora.reporting.metrics_file import MetricsFile, read_metrics
from megatron_lora.reporting.plots import draw_curve, smooth
from megatron_lora.reporting.text_curve import text_curve
from megatron_lora.reporting.time_left import RECENT_STEPS, TimeLeft
from megatron_lora.reporting.trackers import build_trackers

STEP = {"loss": 0.1 + 0.2, "grad_norm": 1 / 3, "lr": 1e-4, "num_target_tokens": 96, "step_time_seconds": 0.25}


def logger_section(log_dir: Path, wandb: bool = False, tensorboard: bool = False) -> LoggerConfig:
    return LoggerConfig.model_validate(
        {
            "log_dir": str(log_dir),
            "wandb_enabled": wandb,
            "wandb": {"project": "unit", "name": "a-run"},
            "tensorboard_enabled": tensorboard,
            "tensorboard": {"log_dir": "tb"},
        }
    )


def plain_console() -> tuple[Console, io.StringIO]:
    output = io.StringIO()
    return Console(file=output, width=120, force_terminal=False, highlight=False), output


def png_size(path: Path) -> tuple[int, int]:
    header = path.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", header[16:24])
    return width, height


def test_the_end_of_a_run_shows_its_curve(tmp_path: Path):
    console, output = plain_console()
    with RunReporter(tmp_path, 200, console=console) as reporter:
        reporter.start()
        for step in range(1, 201):
            reporter.log("train", step, {"loss": 8.0 - step / 40})
    lines = output.getvalue().splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("loss, steps 1 to 200: 7.975 to 3"))
    drawn = lines[first + 1 : first + 7]
    assert [line.partition("▏")[0].strip() for line in drawn] == ["7.975", "", "", "", "", "3"]
    assert max(map(len, drawn)) == 79
    # A falling loss: every row of blocks is shorter than the one below, and starts at the left.
    widths = [len(line.partition("▏")[2]) for line in drawn]
    assert (
        widths == sorted(widths) and widths[0] > 3 and not any(line.partition("▏")[2].startswith(" ") for line in drawn)
    )


@pytest.mark.parametrize("values", [[], [1.0, 2.0], [float("nan")] * 5])
def test_no_curve_of_too_little(values: list[float]):
    records = [{"kind": "train", "step": step, "loss": value} for step, value in enumerate(values)]
    assert text_curve(records, "loss", 100) == []


def test_a_flat_curve_is_a_line_and_fits_its_terminal():
    records = [{"kind": "train", "step": step, "loss": 2.0} for step in range(300)]
    lines = text_curve(records, "loss", 40)
    assert len(lines) == 7 and set(lines[-1].partition("▏")[2]) == {"▁"} and max(map(len, lines)) <= 40


def test_records_keep_every_digit_and_take_tensors(tmp_path: Path):
    with RunReporter(tmp_path, 2, console=plain_console()[0]) as reporter:
        reporter.start()
        reporter.log("train", 1, {**STEP, "kl": torch.tensor(1 / 3, dtype=torch.float64), "count": np.int64(7)})
        reporter.log("validation", 1, {"loss": float("nan")})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    first, second = (json.loads(line) for line in lines)
    assert first["kind"] == "train" and first["step"] == 1
    assert first["loss"] == 0.1 + 0.2 and first["grad_norm"] == 1 / 3 and first["kl"] == 1 / 3 and first["count"] == 7
    assert second == {"kind": "validation", "step": 1, "loss": None}  # strict JSON has no NaN


def test_resuming_drops_later_steps_and_a_torn_line(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    with RunReporter(tmp_path, 9, console=plain_console()[0]) as reporter:
        reporter.start()
        for step in range(1, 6):
            reporter.log("train", step, {"loss": float(step)})
        reporter.log("validation", 3, {"loss": 3.5})
    with path.open("a") as file:
        file.write('{"kind": "train", "step": 3, "lo')
    with RunReporter(tmp_path, 9, resume_step=3, console=plain_console()[0]) as reporter:
        reporter.start()
        reporter.log("train", 4, {"loss": 40.0})
    records = read_metrics(path)
    assert [(r["kind"], r["step"], r["loss"]) for r in records] == [
        ("train", 1, 1.0), ("train", 2, 2.0), ("train", 3, 3.0), ("validation", 3, 3.5), ("train", 4, 40.0),
    ]  # fmt: skip
    assert sorted(p.name for p in tmp_path.iterdir()) == ["loss.png", "metrics.jsonl"]


def test_a_killed_run_leaves_whole_lines(tmp_path: Path):
    """Every record is on disk the moment `log` returns: a process killed right after has lost none."""
    code = (
        "import os, signal, sys; from pathlib import Path\n"
        "from megatron_lora.reporting.metrics_file import MetricsFile\n"
        "file = MetricsFile(Path(sys.argv[1]))\n"
        "for step in range(1, 101): file.append('train', step, {'loss': 1 / step})\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    path = tmp_path / "metrics.jsonl"
    finished = subprocess.run([sys.executable, "-c", code, str(path)], timeout=120)
    assert finished.returncode == -9
    assert [record["step"] for record in read_metrics(path)] == list(range(1, 101))


def test_a_broken_file_is_named_by_line(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "train", "step": 1}\nrubbish\n{"kind": "train", "step": 2}\n')
    with pytest.raises(UserError, match="line 2"):
        MetricsFile(path, resume_step=2)
    assert "rubbish" in path.read_text()


def test_a_folder_that_is_a_file_is_a_users_mistake(tmp_path: Path):
    (tmp_path / "run").write_text("")
    with pytest.raises(UserError, match="checkpointing.checkpoint_dir"):
        RunReporter(tmp_path / "run", 1, console=plain_console()[0]).start()


def test_other_ranks_write_and_show_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run_dir = tmp_path / "run"
    section = logger_section(tmp_path / "logs", wandb=True, tensorboard=True)
    with RunReporter(run_dir, 1, logger=section, enabled=False) as reporter:
        reporter.start()
        reporter.log("train", 1, STEP)
        reporter.table("t", ["a"], [[1]])
        reporter.message("hello")
        with reporter.progress("rollout", 2) as advance:
            advance(1)
    assert list(tmp_path.iterdir()) == [] and capsys.readouterr().out == ""


def test_tensorboard_holds_the_scalars(tmp_path: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    section = logger_section(tmp_path / "logs", tensorboard=True)
    with RunReporter(tmp_path / "run", 2, logger=section, console=plain_console()[0]) as reporter:
        reporter.start()
        reporter.log("train", 1, {"loss": 0.75, "note": "text is no scalar"})
        reporter.log("train", 2, {"loss": 0.5})
        reporter.log("validation", 2, {"loss": 0.625})
    events = EventAccumulator(str(tmp_path / "logs" / "tb")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(1, 0.75), (2, 0.5)]
    assert [(e.step, e.value) for e in events.Scalars("validation/loss")] == [(2, 0.625)]
    assert set(events.Tags()["scalars"]) == {"train/loss", "validation/loss"}


@pytest.mark.slow
def test_wandb_offline_writes_one_run_over_a_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    section = logger_section(tmp_path / "logs", wandb=True)
    ids = []
    for resume_step in (0, 1):
        with RunReporter(
            tmp_path / "run", 2, logger=section, config={"a": 1}, resume_step=resume_step, console=plain_console()[0]
        ) as reporter:
            reporter.start()
            reporter.log("train", resume_step + 1, STEP)
        ids.append((tmp_path / "run" / "wandb_run_id.txt").read_text())
    written = list((tmp_path / "logs" / "wandb").glob("offline-run-*/run-*.wandb"))
    assert ids[0] == ids[1]
    assert written and all(path.name == f"run-{ids[0].strip()}.wandb" for path in written)
    assert all(path.stat().st_size > 0 for path in written)


def two_starts(tmp_path: Path, section: LoggerConfig, name_file: str) -> list[str]:
    """A run of two steps that was stopped after the first; returns what `name_file` held after each start."""
    names = []
    for resume_step in (0, 1):
        with RunReporter(
            tmp_path / "run",
            2,
            logger=section,
            config={"a": {"b": 1}},
            resume_step=resume_step,
            console=plain_console()[0],
        ) as reporter:
            reporter.start()
            reporter.log("train", resume_step + 1, STEP)
        names.append((tmp_path / "run" / name_file).read_text().strip())
    return names


@pytest.mark.slow
def test_trackio_holds_one_run_over_a_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when the package is imported, which is here
    section = LoggerConfig.model_validate({"trackio_enabled": True, "trackio": {"project": "unit", "name": "a-run"}})
    assert two_starts(tmp_path, section, "trackio_run_name.txt") == ["a-run", "a-run"]
    from trackio.sqlite_storage import SQLiteStorage

    assert SQLiteStorage.get_runs("unit") == ["a-run"]
    logs = SQLiteStorage.get_logs("unit", "a-run")
    assert [(row["step"], row["train/loss"]) for row in logs] == [(1, STEP["loss"]), (2, STEP["loss"])]


@pytest.mark.slow
def test_trackio_is_asked_for_the_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """No Space is reached from here."""
    asked: list[dict[str, Any]] = []

    def init(**options: Any) -> None:
        asked.append(options)
        raise ValueError("no network")

    monkeypatch.setattr("trackio.init", init)
    options = {"project": "unit", "name": "a-run", "space_id": "me/runs"}
    section = LoggerConfig.model_validate({"trackio_enabled": True, "trackio": options})
    with pytest.raises(UserError, match="Trackio did not start .no network.; mend logger.trackio"):
        build_trackers(section, tmp_path, {})
    assert {name: asked[0][name] for name in options} == options


@pytest.mark.slow
def test_swanlab_offline_writes_one_run_over_a_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SWANLAB_MODE", "offline")
    section = LoggerConfig.model_validate({"log_dir": str(tmp_path / "logs"), "swanlab_enabled": True})
    first, second = two_starts(tmp_path, section, "swanlab_run_id.txt")
    written = sorted((tmp_path / "logs/swanlab").glob("run-*/run-*.swanlab"))
    assert first == second and [path.stem for path in written] == [f"run-{first}"] * 2
    assert all(b"train/loss" in path.read_bytes() for path in written)


@pytest.mark.slow
@pytest.mark.parametrize("store", ["files", pytest.param("mlflow.db", marks=pytest.mark.long)])
def test_mlflow_holds_one_run_over_a_resume(store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The database is the default, and takes long to be laid out."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    files = (tmp_path / "files").as_uri()
    options = {"experiment_name": "unit", "run_name": "a-run", "tracking_uri": files if store == "files" else None}
    section = LoggerConfig.model_validate(
        {"log_dir": str(tmp_path / "logs"), "mlflow_enabled": True, "mlflow": options}
    )
    first, second = two_starts(tmp_path, section, "mlflow_run_id.txt")
    from mlflow import MlflowClient

    client = MlflowClient(options["tracking_uri"] or f"sqlite:///{tmp_path}/logs/{store}", registry_uri="")
    experiment = client.get_experiment_by_name("unit")
    assert experiment is not None and first == second
    [run] = client.search_runs([experiment.experiment_id])
    assert (run.info.run_id, run.info.run_name, run.info.status) == (first, "a-run", "FINISHED")
    assert run.data.params == {"a.b": "1"}
    history = client.get_metric_history(first, "train/loss")
    assert [(metric.step, metric.value) for metric in history] == [(1, STEP["loss"]), (2, STEP["loss"])]


@pytest.mark.slow
def test_an_mlflow_server_that_does_not_answer_is_told_at_once(tmp_path: Path):
    options = {"tracking_uri": "http://localhost:9"}  # the discard service's port
    section = LoggerConfig.model_validate({"mlflow_enabled": True, "mlflow": options})
    started = time.monotonic()
    with pytest.raises(
        UserError, match="MLflow did not start at http://localhost:9 .* mend logger.mlflow.tracking_uri"
    ):
        build_trackers(section, tmp_path, {})
    assert time.monotonic() - started < 30


@pytest.mark.parametrize("name", ["trackio", "swanlab", "mlflow"])
def test_a_tracker_whose_package_is_missing_is_told_with_the_line_that_installs_it(
    name: str, monkeypatch: pytest.MonkeyPatch
):
    section = LoggerConfig.model_validate({f"{name}_enabled": True})
    check_trackers(section)
    monkeypatch.setattr("importlib.util.find_spec", lambda package: None)
    with pytest.raises(UserError, match=f"logger.{name}_enabled=true .* `make install EXTRAS=trackers`"):
        check_trackers(section)
    check_trackers(LoggerConfig())


def test_without_a_terminal_lines_are_few_and_whole(tmp_path: Path):
    console, output = plain_console()
    with RunReporter(tmp_path, 500, title="SFT", console=console) as reporter:
        reporter.start()
        reporter.table("Modules", ["name", "rank"], [["[bold]linear_qkv", 16]], "trainable 1,024")
        for step in range(1, 501):
            reporter.log("train", step, {**STEP, "tokens_per_second": 12345.6})
        reporter.log("validation", 500, {"loss": 0.125})
    lines = output.getvalue().splitlines()
    steps = [line for line in lines if line.startswith("SFT ")]
    assert steps[0].startswith("SFT   1/500  loss 0.3000  grad norm 0.333  lr 1.00e-04  12,346 tok/s")
    assert steps[-1].startswith("SFT 500/500") and "ETA 0:00:00" in steps[-1]
    assert 2 <= len(steps) < 100  # 500 steps in a moment do not make 500 lines
    assert "validation at step 500  loss 0.1250" in lines
    assert any("[bold]linear_qkv" in line and "16" in line for line in lines)  # taken literally, not as markup
    assert "\x1b" not in output.getvalue()


def test_the_time_left_is_that_of_recent_steps_and_of_validations_to_come(tmp_path: Path):
    """The first step starts engines up; a validation at the start is no part of a step."""
    console, output = plain_console()
    with RunReporter(tmp_path, 100, title="SFT", val_period=40, val_at_end=True, console=console) as reporter:
        reporter.start()
        reporter.log("validation", 0, {"loss": 1.0, "step_time_seconds": 30.0})
        for step, seconds in [(1, 300.0), (2, 2.0), *((step, 4.0) for step in range(3, 101))]:
            reporter.log("train", step, {**STEP, "step_time_seconds": seconds})
    lines = [line for line in output.getvalue().splitlines() if line.startswith("SFT ")]
    assert lines[0].endswith("ETA -:--:--")
    assert lines[-1].endswith("ETA 0:00:30")
    left = TimeLeft(100, val_period=40)
    for seconds in (300.0, 2.0, 4.0):
        left.step_took(seconds)
    left.validation_took(30.0)
    assert left.after(3) == 97 * 3.0 + 2 * 30
    # The first step does not count; validations are due after steps 40 and 80.
    assert left.after(40) == 60 * 3.0 + 2 * 30  # the one that is due now is still to come
    assert left.after(41) == 59 * 3.0 + 30
    for _ in range(RECENT_STEPS):
        left.step_took(1.0)
    assert left.describe(99) == "0:00:01"
    assert TimeLeft(5).describe(0) == "-:--:--"


def test_in_a_terminal_the_bar_shows_loss_speed_and_time(tmp_path: Path):
    output = io.StringIO()
    console = Console(file=output, width=110, force_terminal=True, highlight=False, color_system=None)
    with RunReporter(tmp_path, 4, title="SFT", console=console) as reporter:
        reporter.start()
        for step in range(1, 5):
            reporter.log("train", step, {**STEP, "tokens_per_second": 12345.6})
        with reporter.progress("rollout", 3) as advance:
            advance(3)
    bar = output.getvalue().replace("\r", "\n").splitlines()
    finished = [line for line in bar if "4/4" in line][-1]
    assert "SFT" in finished and "loss 0.3000" in finished and "12,346 tok/s" in finished


def test_pictures_are_drawn_also_when_the_run_fails(tmp_path: Path):
    with pytest.raises(RuntimeError, match="engine died"), RunReporter(tmp_path, 40, console=plain_console()[0]) as run:
        run.start()
        for step in range(1, 31):
            run.log("train", step, {"loss": 2.0 / step, "reward": step / 30})
        raise RuntimeError("engine died")
    assert png_size(tmp_path / "loss.png") == png_size(tmp_path / "reward.png")
    assert min(png_size(tmp_path / "loss.png")) > 500
    assert not list(tmp_path.glob("*.tmp"))


def test_no_picture_without_a_curve(tmp_path: Path):
    assert not draw_curve([{"kind": "train", "step": 1, "loss": None}], "loss", tmp_path / "loss.png", "loss")
    assert os.listdir(tmp_path) == []


def test_smoothing_keeps_a_constant_and_a_slope():
    assert smooth([3.0] * 40, width=4.0) == pytest.approx([3.0] * 40)
    slope = [float(i) for i in range(60)]
    assert smooth(slope, width=3.0)[20:40] == pytest.approx(slope[20:40])  # symmetric: no lag


def test_a_narrow_bar_keeps_its_label_its_counts_and_where_a_step_went() -> None:
    """A GRPO step at 100 columns, as a terminal shows it; phases that took no time are left out."""
    console = Console(width=100, force_terminal=True, record=True, file=io.StringIO())
    shown = RunConsole("grpo", 200, console=console)
    phases = {"generation_seconds": 3.5, "reward_seconds": 80.2, "scoring_seconds": 0.01, "training_seconds": 6.25}
    shown.train_step(4, {"loss": -0.0006, "reward": 0.0078, "tokens_per_second": 5799.0, **phases})
    shown.close()
    recorded = next(line for line in reversed(console.export_text().splitlines()) if "4/200" in line)
    label, line = recorded.rpartition("grpo ")[1:]  # without a screen the bars of all repaints stand side by side
    assert label and "  4/200 " in line and len(label + line) <= 100
    assert "reward 0.008  generation 3.5 s  rewards 80.2 s  training 6.2 s" in line and "scoring" not in line
    assert "tok/s" not in line
