"""The run's folder: what counts as a complete checkpoint, which ones are kept, what a kill leaves behind."""

import json
import os
from pathlib import Path

import pytest

from megatron_lora.checksums import compute_checksums
from megatron_lora.errors import UserError
from megatron_lora.trainers.resume import find_checkpoint
from megatron_lora.trainers.run_folder import Keeping, RunFolder, Step


def write_step(folder: RunFolder, number: int, metric: float | None = None, keep: int | None = None, **options: bool):
    partial = folder.partial(number)
    (partial / "policy" / "weights").mkdir(parents=True)
    (partial / "policy" / "weights" / "shard").write_bytes(b"x" * 100)
    names = folder.seal(number, {"step": number, "metric": metric, "metric_name": "val:loss"})
    keeping = Keeping(keep, "val:loss", options.get("higher_is_better", False))
    folder.finish(number, compute_checksums(partial, names), keeping)


def newest(folder: RunFolder) -> Step | None:
    return find_checkpoint(folder)[0]


def steps(folder: RunFolder) -> list[str]:
    return sorted(path.name for path in folder.path.iterdir() if "step_" in path.name and path.is_dir())


def test_newest_complete_step_is_found_with_its_content(tmp_path: Path):
    folder = RunFolder(tmp_path)
    assert find_checkpoint(folder) == (None, [])
    for number in (2, 10):
        write_step(folder, number)
    found, notices = find_checkpoint(folder)
    assert found is not None and (found.number, notices) == (10, [])
    assert found.info["step"] == 10 and found.weights == tmp_path / "step_10" / "policy" / "weights"
    assert found.optimizer is None
    assert (tmp_path / "latest_step.txt").read_text() == "10\n"


@pytest.mark.parametrize("damage", ["shorter", "missing", "info", "no info"])
def test_damaged_steps_are_skipped_with_their_reason(tmp_path: Path, damage: str):
    folder = RunFolder(tmp_path)
    write_step(folder, 1)
    write_step(folder, 2)
    shard, info = tmp_path / "step_2" / "policy" / "weights" / "shard", tmp_path / "step_2" / "training_info.json"
    if damage == "shorter":
        os.truncate(shard, 40)
    elif damage == "missing":
        shard.unlink()
    elif damage == "info":
        os.truncate(info, 10)
    else:
        info.unlink()
    found, notices = find_checkpoint(folder)
    assert found is not None and found.number == 1
    wanted = {"shorter": "shard has 40 bytes of 100", "missing": "shard is missing"}
    assert len(notices) == 1 and "step_2 is not complete" in notices[0] and "skipped" in notices[0]
    assert wanted.get(damage, "training_info.json") in notices[0]
    write_step(folder, 2)  # the resumed run writes it anew, over the damaged one
    assert find_checkpoint(folder)[1] == []


def test_half_written_steps_are_removed_at_the_next_start(tmp_path: Path):
    folder = RunFolder(tmp_path / "run")
    folder.make()
    write_step(folder, 4)
    (folder.partial(8) / "policy").mkdir(parents=True)
    (folder.path / ".step_9.partial").symlink_to(folder.path)
    assert newest(folder).number == 4  # type: ignore[union-attr]
    folder.clean()
    assert steps(folder) == ["step_4"]


@pytest.mark.parametrize(
    ("higher_is_better", "kept"),
    [(False, ["step_1", "step_3", "step_4", "step_6"]), (True, ["step_2", "step_5", "step_6"])],
)
def test_the_best_and_the_newest_are_kept(tmp_path: Path, higher_is_better: bool, kept: list[str]):
    folder = RunFolder(tmp_path)
    for number, metric in enumerate([0.1, 0.9, 0.5, 0.2, 0.8, 0.6], start=1):
        write_step(folder, number, metric, keep=3, higher_is_better=higher_is_better)
    assert steps(folder) == kept


def test_the_only_one_kept_is_the_best_beside_the_newest(tmp_path: Path):
    folder = RunFolder(tmp_path)
    for number, metric in enumerate([0.3, 0.1, 0.2, 0.4], start=1):
        write_step(folder, number, metric, keep=1)
    assert steps(folder) == ["step_2", "step_4"]


def test_what_was_not_measured_comes_after_what_was(tmp_path: Path):
    """Step 2 is bad but measured; a metric that is not finite, or another one, is none."""
    folder = RunFolder(tmp_path)
    for number, metric in enumerate([None, 9.0, float("nan"), None], start=1):
        write_step(folder, number, metric, keep=1)
    assert steps(folder) == ["step_2", "step_4"]
    folder.finish(5, _seal_with_other_metric(folder, 5), Keeping(1, "val:loss", False))
    assert steps(folder) == ["step_2", "step_5"]


def _seal_with_other_metric(folder: RunFolder, number: int) -> dict[str, str]:
    partial = folder.partial(number)
    (partial / "policy" / "weights").mkdir(parents=True)
    return compute_checksums(partial, folder.seal(number, {"step": number, "metric": 0.0, "metric_name": "val:reward"}))


def test_without_a_metric_the_latest_are_kept(tmp_path: Path):
    folder = RunFolder(tmp_path)
    for number in range(1, 12):
        write_step(folder, number, keep=2)
    assert steps(folder) == ["step_10", "step_11"]
    everything = RunFolder(tmp_path / "all")
    for number in range(1, 5):
        write_step(everything, number)
    assert len(steps(everything)) == 4


def test_a_broken_step_is_never_counted_among_those_to_keep(tmp_path: Path):
    folder = RunFolder(tmp_path)
    for number in (1, 2, 3):
        write_step(folder, number)
    os.truncate(tmp_path / "step_3" / "policy" / "weights" / "shard", 1)
    write_step(folder, 4, keep=2)
    assert steps(folder) == ["step_2", "step_3", "step_4"]


def test_a_run_is_not_overwritten_without_resume(tmp_path: Path):
    folder = RunFolder(tmp_path / "run")
    folder.check(resume=False)
    assert not folder.path.exists()
    folder.make()
    folder.check(resume=False)
    write_step(folder, 1)
    folder.check(resume=True)
    with pytest.raises(UserError, match="holds a run and checkpointing.resume=false"):
        folder.check(resume=False)


def test_a_folder_that_cannot_be_made_is_refused_by_name(tmp_path: Path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "run" / "deep", Path("/proc/run")):
        with pytest.raises(UserError, match=r"checkpointing\.checkpoint_dir=.* cannot be written \("):
            RunFolder(path).check(resume=True)


def test_info_lists_every_file_with_its_size(tmp_path: Path):
    folder = RunFolder(tmp_path)
    write_step(folder, 3)
    info = json.loads((tmp_path / "step_3" / "training_info.json").read_text())
    assert info["files"] == {"policy/weights/shard": 100}
