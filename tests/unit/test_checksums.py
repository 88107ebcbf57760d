"""A changed byte anywhere below a folder with checksums is found and named."""

from pathlib import Path

import pytest

from megatron_lora.checksums import (
    CHECKSUMS,
    check_as_written,
    compute_checksums,
    describe_changed,
    find_changed,
    list_files,
    read_checksums,
    seal,
)
from megatron_lora.errors import UserError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, size in (("policy/weights/a", 5_000_000), ("policy/weights/b", 10), ("hf_adapter/c", 0)):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(bytes(range(250)) * (size // 250) + b"x" * (size % 250))
    seal(tmp_path)
    return tmp_path


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def test_what_was_written_is_as_it_was(folder: Path):
    assert list_files(folder) == ["policy/weights/a", "policy/weights/b", "hf_adapter/c"]
    checksums = read_checksums(folder)
    assert checksums == compute_checksums(folder, list_files(folder)) and len(set(checksums.values())) == 3
    assert find_changed(folder, checksums, checksums) == {}
    for part in ("", "policy", "policy/weights", "hf_adapter"):
        check_as_written(folder / part)


@pytest.mark.parametrize("position", [0, 4_199_999, 4_999_999])
def test_one_bit_is_found_from_every_folder_that_holds_the_file(folder: Path, position: int):
    flip(folder / "policy/weights/a", position)
    for part in ("", "policy", "policy/weights"):
        with pytest.raises(UserError, match="policy/weights/a has another content than was written"):
            check_as_written(folder / part)
    check_as_written(folder / "hf_adapter")


def test_a_missing_file_and_many_changes_are_named(folder: Path):
    (folder / "hf_adapter" / "c").unlink()
    with pytest.raises(UserError, match="hf_adapter/c is missing"):
        check_as_written(folder / "hf_adapter")
    assert describe_changed({name: "is missing" for name in "abcde"}) == (
        "a is missing, b is missing, c is missing and 2 more"
    )


def test_folders_without_checksums_are_taken_as_they_are(tmp_path: Path):
    assert read_checksums(tmp_path) is None
    check_as_written(tmp_path)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"algorithm": "xxh3_128", "files": 3}', '{"algorithm": "md5"}'])
def test_damaged_checksums_are_refused(tmp_path: Path, content: str):
    (tmp_path / CHECKSUMS).write_text(content)
    with pytest.raises(UserError, match=r"checksums\.json (is damaged|has checksums of the kind 'md5')"):
        read_checksums(tmp_path)
