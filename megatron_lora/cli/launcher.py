"""Starts the ranks of a run on this machine, waits for them, and leaves with one message.

torchrun does the same and stays right; it ends with its own traceback and status 1 whatever a rank said. Here the exit
status of the rank that failed first is the launcher's, and its message the last thing in the terminal.
"""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from megatron_lora.runtime.failure import ERROR_FILE, LAUNCHER, read_report
from megatron_lora.runtime.terminal import complain

SECONDS_TO_LEAVE = 10.0  # for the other ranks, once one has failed: they may be drawing pictures or writing reports
SECONDS_TO_STOP = 5.0  # between SIGTERM and SIGKILL
POLL_SECONDS = 0.05


@dataclass(frozen=True)
class Machines:
    """nproc: ranks on this machine. node_rank: its number among `nnodes`, which all start this command."""

    nproc: int
    nnodes: int = 1
    node_rank: int = 0
    master_addr: str = "localhost"
    master_port: int = 0

    def environments(self, error_files: Path) -> Iterator[dict[str, str]]:
        """What each rank of this machine finds in its environment, as torchrun would set it."""
        port = self.master_port or _free_port()
        threads = max(1, len(os.sched_getaffinity(0)) // self.nproc)
        for local in range(self.nproc):
            yield {
                "OMP_NUM_THREADS": str(threads),
                **os.environ,
                "RANK": str(self.node_rank * self.nproc + local),
                "LOCAL_RANK": str(local),
                "WORLD_SIZE": str(self.nnodes * self.nproc),
                "LOCAL_WORLD_SIZE": str(self.nproc),
                "MASTER_ADDR": self.master_addr,
                "MASTER_PORT": str(port),
                LAUNCHER: "1",
                ERROR_FILE: str(error_files / f"{local}.json"),
            }


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def launch(command: Sequence[str], machines: Machines, *, only_first: bool = False) -> int:
    """Run a command on every rank; returns the exit status. only_first: start rank 0 alone, which finds the others in
    its environment but does not meet them (--dry-run)."""
    with tempfile.TemporaryDirectory(prefix="megatron-lora-") as folder:
        environments = list(machines.environments(Path(folder)))[: 1 if only_first else None]
        ranks = _Ranks(environments)
        with ranks.signals_passed_on():
            # Sessions of their own: Ctrl-C reaches the launcher alone, which passes it on once.
            ranks.processes = [
                subprocess.Popen(command, env=environment, start_new_session=True) for environment in environments
            ]
            ranks.wait()
        status, message = ranks.outcome()
    if sys.stdout.isatty():
        # A progress bar that was killed leaves the cursor hidden and behind it: what follows is a line of its own.
        print("\r\x1b[K\x1b[?25h", end="", flush=True)
    if message is not None:
        complain(message)
    return status


@dataclass
class _Ranks:
    environments: list[dict[str, str]]
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)
    asked: list[int] = field(default_factory=list)
    failed: list[int] = field(default_factory=list)

    @contextmanager
    def signals_passed_on(self) -> Iterator[None]:
        def note(number: int, frame: FrameType | None) -> None:
            self.asked.append(number)
            self._send(signal.SIGTERM)  # of SIGINT, Python makes a traceback where nobody handles it yet

        before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def wait(self) -> None:
        """Until all have ended. Where one fails the others get a while to leave, then are made to."""
        if self.asked:  # before they were there
            self._send(signal.SIGTERM)
        steps = [(SECONDS_TO_LEAVE, signal.SIGTERM), (SECONDS_TO_LEAVE + SECONDS_TO_STOP, signal.SIGKILL)]
        failed_at: float | None = None
        while any(process.poll() is None for process in self.processes):
            self._note_failures()
            if self.failed and failed_at is None:
                failed_at = time.monotonic()
            if failed_at is not None and steps and time.monotonic() - failed_at > steps[0][0]:
                self._send(steps.pop(0)[1])
            time.sleep(POLL_SECONDS)
        self._note_failures()

    def _note_failures(self) -> None:
        ended = [
            (status > 0, number)  # first a rank that a signal ended: it is why the others failed
            for number, process in enumerate(self.processes)
            if number not in self.failed and (status := process.poll())
        ]
        self.failed += [number for _, number in sorted(ended)]

    def _send(self, number: int) -> None:
        for process in self.processes:
            if process.poll() is None:
                os.killpg(process.pid, number)

    def outcome(self) -> tuple[int, str | None]:
        """(exit status, the last message or None)."""
        if not self.failed:
            return 0, None
        status = self.processes[self.failed[0]].returncode
        reports = [read_report(self.environments[number][ERROR_FILE]) for number in self._by_failure()]
        if status > 0:
            message = next((report for report in reports if report is not None), None)
            return status, message or f"error: rank {self._name(self.failed[0])} ended with status {status}"
        by_request = status == -signal.SIGTERM and bool(self.asked)
        if by_request and len(self.asked) == 1:
            return 0, "stopped before the run began; nothing was written"
        cause = signal.Signals(-status).name
        hint = "; the machine may have run out of memory" if status == -signal.SIGKILL and not by_request else ""
        # The others' reports are of a rank that did not answer any more: of what followed, not of the cause.
        return 128 - status, reports[0] or f"error: rank {self._name(self.failed[0])} was ended by {cause}{hint}"

    def _by_failure(self) -> list[int]:
        return [*self.failed, *(number for number in range(len(self.processes)) if number not in self.failed)]

    def _name(self, number: int) -> str:
        return self.environments[number]["RANK"]
