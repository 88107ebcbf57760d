"""What people read reaches the terminal, what libraries print the log: at the level of file descriptors."""

import fcntl
import io
import os
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from rich.console import Console

from megatron_lora.errors import UserError
from megatron_lora.reporting.console import RunConsole
from megatron_lora.runtime import terminal

NOISE = """
import ctypes, os, sys, warnings, subprocess
from pathlib import Path
from megatron_lora.errors import UserError
from megatron_lora.runtime import terminal

terminal.say("before")
with terminal.output_in_log(3) as log:
    print("python's noise")
    print("python's errors", file=sys.stderr)
    os.write(2, b"a library's noise\\n")
    subprocess.run(["echo", "a child's noise"])
    terminal.say("for people")
    terminal.complain("a mistake")
    if sys.argv[1] != "none":
        log.move_to(Path(sys.argv[1]))
        print("later noise")
print("after")
"""


def run(folder: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", NOISE, folder], capture_output=True, text=True, check=True)


def test_noise_goes_to_the_log_and_words_to_the_terminal(tmp_path: Path):
    done = run(str(tmp_path))
    assert done.stdout.splitlines() == ["before", "for people", "after"]
    assert done.stderr.splitlines() == ["a mistake"]
    first, *rest = (tmp_path / "log.txt").read_text().splitlines()
    assert first.startswith("--- rank 3, process ")
    assert rest == ["python's noise", "python's errors", "a library's noise", "a child's noise", "later noise"]
    run(str(tmp_path))
    assert (tmp_path / "log.txt").read_text().count("--- rank 3") == 2  # a second start appends


def test_without_a_folder_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    assert run("none").stdout.splitlines() == ["before", "for people", "after"]
    assert list(tmp_path.iterdir()) == []


def test_a_mistake_removes_a_temporary_log_and_a_crash_keeps_it(capfd: pytest.CaptureFixture[str]):
    for error, is_kept in ((UserError("x"), False), (RuntimeError("x"), True)):
        with pytest.raises(type(error)), terminal.output_in_log(0) as log:
            os.write(1, b"noise\n")
            raise error
        assert log.path.exists() is is_kept
        log.path.unlink(missing_ok=True)
    print("back")
    assert capfd.readouterr().out == "back\n"


def test_a_long_list_is_short_in_the_terminal_and_whole_in_the_log(tmp_path: Path):
    names = [f"section.key_{number}" for number in range(100)]
    with terminal.output_in_log(0) as log:
        log.move_to(tmp_path)
        shown = terminal.brief(f"no effect: {', '.join(names)}")
        assert terminal.brief("few: a, b") == "few: a, b"
    kept = shown.partition(", ... and ")[0].count(",") + 1
    assert len(shown) < 450 and shown.endswith(f", ... and {100 - kept} more, which are in log.txt"), shown
    assert f"{names[0]}, {names[1]}" in (log := (tmp_path / "log.txt").read_text()) and log.endswith(f"{names[-1]}\n")
    assert terminal.brief(", ".join(names)) == ", ".join(names)  # with no log, as in --debug


@pytest.mark.parametrize("columns", [100, 60, 0])
def test_a_message_ends_its_lines_between_words(columns: int):
    text = f"error: one, {'two, ' * 30}--master-port\n  {'held ' * 30}a/{'very' * 30}/path"
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    with os.fdopen(theirs, "w") as screen:
        shown = terminal.folded(text, screen)
    os.close(ours)
    assert shown.split() == text.split()  # no word is broken
    lines = shown.splitlines()
    if columns:
        assert all(len(line) <= columns for line in lines[:-1]) and lines[-2].startswith("  held "), shown
    else:  # nobody sized it
        assert shown == text
    assert terminal.folded(text, io.StringIO()) == text


def test_a_live_bar_leaves_noise_in_the_log(monkeypatch: pytest.MonkeyPatch):
    """Such as the bars of vLLM's captures: Rich's live display would take the streams over and print them above it."""
    screen, log = io.StringIO(), io.StringIO()
    monkeypatch.setattr(sys, "stdout", log)
    monkeypatch.setattr(sys, "stderr", log)
    console = RunConsole("grpo", 4, console=Console(file=screen, force_terminal=True, width=100))
    for stream in (sys.stdout, sys.stderr):
        print("Capturing CUDA graphs", file=stream)
    console.train_step(4, {})
    console.close()
    assert "4/4" in screen.getvalue() and "Capturing" not in screen.getvalue()
    assert log.getvalue().count("Capturing CUDA graphs") == 2
