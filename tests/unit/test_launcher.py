"""`megatron-lora train`: real ranks (small scripts in place of the trainer), their end, and what the terminal shows."""

import os
import pty
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from megatron_lora.cli import launcher
from megatron_lora.cli.completion import complete, script
from megatron_lora.cli.launcher import Machines, launch
from megatron_lora.cli.main import main
from megatron_lora.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
OURS = os.environ | {"PYTHONPATH": str(ROOT)}
TELL = "import os, sys, time; from megatron_lora.runtime.failure import tell; rank = int(os.environ['RANK']); "


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(launcher, "SECONDS_TO_LEAVE", 0.5)
    monkeypatch.setattr(launcher, "SECONDS_TO_STOP", 0.5)


def ranks(code: str, nproc: int = 2, **more: int) -> int:
    return launch([sys.executable, "-c", TELL + code], Machines(nproc, **more))


def test_ranks_find_each_other_as_under_torchrun(tmp_path: Path):
    names = "RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT".split()
    code = f"open({str(tmp_path)!r} + f'/{{rank}}', 'w').write(' '.join(os.environ[n] for n in {names}))"
    assert ranks(code, 2, nnodes=2, node_rank=1, master_port=1234) == 0
    assert sorted(path.read_text() for path in tmp_path.iterdir()) == [
        "2 0 4 2 localhost 1234",
        "3 1 4 2 localhost 1234",
    ]


def test_a_users_mistake_is_told_once_and_its_status_passes(capfd: pytest.CaptureFixture[str]):
    assert ranks("tell('error: a mistake'); sys.exit(2)") == 2
    assert capfd.readouterr().err == "error: a mistake\n"


def test_the_rank_that_failed_first_is_the_one_that_speaks(capfd: pytest.CaptureFixture[str]):
    """Rank 0 fails because rank 1 did."""
    code = "time.sleep(0.3 if rank == 0 else 0); tell(f'error: rank {rank}'); sys.exit(3 - rank)"
    assert ranks(code) == 2
    assert capfd.readouterr().err == "error: rank 1\n"


def test_a_rank_that_hangs_after_anothers_failure_is_ended(capfd: pytest.CaptureFixture[str]):
    before = set(psutil.Process().children())
    stubborn = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
    assert ranks(stubborn + "sys.exit(7) if rank else time.sleep(60)") == 7
    assert capfd.readouterr().err == "error: rank 1 ended with status 7\n"
    left = set(psutil.Process().children()) - before
    assert not [child for child in left if child.status() != psutil.STATUS_ZOMBIE]


