"""The runner with real worker processes, and rewards that fail in every way."""

import logging
import os
import subprocess
import sys
import time

import pytest

from megatron_lora.config.schema_env import RewardFunctionConfig
from megatron_lora.errors import UserError
from megatron_lora.rollout.rewards import RewardRunner, RewardSample, RewardSpec

USER_FILE = """
import os, subprocess, sys, time

def misbehave(prompt, completion, answer, extra):
    print("noise on standard output", completion)
    if completion == "raise":
        raise RuntimeError("boom " + "x" * 10000)
    if completion == "hang":
        time.sleep(1000)
    if completion == "spin":
        import re
        re.fullmatch(r"(a+)+b", "a" * 64)  # holds the interpreter's lock
    if completion == "exit":
        os._exit(7)
    if completion == "sys.exit":
        sys.exit(3)
    if completion == "nan":
        return float("nan")
    if completion == "none":
        return None
    if completion == "child":
        child = subprocess.Popen(["sleep", "1000"])
        open(extra["pid_file"], "w").write(str(child.pid))
        time.sleep(1000)
    if completion == "input":
        return float(len(sys.stdin.read()))
    return len(completion) + extra.get("bonus", 0.0)
"""


@pytest.fixture
def user_spec(tmp_path):
    (tmp_path / "user.py").write_text(USER_FILE)
    return RewardSpec("python", "user", function=f"{tmp_path}/user.py:misbehave", timeout_seconds=1.5)


def samples(*completions: str) -> list[RewardSample]:
    return [RewardSample("", completion, "4") for completion in completions]


def test_cheap_rewards_need_no_process():
    specs = [RewardSpec("exact"), RewardSpec("length", weight=0.5, max_tokens=10)]
    runner = RewardRunner(specs)
    batch = [RewardSample("2+2", "4", "4", {"num_tokens": 15}), RewardSample("2+2", "5", "4", {"num_tokens": 1})]
    outcomes = runner(batch)
    assert [outcome.total for outcome in outcomes] == [1 + 0.5 * -0.5, 0.0]
    assert outcomes[0].values == {"exact": 1.0, "length": -0.5}
    assert not runner.pool.workers
    # A missing field fails that reward, not the other.
    (outcome,) = runner([RewardSample("", "4", "4")])
    assert outcome.total == 1.0 and "num_tokens" in outcome.errors["length"]


def test_failures_cost_their_sample_a_logged_zero(user_spec, caplog):
    bad = ["raise", "hang", "spin", "exit", "sys.exit", "nan", "none"]
    with RewardRunner([user_spec, RewardSpec("exact")], num_workers=2) as runner:
        with caplog.at_level(logging.WARNING):
            outcomes = runner(samples("abc", *bad, "4"))
        assert [outcome.values["user"] for outcome in outcomes] == [3.0] + [0.0] * 6 + [None, 1.0]
        assert [outcome.total for outcome in outcomes] == [3.0] + [0.0] * 7 + [2.0]
        errors = [outcome.errors.get("user", "") for outcome in outcomes]
        wanted = [
            "",
            "boom",
            "timed out after 1.5",
            "timed out",
            "exit status 7",
            "SystemExit",
            "finite",
            "",
            "",
        ]
        for error, part in zip(errors, wanted, strict=True):
            assert part in error and bool(part) == bool(error)
        assert "reward 'user' failed and counts 0 for 6 of 9 samples" in caplog.text
        # The runner goes on: nothing of the failed batch is left in the pipes.
        assert [outcome.total for outcome in runner(samples("ab", "abcd", "input"))] == [2.0, 4.0, 0.0]


def test_many_samples_keep_their_order_and_processes(user_spec):
    with RewardRunner([user_spec], num_workers=2) as runner:
        runner(samples("a"))
        pids = {worker.process.pid for worker in runner.pool.workers}
        batch = [RewardSample("", "y" * (n % 7), "", {"bonus": 100.0 * n}) for n in range(300)]
        batch.append(RewardSample("", "z" * 300_000, ""))  # larger than a pipe's buffer
        start = time.monotonic()
        totals = [outcome.total for outcome in runner(batch)]
        assert totals == [n % 7 + 100.0 * n for n in range(300)] + [300_000.0]
        assert time.monotonic() - start < 5
        assert pids <= {worker.process.pid for worker in runner.pool.workers}


