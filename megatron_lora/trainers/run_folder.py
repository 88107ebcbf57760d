"""The run's folder: `step_N/` written whole or not at all, the newest complete one found again, old ones removed."""

import json
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_lora.checksums import list_files, write_checksums
from megatron_lora.errors import UserError
from megatron_lora.trainers.write_failure import why_unwritable

INFO = "training_info.json"
LATEST = "latest_step.txt"
METRICS = "metrics.jsonl"
# Beside `policy`: PPO's critic, with weights and optimizer as there.
CRITIC = "critic"


@dataclass(frozen=True)
class Step:
    """A checkpoint as far as names and sizes tell. info: training_info.json's content. problem: why it cannot be used,
    None where nothing is missing."""

    number: int
    path: Path
    info: Mapping[str, Any]
    problem: str | None = None

    @property
    def weights(self) -> Path:
        return self.path / "policy" / "weights"

    @property
    def optimizer(self) -> Path | None:
        folder = self.path / "policy" / "optimizer"
        return folder if folder.is_dir() else None

    @property
    def critic_weights(self) -> Path | None:
        return self._of_critic("weights")

    @property
    def critic_optimizer(self) -> Path | None:
        return self._of_critic("optimizer")

    def _of_critic(self, what: str) -> Path | None:
        folder = self.path / CRITIC / what
        return folder if folder.is_dir() else None


@dataclass(frozen=True)
class Keeping:
    """Which checkpoints stay: the `top` best by the metric (None: all), and the newest. metric_name: None ranks by step
    alone."""

    top: int | None = None
    metric_name: str | None = None
    higher_is_better: bool = False

    def rank(self, step: Step) -> tuple[float, int]:
        """Larger is better. A checkpoint that was not measured, or by another metric, comes after all that were."""
        metric = step.info.get("metric")
        if self.metric_name is None or step.info.get("metric_name") != self.metric_name:
            metric = None
        if not isinstance(metric, int | float) or not math.isfinite(metric):
            return float("-inf"), step.number
        return (metric if self.higher_is_better else -metric), step.number


