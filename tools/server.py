"""A rollout server of a recipe, for tools that train beside it."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_lora.errors import UserError
from tools.quickstart import ROOT

START_SECONDS = 600
END_SECONDS = 20


class Server:
    """url: where it answers, or will. Its output goes to `log`."""

    def __init__(self, url: str, log: Path, process: subprocess.Popen):
        self.url, self._log, self._process = url, log, process

    def check(self) -> None:
        """Raise UserError where it has ended."""
        if self._process.poll() is not None:
            raise UserError(f"the rollout server has ended; {self._log} says why")

    def answers(self) -> bool:
        try:
            urllib.request.urlopen(f"{self.url}/health", timeout=5)
        except OSError:
            return False
        return True


@contextmanager
def starting(recipe: str, log: Path, *overrides: str, **environment: str) -> Iterator[Server]:
    """A server that starts, and is there until the end of the block."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "megatron_lora.cli.main", "serve", recipe, *overrides]
    command += [f"policy.generation.servers.urls=[{url}]", "--port", str(port)]
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **environment},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield Server(url, log, process)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@contextmanager
def served(recipe: str, log: Path, *overrides: str, **environment: str) -> Iterator[str]:
    """The address of a server that answers within the block. Raises UserError where it does not start."""
    with starting(recipe, log, *overrides, **environment) as server:
        deadline = time.monotonic() + START_SECONDS
        while not server.answers():
            server.check()
            if time.monotonic() > deadline:
                raise UserError(f"the rollout server did not answer within {START_SECONDS} s; {log} says why")
            time.sleep(1)
        yield server.url
