"""Ranks of one job, forked from a process that has done their imports."""

import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable

from megatron_lora.runtime.processes import die_with_parent
from megatron_lora.runtime.quiet import end_children


def run_forked(ranks: int, job: Callable[[], None]) -> int:
    """The job on so many ranks, each with the environment that torchrun gives it. One that fails ends the others, as
    torchrun does. Returns 0, or 1 where one failed."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    sys.stdout.flush()
    sys.stderr.flush()
    running = {_start(rank, ranks, port, job) for rank in range(ranks)}
    failed = False
    while running:
        pid, status = os.wait()
        running.discard(pid)
        if status and not failed:
            failed = True
            for other in running:
                os.kill(other, signal.SIGKILL)
    return int(failed)


def _start(rank: int, ranks: int, port: int, job: Callable[[], None]) -> int:
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        die_with_parent()
        numbers = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": ranks,
            "LOCAL_WORLD_SIZE": ranks,
            "MASTER_PORT": port,
        }
        os.environ |= {"MASTER_ADDR": "localhost"} | {name: str(number) for name, number in numbers.items()}
        job()
        status = 0
    except SystemExit as end:
        print(end, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        end_children()  # helpers would hold the pipes that whoever started this reads from
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
