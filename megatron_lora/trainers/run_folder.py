"""The run's folder: `step_N/` written whole or not at all, the newest complete one found again, old ones removed."""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from megatron_lora.errors import UserError

INFO = "training_info.json"
LATEST = "latest_step.txt"


@dataclass(frozen=True)
class Step:
    """A complete checkpoint. info: training_info.json's content."""

    number: int
    path: Path
    info: Mapping[str, Any]

    @property
    def weights(self) -> Path:
        return self.path / "policy" / "weights"

    @property
    def optimizer(self) -> Path | None:
        folder = self.path / "policy" / "optimizer"
        return folder if folder.is_dir() else None


class RunFolder:
    """`checkpointing.checkpoint_dir`. Only one rank changes it."""

    def __init__(self, path: Path):
        self.path = path

    def check(self, resume: bool) -> None:
        """Raise UserError where the folder cannot be written, or holds a run that is not to be resumed. Leaves
        nothing behind."""
        existing = next(path for path in [self.path, *self.path.absolute().parents] if os.path.exists(path))
        try:
            # A file without a name: access rights alone do not tell of a read-only or virtual file system.
            tempfile.TemporaryFile(dir=existing).close()
        except OSError as error:
            reason = "it is no folder" if not existing.is_dir() else "this process may not write there"
            self._cannot_write(f"{existing}: {reason}", error)
        if not resume and (list(self._numbers()) or (self.path / "metrics.jsonl").exists()):
            raise UserError(
                f"checkpointing.checkpoint_dir={str(self.path)!r} holds a run and checkpointing.resume=false; name "
                "another folder, or set checkpointing.resume=true to go on"
            )

    def prepare(self) -> None:
        """Make the folder, and remove what a killed run left half written. Raises UserError."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            self._cannot_write(error.strerror or str(error), error)
        for folder in self.path.glob(".step_*.partial"):
            shutil.rmtree(folder, ignore_errors=True)

    def _cannot_write(self, reason: str, error: OSError) -> NoReturn:
        raise UserError(
            f"checkpointing.checkpoint_dir={str(self.path)!r} cannot be written ({reason}); name a folder that can"
        ) from error

    def latest(self) -> tuple[Step | None, list[str]]:
        """The newest complete checkpoint, and a notice for each one that had to be skipped."""
        notices = []
        for number in sorted(self._numbers(), reverse=True):
            path = self.path / f"step_{number}"
            problem, info = _check_step(path)
            if info is not None and problem is None:
                return Step(number, path, info), notices
            notices.append(f"{path} is not complete ({problem}); skipped")
        return None, notices

    def partial(self, number: int) -> Path:
        """Where step `number` is written before it is complete."""
        return self.path / f".step_{number}.partial"

    def finish(self, number: int, info: Mapping[str, Any], keep: int | None, higher_is_better: bool) -> None:
        """Everything of the partial folder is written: record its files, rename it, remove what is not kept."""
        partial, final = self.partial(number), self.path / f"step_{number}"
        files = {str(path.relative_to(partial)): path.stat().st_size for path in partial.rglob("*") if path.is_file()}
        (partial / INFO).write_text(json.dumps({**info, "files": files}, indent=2) + "\n")
        _sync(partial)
        if final.exists():
            # Only an incomplete one can be there: a complete one would have been resumed from.
            shutil.rmtree(final)
        partial.rename(final)
        latest = self.path / f".{LATEST}.partial"
        latest.write_text(f"{number}\n")
        latest.replace(self.path / LATEST)
        self._remove_old(number, keep, higher_is_better)

    def _remove_old(self, newest: int, keep: int | None, higher_is_better: bool) -> None:
        if keep is None:
            return
        ranked = []
        for number in self._numbers():
            problem, info = _check_step(self.path / f"step_{number}")
            if problem is None and info is not None and number != newest:
                ranked.append((_goodness(info.get("metric"), higher_is_better), number))
        ranked.sort(reverse=True)
        for _, number in ranked[max(0, keep - 1) :]:
            # Renamed first, so that a kill in between leaves no half checkpoint under a good name.
            doomed = self.path / f".step_{number}.partial"
            (self.path / f"step_{number}").rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)

    def _numbers(self) -> Iterator[int]:
        if self.path.is_dir():
            for entry in self.path.iterdir():
                match = re.fullmatch(r"step_(\d+)", entry.name)
                if match and entry.is_dir():
                    yield int(match[1])


def _goodness(metric: float | None, higher_is_better: bool) -> float:
    """Larger is better; a checkpoint without the metric is worst, so that only its step decides."""
    if metric is None:
        return float("-inf")
    return metric if higher_is_better else -metric


def _check_step(path: Path) -> tuple[str | None, dict[str, Any] | None]:
    """(what is wrong or None, training_info.json's content)."""
    try:
        info = json.loads((path / INFO).read_text())
    except (OSError, ValueError):
        return f"no readable {INFO}", None
    for name, size in info.get("files", {}).items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing", info
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes of {size}", info
    return None, info


def _sync(folder: Path) -> None:
    """Bring what was written to the disk before the rename makes it official."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
