"""metrics.jsonl: one JSON object a line, appended as a run goes, cut back when it resumes."""

import errno
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_lora.errors import UserError


def to_plain(value: Any) -> Any:
    """A value that JSON holds: numbers of torch and numpy become Python's; NaN and infinities become None, for which
    JSON has no word. Floats keep every digit."""
    if isinstance(value, bool | str | int | None):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    if hasattr(value, "tolist"):  # a tensor or an array
        return to_plain(value.tolist())
    return str(value)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl, in order; [] where there is none. A last line that a kill cut short is left
    out; any other line that is no JSON object raises UserError with its number."""
    if not path.exists():
        return []
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}); mend or move it") from error
    records = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):  # no newline after it: the write was cut short
                continue
            raise UserError(f"{path}, line {number}: no JSON ({error.msg}); mend or move the file") from error
        if not isinstance(record, dict) or not isinstance(record.get("step", 0), int):
            raise UserError(f"{path}, line {number}: no record of a step; mend or move the file")
        records.append(record)
    return records


class MetricsFile:
    """Appends to `path`. Each record goes out in one write, so that a killed run leaves at most one torn line."""

    def __init__(self, path: Path, resume_step: int = 0):
        """Open for appending after dropping, in one rename, the records of steps after `resume_step` (they will be
        written again) and a torn last line. Raises UserError where the folder cannot be written."""
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._drop_after(resume_step)
            self._descriptor: int | None = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as error:
            raise UserError(
                f"{path} cannot be written ({error}); set checkpointing.checkpoint_dir to a folder that can"
            ) from error

    def _drop_after(self, resume_step: int) -> None:
        if not self.path.exists():
            return
        kept = [record for record in read_metrics(self.path) if record.get("step", 0) <= resume_step]
        temporary = self.path.with_name(self.path.name + ".tmp")
        with temporary.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(record) + "\n" for record in kept)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.path)

    def append(self, kind: str, step: int, metrics: Mapping[str, Any]) -> dict[str, Any]:
        """Write one record, whole or not at all, and return it as it was written. Raises OSError."""
        if self._descriptor is None:
            raise ValueError(f"{self.path} is closed")
        record = {"kind": kind, "step": step, **to_plain(metrics)}
        line = (json.dumps(record, allow_nan=False) + "\n").encode()
        before = os.fstat(self._descriptor).st_size
        written = os.write(self._descriptor, line)
        if written < len(line):
            # The disk took a part of it; the next run is to find whole lines.
            os.ftruncate(self._descriptor, before)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
        return record

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