def test_a_message_is_a_line_of_its_own_behind_a_bar_that_was_killed():
    """In a terminal: the bar's line has no end where its rank could not stop it."""
    code = "print('bar 3/400', end='', flush=True) if rank else time.sleep(0.3); tell('error: stuck'); sys.exit(1)"
    run = "import sys; from megatron_lora.cli.launcher import Machines, launch; "
    run += f"command = [sys.executable, '-c', {TELL + code!r}]"
    ours, theirs = pty.openpty()
    command = [sys.executable, "-c", f"{run}; sys.exit(launch(command, Machines(2)))"]
    started = subprocess.Popen(command, env=OURS, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    shown = b""
    try:
        while piece := os.read(ours, 65536):
            shown += piece
    except OSError:  # the last process that had the terminal is gone
        pass
    os.close(ours)
    assert started.wait(timeout=60) == 1
    assert b"bar 3/400\r\x1b[K" in shown and shown.rstrip().endswith(b"\x1b[?25herror: stuck")


def test_a_killed_rank_is_named(capfd: pytest.CaptureFixture[str]):
    assert ranks("os.kill(os.getpid(), 9) if rank else time.sleep(60)") == 137
    assert "error: rank 1 was ended by SIGKILL" in capfd.readouterr().err


def test_a_killed_rank_is_named_where_another_fails_on_its_silence(capfd: pytest.CaptureFixture[str]):
    speaks = "time.sleep(0.3); tell('error: connection closed by peer'); sys.exit(1)"
    assert ranks(f"import signal\nif rank: os.kill(os.getpid(), signal.SIGSEGV)\nelse: {speaks}") == 139
    assert capfd.readouterr().err == "error: rank 1 was ended by SIGSEGV\n"


def test_of_ranks_that_ended_at_once_the_killed_one_is_named(tmp_path: Path):
    started = launcher._Ranks(list(Machines(2).environments(tmp_path)))
    started.processes = [subprocess.Popen(["sh", "-c", end]) for end in ("exit 1", "kill -9 $$")]
    for process in started.processes:
        process.wait()
    started.wait()
    status, message = started.outcome()
    assert status == 137 and message is not None and message.startswith("error: rank 1 was ended by SIGKILL")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_the_ranks_and_the_status_is_0(number: signal.Signals, tmp_path: Path):
    """Ranks that save and leave, and ranks that were not yet able to."""
    saves = (
        "import signal; "
        "[signal.signal(n, lambda *_: (open(sys.argv[1] + f'/saved-{rank}', 'w'), os._exit(0))) for n in (2, 15)]; "
    )
    for name, handler, last in (("able", saves, ""), ("not", "", "stopped before the run began")):
        folder = tmp_path / name
        folder.mkdir()
        code = handler + "open(sys.argv[1] + f'/{rank}', 'w'); time.sleep(60)"
        command = [sys.executable, "-c", TELL + code, str(folder)]
        program = f"from megatron_lora.cli.launcher import *; sys.exit(launch({command!r}, Machines(2)))"
        started = subprocess.Popen(
            [sys.executable, "-c", program],
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )
        while not (folder / "0").exists() or not (folder / "1").exists():
            time.sleep(0.02)
        started.send_signal(number)
        errors = started.communicate(timeout=60)[1]
        assert (started.returncode, last in errors, "Traceback" in errors) == (0, True, False), errors
        assert len(list(folder.glob("saved-*"))) == (2 if handler else 0)


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["trian", "x.yaml"], "unknown command trian; did you mean train?"),
        (["frobnicate"], "unknown command frobnicate; the commands are train, serve, show, export"),
        (["x.yaml"], "unknown command x.yaml; did you mean megatron-lora train x.yaml?"),
        (["show"], "which recipe? megatron-lora show RECIPE.yaml"),
        (["show", "x.yaml", "--row", "2"], "unknown flag --row; did you mean --rows?"),
        (["export"], "required: --adapter-ckpt/--lora-ckpt, --hf-ckpt-path; see megatron-lora export --help"),
        (
            ["merge", "--adapter-ckpt", "x", "--hf-ckpt", "y"],
            "unknown flag --hf-ckpt; did you mean --hf-ckpt-path?",
        ),
        (["import", "x"], "see megatron-lora import --help"),
        (["train", "configs/sft.yaml", "--nporc", "2"], "unknown flag --nporc; did you mean --nproc?"),
        (["train", "configs/sft.yaml", "-n", "2"], "unknown flag -n; did you mean --nproc 2?"),
        (["train", "configs/sft.yaml", "--nproc_per_node=4"], "did you mean --nproc 4?"),
        (["train", "--gpus", "all", "configs/sft.yaml"], "unknown flag --gpus; did you mean --nproc?"),
        (
            ["train", "configs/sft.yaml", "--learning_rate", "1e-4"],
            "keys of the recipe have no dashes: policy.megatron_cfg.optimizer.lr=1e-4",
        ),
        (["show", "configs/grpo.yaml", "--seed=3"], "keys of the recipe have no dashes: grpo.seed=3"),
        (["train", "--output-dir", "configs/sft.yaml"], "no dashes: checkpointing.checkpoint_dir=VALUE"),
        (["train", "configs/sft.yaml", "--resume_from_checkpoint"], "the same command goes on from the newest step"),
        (["train", "configs/sft.yaml", "--nproc", "0"], "--nproc: got '0', wanted an integer of at least 1"),
        (["train", "configs/sft.yaml", "--nproc", "two"], "--nproc: got 'two', wanted an integer"),
        (["train", "configs/sft.yaml", "--nproc=-1"], "--nproc: got '-1', wanted an integer of at least 1"),
        (["train", "configs/sft.yaml", "--master-port", "70000"], "wanted an integer from 0 to 65535"),
        (
            ["train", "configs/sft.yaml", "--nnodes", "2", "--node-rank", "2"],
            "a node rank below the number of machines",
        ),
        (["show", "configs/sft.yaml", "--rows", "0"], "--rows: got '0', wanted an integer of at least 1"),
        (["serve", "configs/grpo.yaml", "--port", "x"], "--port: got 'x', wanted an integer from 0 to 65535"),
        (["--nproc", "2", "train"], "a command comes first, before --nproc: train, serve"),
        (["train", "--config", "configs/sft.yaml"], "needs no flag: megatron-lora train configs/sft.yaml"),
        (["train", "configs/sft.yaml", "--nnodes", "2"], "needs --master-addr"),
        (["train", "--nproc", "2"], "which recipe?"),
        (["train", "configs/sft.yaml", "--nproc", "2", "lora_rank=8"], "did you mean policy.megatron_cfg.peft.dim?"),
    ],
)
def test_mistakes_before_anything_starts(
    arguments: list[str], wanted: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(ROOT)
    assert main(arguments) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: ") and errors.count("\n") == 1 and wanted in errors


def test_help_and_the_resolved_recipe(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    assert main(["--help"]) == main(["train", "--help"]) == main([]) == 0
    assert "--nproc N" in capsys.readouterr().out
    assert main(["train", "--print-config", "--nproc", "2", "configs/sft.yaml"]) == 0
    assert "model_name:" in capsys.readouterr().out


def test_mistakes_and_help_import_no_torch():
    mistakes = [
        ["train", "x.yaml"],
        ["train", "--help"],
        ["export"],
        ["merge", "--help"],
        ["import", "--zzz"],
        ["show"],
    ]
    code = "import sys; from megatron_lora.cli.main import main\n"
    code += f"print([main(words) for words in {mistakes}], 'torch' in sys.modules, file=sys.__stderr__)"
    done = subprocess.run([sys.executable, "-c", code], check=True, env=OURS, capture_output=True, text=True)
    assert done.stderr.splitlines()[-1] == "[2, 0, 2, 0, 2, 2] False"


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["tr", "tr", "1"], ["train"]),
        (["pol", "train", "3"], ["policy."]),
        (["policy.megatron_cfg.pe", "train", "3"], ["policy.megatron_cfg.peft."]),
        (["sft.se", "train", "3"], ["sft.seed="]),
        (["policy.precision=f", "train", "3"], ["policy.precision=float32"]),
        (["sft.val_at_end=", "train", "3"], ["sft.val_at_end=true", "sft.val_at_end=false"]),
        (["--dr", "train", "3"], ["--dry-run"]),
        (["x", "export", "2"], []),
        (["--push", "export", "2"], ["--push-to-hub"]),
        (["--ro", "show", "3"], ["--rows"]),
        (["sft.se", "show", "3"], ["sft.seed="]),
        (["--po", "serve", "3"], ["--port"]),
        (["", "completion", "2"], ["bash", "zsh", "fish"]),
    ],
)
def test_completion(words: list[str], wanted: list[str]):
    assert complete(words, ["train", "export"]) == wanted


