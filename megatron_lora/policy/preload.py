"""A base's files in the host's shared memory, copied there once and read by every process that has the same base:
trainer ranks, rollout engines, servers (`policy.preload_to_shm`).

A copy lies in a folder whose name follows from the user and the files' places, sizes and times. Each user holds a
shared lock on a file beside it, which ends with its process however that ends; the last one removes both, and whoever
preloads next removes what a killed one has left.
"""

import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from megatron_lora.config.schema import PolicyConfig
from megatron_lora.conversion.base_model import WEIGHT_ENDINGS, cached_folder, find_base
from megatron_lora.conversion.fingerprint import fingerprint_base
from megatron_lora.errors import UserError

SHARED_MEMORY = Path("/dev/shm")
PREFIX, LOCK, PARTIAL = "megatron-lora-base-", ".lock", ".partial"
KEY = "policy.preload_to_shm=true"
# Left free: the ranks' own communication and data workers need some.
SPARE_BYTES = 64 << 20

# Copies that this process uses: folder -> the descriptor of its lock.
_used: dict[Path, int] = {}


def base_folder(policy: PolicyConfig, *, for_a_child: bool = False) -> Path:
    """The recipe's base as a local folder, fetched where it is a hub name; with `policy.preload_to_shm` its copy in
    shared memory, as `use_copy` gives it. Raises UserError where it cannot be found or does not fit."""
    folder = find_base(None, policy.model_name, policy.model_name)
    return use_copy(folder, for_a_child=for_a_child) if policy.preload_to_shm else folder


def check_preload(policy: PolicyConfig) -> None:
    """Raise UserError where the base cannot be preloaded, as far as it is here to be seen."""
    if not policy.preload_to_shm:
        return
    local = Path(policy.model_name).expanduser()
    folder = local if local.is_dir() else cached_folder(policy.model_name)
    if folder is not None and not copy_of(folder).is_dir():
        _check_room(folder)


def copy_of(folder: Path) -> Path:
    """Where a folder's copy lies, or would."""
    digest = hashlib.sha256(f"{os.getuid()}\n".encode())
    for path in _files(folder):
        status = path.stat()
        digest.update(f"{path.absolute()}|{status.st_size}|{status.st_mtime_ns}\n".encode())
    return SHARED_MEMORY / f"{PREFIX}{digest.hexdigest()[:16]}"


def use_copy(folder: Path, *, for_a_child: bool = False) -> Path:
    """A copy of the folder's files that stays while this process uses it. for_a_child: also while a program that takes
    this process's place does. Raises UserError where it does not fit."""
    copy = copy_of(folder)
    if copy in _used:
        return copy
    _check_there()
    _remove_unused(copy)
    while True:
        descriptor = os.open(_lock(copy), os.O_RDWR | os.O_CREAT, 0o600)
        # Whoever copies holds the lock alone. Nobody waits for that: who got it first keeps it while using the copy.
        with suppress(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_current(descriptor, copy) and not copy.is_dir():
                try:
                    _copy(folder, copy)
                except BaseException:
                    os.close(descriptor)
                    raise
        # Waits for one that copies. Changing the kind of a lock lets others in between, so all is looked at again.
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        if _is_current(descriptor, copy) and copy.is_dir():
            os.set_inheritable(descriptor, for_a_child)
            _used[copy] = descriptor
            return copy
        os.close(descriptor)


@contextmanager
def released_copies() -> Iterator[None]:
    """At its end this process uses no copy any more; one that nobody else uses is removed."""
    try:
        yield
    finally:
        while _used:
            copy, descriptor = _used.popitem()
            _remove(copy, descriptor)


def _lock(copy: Path) -> Path:
    return copy.with_name(copy.name + LOCK)


def _is_current(descriptor: int, copy: Path) -> bool:
    """Whether the lock's file is still the one that others would open."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(_lock(copy)))
    except FileNotFoundError:
        return False


def _remove(copy: Path, descriptor: int) -> None:
    """Of a copy that nobody uses; closes the descriptor."""
    with suppress(BlockingIOError):
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _is_current(descriptor, copy):
            for folder in (copy, copy.with_name(copy.name + PARTIAL)):
                shutil.rmtree(folder, ignore_errors=True)
            _lock(copy).unlink(missing_ok=True)
    os.close(descriptor)


def _remove_unused(wanted: Path) -> None:
    """Copies of processes that were killed."""
    for lock in SHARED_MEMORY.glob(f"{PREFIX}*{LOCK}"):
        copy = lock.with_name(lock.name.removesuffix(LOCK))
        if copy == wanted or copy in _used:
            continue
        with suppress(OSError):  # another user's, or removed meanwhile
            _remove(copy, os.open(lock, os.O_RDWR))


def _files(folder: Path) -> list[Path]:
    """What a model is loaded from: its safetensors, config and tokenizer."""
    others = tuple(ending for ending in WEIGHT_ENDINGS if ".safetensors" not in ending)
    paths = (path for path in folder.iterdir() if path.is_file() and not path.name.endswith(others))
    return sorted(path for path in paths if not path.name.startswith("."))


def _check_there() -> None:
    if not SHARED_MEMORY.is_dir():
        raise UserError(f"{KEY}, but this machine has no {SHARED_MEMORY}; set it to false")


def _check_room(folder: Path) -> None:
    _check_there()
    needed = sum(path.stat().st_size for path in _files(folder)) + SPARE_BYTES
    free = shutil.disk_usage(SHARED_MEMORY).free
    if free < needed:
        raise UserError(
            f"{KEY}: {folder} takes {needed / 1e9:.2f} GB of shared memory, and {SHARED_MEMORY} has "
            f"{free / 1e9:.2f} GB free; set it to false, or give the container more (docker: --shm-size)"
        )


def _copy(folder: Path, copy: Path) -> None:
    """Under a temporary name, then renamed; nothing is left of one that fails."""
    _check_room(folder)
    partial = copy.with_name(copy.name + PARTIAL)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(mode=0o700)
    try:
        for path in _files(folder):
            shutil.copyfile(path, partial / path.name)
        if fingerprint_base(partial) != fingerprint_base(folder):
            raise UserError(f"{folder} changed while it was copied to {SHARED_MEMORY}; start again")
        partial.rename(copy)
    except OSError as error:
        raise UserError(f"{KEY}: {folder} could not be copied to {copy} ({error.strerror or error})") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