def test_math_in_workers():
    with RewardRunner([RewardSpec("math", timeout_seconds=60.0)], num_workers=1) as runner:
        batch = [RewardSample("", r"\boxed{\frac{2}{4}}", "0.5"), RewardSample("", "5", "4")]
        assert [outcome.total for outcome in runner(batch)] == [1.0, 0.0]


@pytest.mark.slow
def test_hard_mathematics_times_out():
    # math-verify expands this power tower; its own alarm is off, so only the runner can stop it.
    spec = RewardSpec("math", timeout_seconds=2.0)
    with RewardRunner([spec], num_workers=1) as runner:
        start = time.monotonic()
        outcomes = runner([RewardSample("", r"\boxed{(x+1)^{99999}-(x+1)^{99998}}", "x^{99999}+7")])
        assert outcomes[0].total == 0.0 and "timed out" in outcomes[0].errors["math"]
        assert time.monotonic() - start < 30


def test_killing_a_hung_reward_kills_what_it_started(user_spec, tmp_path):
    pid_file = tmp_path / "pid"
    with RewardRunner([user_spec], num_workers=1) as runner:
        (outcome,) = runner([RewardSample("", "child", "", {"pid_file": str(pid_file)})])
    assert "timed out" in outcome.errors["user"]
    pid = int(pid_file.read_text())
    for _ in range(50):
        if not os.path.exists(f"/proc/{pid}") or "Z" in open(f"/proc/{pid}/stat").read().split()[2]:
            return
        time.sleep(0.1)
    pytest.fail("the reward's child process is still running")


def test_a_worker_that_died_between_batches_is_replaced(user_spec):
    with RewardRunner([user_spec], num_workers=1) as runner:
        runner(samples("a"))
        runner.pool.workers[0].process.kill()
        runner.pool.workers[0].process.wait()
        assert [outcome.total for outcome in runner(samples("abc"))] == [3.0]
    assert not runner.pool.workers


def test_extra_that_cannot_travel(user_spec):
    with RewardRunner([user_spec], num_workers=1) as runner:
        outcomes = runner([RewardSample("", "abc", "", {"f": lambda: 0}), RewardSample("", "abc", "")])
    assert [outcome.total for outcome in outcomes] == [0.0, 3.0]
    assert "cannot be sent" in outcomes[0].errors["user"]


def test_reward_that_only_builds_in_the_parent(tmp_path):
    file = tmp_path / "flaky.py"
    file.write_text("def reward(prompt, completion, answer, extra):\n    return 1.0\n")
    runner = RewardRunner([RewardSpec("python", function=f"{file}:reward")])
    file.unlink()
    with pytest.raises(RuntimeError, match="did not start.*no file"):
        runner(samples("a"))


def test_bad_specs(tmp_path):
    with pytest.raises(UserError, match="each its own name"):
        RewardRunner([RewardSpec("exact"), RewardSpec("exact")])
    with pytest.raises(UserError, match="no file"):
        RewardRunner([RewardSpec("python", function=f"{tmp_path}/missing.py:reward")])


def test_from_config():
    entry = RewardFunctionConfig(kind="format", weight=2.0, pattern="a+")
    assert RewardSpec.from_config(entry) == RewardSpec("format", "format", weight=2.0, pattern="a+")


@pytest.mark.slow
def test_workers_do_not_import_torch_and_end_with_their_parent(user_spec, tmp_path):
    """A parent that is killed leaves no process behind, even with a reward that holds the interpreter's lock."""
    script = tmp_path / "parent.py"
    script.write_text(
        "import sys\n"
        "from megatron_lora.rollout.rewards import *\n"
        f"spec = RewardSpec('python', 'user', function={user_spec.function!r}, timeout_seconds=1.5)\n"
        "runner = RewardRunner([spec], num_workers=1)\n"
        "runner([RewardSample('', 'a', '')])\n"
        "assert 'torch' not in sys.modules\n"
        "print(runner.pool.workers[0].process.pid, flush=True)\n"
        "runner([RewardSample('', 'spin', '')])\n"
    )
    parent = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    parent.stdout.close()
    for _ in range(200):
        if not os.path.exists(f"/proc/{pid}") or open(f"/proc/{pid}/stat").read().split()[2] == "Z":
            return
        time.sleep(0.1)
    pytest.fail("the worker outlived its parent")