ZSH_STUBS = """compdef() { : }
compadd() { [[ $1 = -S ]] && shift 2; shift; print -l -- "$@" }
"""
ASKED_IN_ZSH = "words=(megatron-lora {command} {word}); CURRENT=3; _megatron_lora"


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_the_completion_scripts_of_other_shells(shell: str, tmp_path: Path):
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    command = tmp_path / "megatron-lora"
    command.write_text(f'#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} -m megatron_lora.cli.main "$@"\n')
    command.chmod(0o755)
    answers = {("train", "policy.precision=f"): "policy.precision=float32", ("export", "--push"): "--push-to-hub"}
    for (name, word), wanted in answers.items():
        fish = f"{script(['fish'])}\ncomplete -C 'megatron-lora {name} {word}'"
        zsh = ZSH_STUBS + script(["zsh"]) + "\n" + ASKED_IN_ZSH.format(command=name, word=word)
        environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "HOME": str(tmp_path)}
        asks = [shell, "-c", fish] if shell == "fish" else ["zsh", "-f", "-c", zsh]
        done = subprocess.run(asks, capture_output=True, text=True, env=environment, check=True)
        assert done.stdout.split() == [wanted], (done.stdout, done.stderr)


def test_the_completion_script_is_bash(tmp_path: Path):
    subprocess.run(["bash", "-n"], input=script(["bash"]), text=True, check=True)
    with pytest.raises(UserError, match="no completion for csh"):
        script(["csh"])
    # What bash itself makes of it, with the command standing in the path.
    command = tmp_path / "megatron-lora"
    command.write_text(f'#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} -m megatron_lora.cli.main "$@"\n')
    command.chmod(0o755)
    asks = script(["bash"]) + (
        '\nCOMP_LINE="megatron-lora train policy.precision=f"; COMP_POINT=${#COMP_LINE}; COMP_CWORD=4\n'
        'COMP_WORDS=(megatron-lora train policy.precision = f); _megatron_lora 2>/dev/null; echo "${COMPREPLY[@]}"'
    )
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", asks], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout == "float32\n"
