"""Processes that leave nothing behind: they end with whoever started them, however that one ends."""

import contextlib
import ctypes
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from typing import IO, Any

import psutil

_PR_SET_PDEATHSIG = 1


def die_with_parent(how: signal.Signals = signal.SIGKILL) -> None:
    """Ask Linux to send this process a signal when its parent is gone."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(how))


def start(
    command: Sequence[str],
    environment: Mapping[str, str],
    log: IO[bytes] | None = None,
    how: signal.Signals = signal.SIGKILL,
    **options: Any,
) -> subprocess.Popen:
    """Start it so that it gets the signal `how` when this process is gone, killed or not. torchrun ends its ranks on a
    SIGTERM; ranks that must not outlive a killed launcher call `die_with_parent` themselves."""
    output: dict[str, Any] = {} if log is None else {"stdout": log, "stderr": subprocess.STDOUT}
    return subprocess.Popen(
        command, env=dict(environment), preexec_fn=partial(die_with_parent, how), **output, **options
    )


def kill_tree(process: subprocess.Popen) -> None:
    """End it and all that it started. torchrun starts each rank in a session of its own, so that a signal to the group
    does not reach them."""
    try:
        started = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        started = []
    process.kill()
    for one in started:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()
    process.wait()
    psutil.wait_procs(started, timeout=10)


def end_when_terminated() -> None:
    """Let a SIGTERM, as `timeout` sends it, raise SystemExit, so that what was started is ended on the way out."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
