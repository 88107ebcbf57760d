"""families.json is what the installed megatron-bridge says."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.long
def test_the_file_is_bridges_own() -> None:
    command = [sys.executable, "-m", "tools.bridge_families", "--check"]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
