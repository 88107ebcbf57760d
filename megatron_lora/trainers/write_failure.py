"""A checkpoint or a record that could not be written, as one message: what, why, how much room it needs and there
is."""

import errno
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from megatron_lora.errors import UserError, first_line

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class WriteFailure(UserError):
    """The run's folder could not be written while the run was on."""


def system_error(error: BaseException) -> OSError | None:
    """The error of the system behind an error. Writers of checkpoints wrap it: in a context, a cause, or a table of
    what each rank met."""
    todo: list[Any] = [error]
    seen: set[int] = set()
    while todo:
        found = todo.pop(0)
        if not isinstance(found, BaseException) or id(found) in seen:
            continue
        seen.add(id(found))
        if isinstance(found, OSError) and found.errno is not None:
            return found
        failures = getattr(found, "failures", None) or {}
        todo += [wrapped[0] for wrapped in failures.values()]
        todo += [found.__cause__, found.__context__]
    return None


def why_unwritable(folder: Path) -> str | None:
    """Why a folder, there or still to be made, cannot be written; None where it can. Leaves nothing behind."""
    existing = next(path for path in [folder, *folder.absolute().parents] if os.path.exists(path))
    try:
        # A file without a name: access rights alone do not tell of a read-only or virtual file system.
        tempfile.TemporaryFile(dir=existing).close()
    except OSError:
        return f"{existing}: {'this process may not write there' if existing.is_dir() else 'it is no folder'}"
    return None


def describe_failure(error: BaseException, folder: Path, needed_bytes: int | None = None) -> str:
    """Why a folder could not be written, and where the disk is the reason, how much is needed and free."""
    system = system_error(error)
    free = free_bytes(folder)
    if system is not None and system.errno is not None:
        reason = os.strerror(system.errno)
    elif free is not None and needed_bytes is not None and free < needed_bytes:
        # An error that another process met arrives without the system's error behind it.
        reason = os.strerror(errno.ENOSPC)
    else:
        reason = _reason(error)
    if system is not None and system.errno not in NO_SPACE:
        return reason
    room = [f"{show_bytes(free)} are free there"] if free is not None else []
    if needed_bytes is not None:
        room.insert(0, f"a checkpoint takes about {show_bytes(needed_bytes)}")
    if system is not None and system.errno in (errno.EDQUOT, errno.EFBIG):
        room.append("a limit of this user or process stands below that")
    return f"{reason}: {', '.join(room)}" if room else reason


def free_bytes(folder: Path) -> int | None:
    """Of the file system that a folder is, or would be, on."""
    for existing in (folder, *folder.absolute().parents):
        try:
            return shutil.disk_usage(existing).free
        except OSError:
            continue
    return None


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def show_bytes(number: int) -> str:
    """For people."""
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if number >= factor:
            return f"{number / factor:.1f} {unit}"
    return f"{number} bytes"


def _reason(error: BaseException) -> str:
    """What a rank met, where the error is a table of that."""
    failures = getattr(error, "failures", None) or {}
    return first_line(next((wrapped[0] for wrapped in failures.values()), error))
