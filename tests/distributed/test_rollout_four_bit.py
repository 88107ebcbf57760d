"""vLLM serves what a trainer over a 4-bit base computes with: that base made dense, with the adapter or merged."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_refits_in_both_modes_answer_with_the_bases_own_values(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.distributed.rollout_four_bit", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "RANK": "0", "WORLD_SIZE": "1"}
    environment |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29741"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads((tmp_path / "found.json").read_text())
    for base in ("dense", "stored"):
        assert all(error < 1e-4 for errors in found[base]["errors"].values() for error in errors), found[base]
        # The engine's own folder is another model: dense, or none that it loads.
        assert "do not compute the same model" in found[base]["without_base"], found[base]["without_base"]
