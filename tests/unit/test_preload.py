"""A base's copy in shared memory: made once, kept while somebody uses it, removed by the last user or after a kill."""

import fcntl
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from megatron_lora.config.schema import PolicyConfig
from megatron_lora.errors import UserError
from megatron_lora.policy import preload
from megatron_lora.policy.preload import base_folder, check_preload, copy_of, released_copies, use_copy


@pytest.fixture
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder in the place of /dev/shm, on a file system with the same locks."""
    folder = tmp_path / "shm"
    folder.mkdir()
    monkeypatch.setattr(preload, "SHARED_MEMORY", folder)
    with released_copies():
        yield folder


def make_base(folder: Path, value: float = 1.0) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "pytorch_model.bin").write_text("the same weights once more")
    save_file({"weight": torch.full((64, 64), value)}, folder / "model.safetensors")
    return folder


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make_base(tmp_path / "base")


class User:
    """A process of its own that uses the base's copy until it is told to leave."""

    def __init__(self, base: Path, before: Callable[[], Any] = lambda: None):
        here, there = os.pipe()
        stay, self.leave_pipe = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                os.close(self.leave_pipe)
                preload._used.clear()
                before()
                with released_copies():
                    os.write(there, str(use_copy(base)).encode())
                    os.read(stay, 1)
            finally:
                os._exit(0)
        os.close(there)
        os.close(stay)
        self.told = here

    def copy(self) -> Path:
        """Waits until it has one."""
        return Path(os.read(self.told, 4096).decode())

    def leave(self) -> None:
        os.write(self.leave_pipe, b".")
        self.wait()

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        self.wait()

    def wait(self) -> None:
        """For its end. The pipe's other end may be open in later users too, so its closing would tell nobody."""
        os.waitpid(self.pid, 0)
        os.close(self.leave_pipe)
        os.close(self.told)


def test_it_is_made_once_and_the_last_user_removes_it(base: Path, memory: Path) -> None:
    users = [User(base) for _ in range(4)]
    [copy] = {user.copy() for user in users}
    assert copy == copy_of(base) and copy.parent == memory
    assert {path.name for path in copy.iterdir()} == {"config.json", "model.safetensors"}
    assert (copy / "model.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()
    made = (copy / "model.safetensors").stat()
    late = User(base)
    late.copy()
    assert (copy / "model.safetensors").stat().st_ino == made.st_ino
    for user in users:
        user.leave()
        assert copy.is_dir()
    late.leave()
    assert list(memory.iterdir()) == []


def test_users_that_leave_together_leave_nothing(base: Path, memory: Path) -> None:
    for _ in range(10):
        users = [User(base) for _ in range(3)]
        for user in users:
            user.copy()
        for user in users:
            os.write(user.leave_pipe, b".")
        for user in users:
            user.wait()
        assert list(memory.iterdir()) == []


def test_what_a_killed_user_left_is_removed_by_the_next_and_used_again_by_its_own(
    base: Path, memory: Path, tmp_path: Path
) -> None:
    first = User(base)
    left = first.copy()
    first.kill()
    assert left.is_dir()
    kept = (left / "model.safetensors").stat().st_ino
    assert use_copy(base) == left and (left / "model.safetensors").stat().st_ino == kept
    # This process uses it now, so others let it be.
    other = User(make_base(tmp_path / "other", 2.0))
    other.copy()
    other.leave()
    assert left.is_dir()
    with released_copies():
        pass
    again = User(base)
    again.copy()
    again.kill()
    third = use_copy(make_base(tmp_path / "third", 3.0))
    assert {path.name for path in memory.iterdir()} == {third.name, f"{third.name}.lock"}


def test_a_kill_in_mid_copy_is_made_good(base: Path, memory: Path) -> None:
    def stop_in_the_middle() -> None:
        def half(source: Path, target: Path) -> None:
            target.write_bytes(source.read_bytes()[:10])
            os.kill(os.getpid(), signal.SIGKILL)

        shutil.copyfile = half  # type: ignore[assignment]

    broken = User(base, stop_in_the_middle)
    broken.wait()
    assert [path.name for path in memory.iterdir() if path.is_dir()] == [f"{copy_of(base).name}.partial"]
    copy = use_copy(base)
    assert (copy / "model.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()
    assert {path.name for path in memory.iterdir()} == {copy.name, f"{copy.name}.lock"}


def test_a_base_that_changed_has_another_copy(base: Path, memory: Path) -> None:
    before = use_copy(base)
    save_file({"weight": torch.full((64, 64), 5.0)}, base / "model.safetensors")
    assert use_copy(base) != before


def policy_of(base: Path, **keys: Any) -> PolicyConfig:
    return PolicyConfig.model_validate({"model_name": str(base)} | keys)


def test_the_recipe_says_whether(base: Path, memory: Path) -> None:
    assert base_folder(policy_of(base)) == base and list(memory.iterdir()) == []
    assert base_folder(policy_of(base, preload_to_shm=True)) == copy_of(base)


def test_what_does_not_fit_is_refused_before_anything_is_copied(
    base: Path, memory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(memory)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    check_preload(policy_of(base))
    for action in (check_preload, base_folder):
        with pytest.raises(UserError, match=r"preload_to_shm.*0\.00 GB free; set it to false"):
            action(policy_of(base, preload_to_shm=True))
    assert [path for path in memory.iterdir() if path.is_dir()] == []


def test_a_machine_without_shared_memory_is_told(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preload, "SHARED_MEMORY", tmp_path / "nowhere")
    with pytest.raises(UserError, match="has no"):
        base_folder(policy_of(base, preload_to_shm=True))


def test_who_comes_second_does_not_wait_for_the_first_to_leave(
    memory: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two ranks that find no copy at the same time: one makes it and keeps the lock while it uses it."""
    lock_as_the_system = fcntl.flock
    held: list[int] = []

    def lock(descriptor: int, kind: int) -> None:
        if kind & fcntl.LOCK_EX and not held:
            # The other one was faster.
            preload._copy(base, copy_of(base))
            held.append(os.open(preload._lock(copy_of(base)), os.O_RDWR))
            lock_as_the_system(held[0], fcntl.LOCK_SH)
        assert not kind & fcntl.LOCK_EX or kind & fcntl.LOCK_NB, "waits until nobody uses the copy"
        lock_as_the_system(descriptor, kind)

    monkeypatch.setattr(preload.fcntl, "flock", lock)
    assert use_copy(base) == copy_of(base)
    os.close(held[0])
