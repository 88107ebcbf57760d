"""A folder that appears whole or not at all."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_lora.errors import UserError

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def output_folder(out: Path | str) -> Iterator[Path]:
    """A temporary folder beside `out`, renamed to it when the block ends well and removed when it does not.

    Raises UserError where `out` exists, cannot be written, or the disk is full.
    """
    out = Path(out)
    if out.exists() or out.is_symlink():
        raise UserError(f"{out} exists already; nothing is overwritten: give a new path or remove it first")
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        yield partial
        partial.rename(out)
    except OSError as error:
        if error.errno in NO_SPACE:
            raise UserError(f"no space left for {out}; the partial output was removed") from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR):
            raise UserError(f"{out} cannot be written ({error.strerror}); give a path that can") from error
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
