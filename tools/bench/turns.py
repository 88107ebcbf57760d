"""Engines one after another, each in processes of its own, which do their imports while another one is measured."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tools.bench.processes import kill_tree, start
from tools.bench.task import Task

LOG_TAIL_BYTES = 20_000
SINGLE = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}


class Engine:
    """The processes of one task, from its start to what it wrote."""

    def __init__(self, task: Task, num_processes: int):
        self.task = task
        assert task.gate is not None
        self._gate = Path(task.gate)
        specification = self._gate.with_suffix(".task.json")
        task.save(specification)
        self._log_path = self._gate.with_suffix(".log")
        self._log = self._log_path.open("wb")
        worker = ["-m", "tools.bench.worker", str(specification)]
        self._process = start_ranks(worker, num_processes, self._log)

    def answer(self, seconds: float) -> tuple[dict[str, Any], str]:
        """Give it its turn, and end it after the seconds. (What it wrote, or an error; how it ended and what it
        printed last)."""
        self._gate.touch()
        try:
            self._process.wait(seconds)
            reason = f"exit status {self._process.returncode}"
        except subprocess.TimeoutExpired:
            reason = f"no end within {seconds:.0f} s"
        finally:
            self.end()
        tail = self._log_path.read_bytes()[-LOG_TAIL_BYTES:].decode(errors="replace")
        written = Path(self.task.result)
        if not written.exists():
            return {"result": {"ok": False, "error": f"{reason}: {tail.strip()[-400:]}"}}, f"{reason}\n{tail}"
        answer = json.loads(written.read_text())
        if self._process.returncode != 0 and "error" not in answer["result"]:
            answer["result"]["error"] = reason
        return answer, f"{reason}\n{tail}"

    def end(self) -> None:
        kill_tree(self._process)
        self._log.close()


def start_ranks(worker: Sequence[str], num_processes: int, log: Any) -> subprocess.Popen:
    """Python with the arguments `worker`: under torchrun where there is more than one process, or alone in the
    environment that torchrun makes."""
    port = str(_free_port())
    environment = dict(os.environ)
    if num_processes == 1:
        environment |= SINGLE | {"MASTER_PORT": port}
        return start([sys.executable, *worker], environment, log)
    # As Megatron-Core asks for where communication overlaps with tensor-parallel products.
    environment["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(num_processes), "--master-port", port]
    return start([sys.executable, *launcher, *worker], environment, log)


def run_in_turn(
    tasks: Sequence[Task], num_processes: int, seconds: float, log: Path, prepare: Callable[[], None]
) -> Iterator[tuple[Task, dict[str, Any]]]:
    """Each task with what it answered, as soon as it has. seconds: for each, from its turn. log: gets the end of what
    each printed. prepare: what must be done before the first one's turn."""
    ahead: list[Engine] = []
    try:
        for number, task in enumerate(tasks):
            engine = ahead.pop() if ahead else Engine(task, num_processes)
            if number + 1 < len(tasks):
                ahead.append(Engine(tasks[number + 1], num_processes))
            if number == 0:
                prepare()
            began = time.perf_counter()
            answer, said = engine.answer(seconds)
            answer["result"]["turn_s"] = round(time.perf_counter() - began, 1)
            with log.open("a") as stream:
                stream.write(f"==== {task.engine}: {said}\n")
            yield task, answer
    finally:
        for engine in ahead:
            engine.end()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
