"""One run at a time in a folder: a lock that ends with its process, however that ends."""

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
from pathlib import Path

from megatron_lora.errors import UserError

LOCK = ".run_lock"
# File systems without locks: two runs are then not told apart.
UNSUPPORTED = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)


class RunLock:
    """Held by the one rank that writes the folder, to the end of its `with` block. A POSIX lock: it does not pass to
    forked helpers, and it works over NFS."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._descriptor: int | None = None

    def check(self) -> None:
        """Raise UserError where another process holds the lock. Writes nothing."""
        try:
            descriptor = os.open(self.folder / LOCK, os.O_RDWR)
        except OSError:
            return
        try:
            if not self._try(descriptor):
                raise self._refusal()
        finally:
            os.close(descriptor)

    def take(self) -> None:
        """Lock the folder, which exists. Raises UserError where another process holds it, OSError where its file cannot
        be written."""
        while True:
            descriptor = os.open(self.folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
            if not self._try(descriptor):
                os.close(descriptor)
                raise self._refusal()
            # The run before may have removed the file in between: then this lock is of a file without a name.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), os.stat(self.folder / LOCK)):
                    break
            os.close(descriptor)
        holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        os.ftruncate(descriptor, 0)
        os.write(descriptor, (json.dumps(holder) + "\n").encode())
        self._descriptor = descriptor

    def release(self) -> None:
        """Remove the file and the lock. Doing it twice is harmless."""
        if self._descriptor is not None:
            with contextlib.suppress(OSError):
                os.unlink(self.folder / LOCK)
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> "RunLock":
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()

    def _try(self, descriptor: int) -> bool:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            return error.errno in UNSUPPORTED
        return True

    def _refusal(self) -> UserError:
        try:
            holder = json.loads((self.folder / LOCK).read_text())
            who = f"process {holder['pid']} on {holder['host']}, since {holder['since']}"
        except (OSError, ValueError, KeyError, TypeError):
            who = "another process"
        return UserError(
            f"checkpointing.checkpoint_dir={str(self.folder)!r} is in use by another run ({who}); wait for its end, "
            "stop it, or name another folder"
        )
