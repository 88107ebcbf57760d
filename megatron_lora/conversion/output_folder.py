"""A folder that appears whole or not at all."""

import errno
import glob
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from megatron_lora.errors import UserError

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def output_folder(out: Path | str) -> Iterator[Path]:
    """A temporary folder beside `out`, renamed to it when the block ends well and removed when it does not.

    Raises UserError where `out` exists, cannot be written, or the disk is full.
    """
    out = Path(out)
    if os.path.lexists(out):
        raise UserError(f"{out} exists already; nothing is overwritten: give a new path or remove it first")
    _remove_abandoned(out)
    partial = out.with_name(f"{_prefix(out)}{os.getpid()}")
    begun = False
    try:
        partial.mkdir(parents=True)
        begun = True
        yield partial
        partial.rename(out)
    except OSError as error:
        if error.errno in NO_SPACE:
            raise UserError(f"no space left for {out} ({_room(partial)}); the partial output was removed") from error
        if not begun or error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR):
            raise UserError(f"{out} cannot be written ({error.strerror}); give a path that can") from error
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _prefix(out: Path) -> str:
    return f".{out.name}.partial-{socket.gethostname()}-"


def _remove_abandoned(out: Path) -> None:
    """What a killed process of this machine left half written."""
    if not out.parent.is_dir():
        return
    for entry in out.parent.glob(f"{glob.escape(_prefix(out))}*"):
        number = entry.name.removeprefix(_prefix(out))
        if number.isdigit() and not psutil.pid_exists(int(number)):
            shutil.rmtree(entry, ignore_errors=True)


def _room(partial: Path) -> str:
    """What was written until the disk was full, and what is free."""
    written = sum(path.stat().st_size for path in partial.rglob("*") if path.is_file())
    free = shutil.disk_usage(partial if partial.is_dir() else partial.parent).free
    return f"{written / 2**20:.1f} MiB were written, {free / 2**20:.1f} MiB are free"
