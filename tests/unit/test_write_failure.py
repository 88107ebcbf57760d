"""What is said where the run's folder cannot be written."""

import errno
from pathlib import Path

import pytest
from torch.distributed.checkpoint import CheckpointException

from megatron_lora.trainers.write_failure import describe_failure, folder_bytes, show_bytes, system_error


def full() -> OSError:
    return OSError(errno.ENOSPC, "No space left on device", "shard")


def chained() -> BaseException:
    """As torch's archive writer fails: of its own position, while the disk was full."""
    try:
        try:
            raise full()
        except OSError:
            raise RuntimeError("unexpected pos 64 vs 0")  # noqa: B904 (as torch does)
    except RuntimeError as error:
        return error


@pytest.mark.parametrize(
    "error", [full(), chained(), CheckpointException("write", {1: (chained(), None)})], ids=["bare", "context", "ranks"]
)
def test_the_systems_error_is_found_behind_others(error: BaseException, tmp_path: Path):
    found = system_error(error)
    assert found is not None and found.errno == errno.ENOSPC
    text = describe_failure(error, tmp_path, 3 * 2**30)
    assert text.startswith("No space left on device: a checkpoint takes about 3.0 GiB, ") and text.endswith(
        "free there"
    )


def test_other_failures_are_told_without_room(tmp_path: Path):
    assert describe_failure(OSError(errno.EROFS, "Read-only file system"), tmp_path) == "Read-only file system"
    lost = CheckpointException("write", {1: (RuntimeError("unexpected pos"), None)})
    assert describe_failure(lost, tmp_path / "not there").startswith("unexpected pos: ")
    # The system's error did not come along, but a checkpoint is larger than what is free.
    assert describe_failure(lost, tmp_path, 2**60).startswith(
        "No space left on device: a checkpoint takes about 1073741824"
    )
    assert describe_failure(OSError(errno.EFBIG, "x"), tmp_path, 5).endswith(
        "a limit of this user or process stands below that"
    )


def test_sizes(tmp_path: Path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b").write_bytes(bytes(2048))
    assert folder_bytes(tmp_path) == 2048
    assert [show_bytes(n) for n in (5, 2048, 3 * 2**20, 2**40)] == ["5 bytes", "2.0 KiB", "3.0 MiB", "1024.0 GiB"]