class RunFolder:
    """`checkpointing.checkpoint_dir`. Only one rank changes it."""

    def __init__(self, path: Path):
        self.path = path

    def check(self, resume: bool) -> None:
        """Raise UserError where the folder cannot be written, or holds a run that is not to be resumed. Leaves
        nothing behind."""
        reason = why_unwritable(self.path)
        if reason is not None:
            raise UserError(
                f"checkpointing.checkpoint_dir={str(self.path)!r} cannot be written ({reason}); name a folder that can"
            )
        blocked = sorted(path.name for path in self._named() if not path.is_dir())
        if blocked:
            raise UserError(
                f"checkpointing.checkpoint_dir={str(self.path)!r} holds {blocked[0]}, which is no folder; "
                "checkpoints have that name: move it, or name another folder"
            )
        if not resume and (list(self._numbers()) or (self.path / METRICS).exists()):
            raise UserError(
                f"checkpointing.checkpoint_dir={str(self.path)!r} holds a run and checkpointing.resume=false; name "
                "another folder, or set checkpointing.resume=true to go on"
            )

    def make(self) -> None:
        """Make the folder. Raises OSError."""
        self.path.mkdir(parents=True, exist_ok=True)

    def clean(self) -> None:
        """Remove what a killed run left half written. Raises OSError."""
        for folder in self.path.glob(".step_*.partial"):
            remove(folder)

    def steps(self) -> list[Step]:
        """Every `step_N` folder, the newest first."""
        return [_look_at(self.path / f"step_{number}", number) for number in sorted(self._numbers(), reverse=True)]

    def latest_written(self) -> int | None:
        """The step that latest_step.txt names; None where there is no such file, or no number in it."""
        try:
            return int((self.path / LATEST).read_text())
        except (OSError, ValueError):
            return None

    def strays(self) -> list[Path]:
        """Checkpoints of this project that lie here under another name than `step_N`."""
        if not self.path.is_dir():
            return []
        own = {f"step_{number}" for number in self._numbers()}
        return sorted(
            entry
            for entry in self.path.iterdir()
            if entry.name not in own and entry.name[:1] != "." and _is_step(entry)
        )

    def partial(self, number: int) -> Path:
        """Where step `number` is written before it is complete."""
        return self.path / f".step_{number}.partial"

    def seal(self, number: int, info: Mapping[str, Any]) -> list[str]:
        """Everything of the partial folder is written: record it; returns the names of its files, the largest first."""
        partial = self.partial(number)
        files = {name: (partial / name).stat().st_size for name in sorted(list_files(partial))}
        (partial / INFO).write_text(json.dumps({**info, "files": files}, indent=2) + "\n")
        return list_files(partial)

    def finish(self, number: int, checksums: Mapping[str, str], keeping: Keeping) -> None:
        """Rename the sealed partial folder, and remove what is not kept. checksums: of all its files."""
        partial, final = self.partial(number), self.path / f"step_{number}"
        write_checksums(partial, checksums)
        _sync(partial)
        if os.path.lexists(final):
            # Only an incomplete one can be there: a complete one would have been resumed from.
            remove(final)
        partial.rename(final)
        latest = self.path / f".{LATEST}.partial"
        latest.write_text(f"{number}\n")
        latest.replace(self.path / LATEST)
        self._remove_old(number, keeping)

    def discard(self, number: int) -> None:
        """Remove what was written of a step that cannot be completed; never raises."""
        shutil.rmtree(self.partial(number), ignore_errors=True)

    def _remove_old(self, newest: int, keeping: Keeping) -> None:
        if keeping.top is None:
            return
        usable = [step for step in self.steps() if step.problem is None]
        ranked = sorted(usable, key=keeping.rank, reverse=True)
        for step in ranked[keeping.top :]:
            if step.number != newest:
                # Renamed first, so that a kill in between leaves no half checkpoint under a good name.
                doomed = self.partial(step.number)
                step.path.rename(doomed)
                remove(doomed, ignore_errors=True)

    def _named(self) -> Iterator[Path]:
        """What has the name of a checkpoint."""
        if self.path.is_dir():
            yield from (entry for entry in self.path.iterdir() if re.fullmatch(r"step_(0|[1-9]\d*)", entry.name))

    def _numbers(self) -> Iterator[int]:
        yield from (int(entry.name.removeprefix("step_")) for entry in self._named() if entry.is_dir())


def remove(path: Path, *, ignore_errors: bool = False) -> None:
    """Remove a folder, a file or a link. Raises OSError."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=ignore_errors)


def _look_at(path: Path, number: int) -> Step:
    """The step with its content, and what is wrong with it as far as names and sizes tell."""
    try:
        info = json.loads((path / INFO).read_text())
    except (OSError, ValueError):
        return Step(number, path, {}, f"no readable {INFO}")
    if not isinstance(info, dict) or not isinstance(info.get("files"), dict) or "step" not in info:
        return Step(number, path, {}, f"its {INFO} is not of this project")
    if info["step"] != number:
        return Step(number, path, info, f"its {INFO} says step {info['step']}: the folder was renamed; rename it back")
    return Step(number, path, info, _find_gap(path, info))


def _find_gap(path: Path, info: Mapping[str, Any]) -> str | None:
    """The first file that is missing or of another size; only what a run reads when it goes on counts."""
    for name, size in info["files"].items():
        file = path / name
        if not is_read_on_resume(name):
            continue
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes of {size}"
    return None


def is_read_on_resume(name: str) -> bool:
    """Whether a run that goes on reads this file of a step folder; the others are for people and exports."""
    return name == INFO or name.startswith(("policy/weights/", "policy/optimizer/", f"{CRITIC}/"))


def _is_step(path: Path) -> bool:
    return (path / INFO).is_file() and (path / "policy" / "weights").is_dir()


def _sync(folder: Path) -> None:
    """Bring what was written to the disk before the rename makes it official."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
