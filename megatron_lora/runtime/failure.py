"""How a rank says why it ends: once for people, and in the file that its launcher reads."""

import json
import os
import time
import traceback

from megatron_lora.runtime.terminal import complain

LAUNCHER = "MEGATRON_LORA_LAUNCHER"
"""Set by `megatron-lora train`, which shows the message itself, last and once."""
ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
"""torchrun's name for it; its report ends with what stands there."""


def tell(message: str) -> None:
    """Say why this rank ends. The launcher's file is written too, so that torchrun's report ends with the message."""
    report = {"message": message, "extraInfo": {"py_callstack": message, "timestamp": str(int(time.time()))}}
    path = os.environ.get(ERROR_FILE)
    if path:
        with open(path, "w") as file:
            json.dump({"message": report}, file)
    if LAUNCHER not in os.environ:
        complain(message)


def read_report(path: str) -> str | None:
    """The message that a rank left in its launcher's file, None where it left none."""
    try:
        with open(path) as file:
            return json.load(file)["message"]["message"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def describe(error: BaseException) -> str:
    """An unexpected error in one line: its type and first line."""
    first = next((line for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def place_of(error: BaseException) -> str:
    """Where it was raised, `file.py:line`, the innermost place in this project where there is one."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "megatron_lora" in frame.filename] or frames
    return f"{os.path.basename(own[-1].filename)}:{own[-1].lineno}" if own else "?"
