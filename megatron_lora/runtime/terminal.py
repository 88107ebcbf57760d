"""The terminal and the log: what people should read goes to the one, whatever libraries print to the other.

While a run lasts, the file descriptors 1 and 2 lead to the log, so that nothing of a library, of C++ or of a helper
process reaches the terminal; `say` and `complain` still do.
"""

import io
import os
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TextIO

from megatron_lora.errors import UserError

LOG_NAME = "log.txt"
NARROWEST = 20  # columns; a pseudo-terminal that nobody sized has 0
LONGEST_LIST = 400  # characters: four lines of a terminal


class RunLog:
    """Where this process's own output goes. It begins in a temporary file: before a run has a folder, nothing is
    written there."""

    def __init__(self, rank: int):
        self.rank = rank
        handle, name = tempfile.mkstemp(prefix=f"megatron-lora-rank-{rank}-", suffix=".log")
        self.path = Path(name)
        self.is_temporary = True
        self._kept = {number: os.dup(number) for number in (1, 2)}
        self.out = os.fdopen(os.dup(1), "w", buffering=1)
        self.err = os.fdopen(os.dup(2), "w", buffering=1)
        self._lead_to(handle)
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(line_buffering=True)  # in order with what does not go through Python
        os.write(1, f"--- rank {rank}, process {os.getpid()}, {time.strftime('%Y-%m-%d %H:%M:%S')}\n".encode())

    def move_to(self, folder: Path) -> None:
        """Go on in `folder`/log.txt, which all ranks share, with what was written so far; stay where the machine
        cannot write there."""
        _flush()
        try:
            handle = os.open(folder / LOG_NAME, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError:
            return
        os.write(handle, self.path.read_bytes())
        self._lead_to(handle)
        self.discard()
        self.path, self.is_temporary = folder / LOG_NAME, False

    def discard(self) -> None:
        """Remove a log that is still a temporary file."""
        if self.is_temporary:
            self.path.unlink(missing_ok=True)

    def _lead_to(self, handle: int) -> None:
        _flush()
        for number in (1, 2):
            os.dup2(handle, number)
        os.close(handle)

    def close(self) -> None:
        """Give the descriptors back."""
        _flush()
        self.out.close()
        self.err.close()
        for number, handle in self._kept.items():
            os.dup2(handle, number)
            os.close(handle)


_log: RunLog | None = None


@contextmanager
def output_in_log(rank: int) -> Iterator[RunLog]:
    """What libraries print goes to a log meanwhile. A temporary one is removed where a user's mistake or a regular end
    leaves the block."""
    global _log
    _log = RunLog(rank)
    try:
        yield _log
    except UserError:
        _log.discard()
        raise
    else:
        _log.discard()
    finally:
        _log.close()
        _log = None


def log() -> RunLog | None:
    """The log that output goes to at the moment, if any."""
    return _log


def terminal_output() -> TextIO:
    """Standard output as the user has it."""
    return _log.out if _log is not None else sys.stdout


def folded(text: str, stream: IO[str]) -> str:
    """A message as it is printed there: a terminal's lines end between words, and go on as far in as they began."""
    try:
        width = os.get_terminal_size(stream.fileno()).columns if stream.isatty() else 0
    except (OSError, ValueError):
        width = 0
    if width < NARROWEST:
        return text
    lines = []
    for line in text.splitlines():
        indent = " " * (len(line) - len(line.lstrip()))
        # Paths, flags and keys stay whole.
        lines.append(
            textwrap.fill(line, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
        )
    return "\n".join(lines)


def say(text: str) -> None:
    """A line on the user's standard output, whatever else is printed there."""
    stream = terminal_output()
    print(folded(text, stream), file=stream, flush=True)


def brief(text: str) -> str:
    """A list as the terminal has room for it; all of a long one goes to the log."""
    if len(text) <= LONGEST_LIST or _log is None:
        return text
    _flush()
    os.write(1, f"{text}\n".encode())
    kept = text[:LONGEST_LIST].rpartition(", ")[0]
    return f"{kept}, ... and {text.count(', ', len(kept))} more, which are in {LOG_NAME}"


def complain(text: str) -> None:
    """Likewise on standard error."""
    stream = _log.err if _log is not None else sys.stderr
    print(folded(text, stream), file=stream, flush=True)


def _flush() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
