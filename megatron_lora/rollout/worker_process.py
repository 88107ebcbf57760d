"""A worker for the user's code (rewards, environments): reads calls from standard input, writes their results to
standard output.

Started by `worker_pool.py` as a script in a fresh interpreter (never a fork: the parent has threads, process groups and
maybe a GPU). Frames in: 4 bytes of length, then a pickle. Out: JSON, a line a reply.
"""

import faulthandler
import importlib
import json
import os
import pickle
import signal
import sys
from typing import BinaryIO

LATE_EXIT_SECONDS = 5.0


def write_frame(stream: BinaryIO, payload: bytes) -> None:
    stream.write(len(payload).to_bytes(4, "big") + payload)
    stream.flush()


def read_frame(stream: BinaryIO) -> bytes | None:
    """The next frame, or None at the end of the stream."""
    header = stream.read(4)
    if len(header) < 4:
        return None
    size = int.from_bytes(header, "big")
    payload = stream.read(size)
    return payload if len(payload) == size else None


def main() -> None:
    """Build what the first frame names, say so, then answer one call a frame until the input ends.

    First frame: (search path, import path of a factory, its pickled argument); the factory gives a function of one
    payload. Later ones: (payload, seconds that it may take)."""
    # What the user's code prints goes to standard error, what it reads is empty, and a signal meant for the trainer
    # does not end it; with a handler rather than SIG_IGN, which programs that it starts would inherit.
    requests, replies = os.fdopen(os.dup(0), "rb"), os.dup(1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)

    def reply(message: dict) -> None:
        line = json.dumps(message).encode() + b"\n"
        while line:
            line = line[os.write(replies, line) :]

    start = read_frame(requests)
    if start is None:
        return
    search_path, factory, argument = pickle.loads(start)
    sys.path[:] = search_path
    try:
        module, _, name = factory.partition(":")
        answer = getattr(importlib.import_module(module), name)(pickle.loads(argument))
    except (Exception, SystemExit) as error:
        reply({"error": f"{type(error).__name__}: {error}"})
        return
    reply({"ready": True})

    with open(os.devnull, "w") as nowhere:
        while (frame := read_frame(requests)) is not None:
            payload, seconds = pickle.loads(frame)
            # The parent kills a hung worker; should the parent be gone, this thread, which needs no GIL, does.
            faulthandler.dump_traceback_later(seconds + LATE_EXIT_SECONDS, exit=True, file=nowhere)
            results = answer(payload)
            faulthandler.cancel_dump_traceback_later()
            try:
                reply({"results": results})
            except BrokenPipeError:
                return


if __name__ == "__main__":
    main()
