"""How much of the time each GPU of this machine runs a kernel, while something else goes on."""

import shutil
import subprocess
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

PERIOD_MILLISECONDS = 200


class GpuUse:
    """Shares of time [0, 1] by GPU, each the driver's own of a period before it was read."""

    def __init__(self, counts: Callable[[], bool]):
        """counts: asked with every reading, whether it is to be taken."""
        self._counts = counts
        self._read: dict[int, list[float]] = defaultdict(list)

    def take(self, line: str) -> None:
        """A line `GPU, percent` of nvidia-smi; what it prints besides (a percentage that is not known) is left out."""
        number, _, percent = line.partition(",")
        if percent.strip().isdigit() and self._counts():
            self._read[int(number)].append(int(percent) / 100)

    def idle_shares(self) -> dict[int, float]:
        """By GPU, the mean of what it did not run; {} where nothing was read."""
        return {number: 1 - sum(shares) / len(shares) for number, shares in sorted(self._read.items())}


@contextmanager
def watch_gpus(counts: Callable[[], bool]) -> Iterator[GpuUse]:
    """Read within the block; nothing where there is no nvidia-smi."""
    use = GpuUse(counts)
    if shutil.which("nvidia-smi") is None:
        yield use
        return
    query = ["--query-gpu=index,utilization.gpu", "--format=csv,noheader,nounits", f"--loop-ms={PERIOD_MILLISECONDS}"]
    process = subprocess.Popen(["nvidia-smi", *query], stdout=subprocess.PIPE, text=True)

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            use.take(line)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        yield use
    finally:
        process.terminate()
        process.wait()
        reader.join()
