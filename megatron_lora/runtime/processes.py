"""Helper processes: they last exactly as long as the rank that started them, however that ends."""

import ctypes
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker

PR_SET_PDEATHSIG = 1  # prctl(2)


def die_with_parent() -> None:
    """Ask Linux to kill this process when its parent is gone: a killed rank cannot end its helpers itself."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


@contextmanager
def helpers_survive_signals() -> Iterator[None]:
    """Processes started inside are deaf to SIGTERM and SIGINT; what comes meanwhile reaches this process afterwards.

    torchrun and terminals send these to the whole process group; a checkpoint's writer that died of them would take
    the checkpoint along that the rank still writes.
    """
    resource_tracker.ensure_running()  # it would unblock the signals if it were started with the first helper
    held = {signal.SIGTERM, signal.SIGINT}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, held)  # inherited by what is started
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
