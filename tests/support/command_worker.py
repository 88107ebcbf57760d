"""Runs many command lines of the trainer in one process, so that its imports are paid for once.

    python -m tests.support.command_worker COMMANDS.json ANSWERS.json

COMMANDS.json: {name: [argument, ...]}. ANSWERS.json: {name: {"status", "stdout", "stderr"}}. Output is caught at the
file descriptors, so nothing that a library writes is missed.
"""

import json
import os
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from megatron_lora.train import _leave, main


def answer(arguments: list[str]) -> dict[str, object]:
    """One command, as if it were alone."""
    with tempfile.TemporaryFile("w+") as stdout, tempfile.TemporaryFile("w+") as stderr:
        with _redirected(1, stdout), _redirected(2, stderr):
            try:
                status: object = main(arguments)
            except Exception:
                traceback.print_exc()
                status = 1
        return {"status": status, "stdout": _text(stdout), "stderr": _text(stderr)}


@contextmanager
def _redirected(descriptor: int, file: IO[str]) -> Iterator[None]:
    kept = os.dup(descriptor)
    _flush()
    os.dup2(file.fileno(), descriptor)
    try:
        yield
    finally:
        _flush()
        os.dup2(kept, descriptor)
        os.close(kept)


def _flush() -> None:
    sys.stdout.flush()
    sys.stderr.flush()


def _text(file: IO[str]) -> str:
    file.seek(0)
    return file.read()


if __name__ == "__main__":
    commands = json.loads(Path(sys.argv[1]).read_text())
    answers = {}
    for name, arguments in commands.items():
        answers[name] = answer(arguments)
        print(name, answers[name]["status"], flush=True)
    Path(sys.argv[2]).write_text(json.dumps(answers))
    _leave(0)
