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


@contextmanager
def served(recipe: str, log: Path, *overrides: str, **environment: str) -> Iterator[str]:
    """The address of a server that is there within the block; its output goes to `log`. Raises UserError where it does
    not start."""
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
        deadline = time.monotonic() + START_SECONDS
        while not _answers(url):
            if process.poll() is not None or time.monotonic() > deadline:
                raise UserError(f"the rollout server did not start; {log} says why")
            time.sleep(1)
        yield url
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
        process.wait()


def _answers(url: str) -> bool:
    try:
        urllib.request.urlopen(f"{url}/health", timeout=5)
    except OSError:
        return False
    return True
