"""Checksums of a folder's files, kept in a file beside them: what was written is what is read.

They find what a disk, a copy or an editor changed; they are no protection against somebody who means harm. XXH3 reads
at about 9 GB/s on one core, so the disk is the limit; files are shared out over threads, and by the caller over ranks.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import xxhash

from megatron_lora.errors import UserError

CHECKSUMS = "checksums.json"
ALGORITHM = "xxh3_128"
CHUNK_BYTES = 1 << 22
MAX_THREADS = 4


def list_files(folder: Path) -> list[str]:
    """Paths of all files below a folder, relative to it, the largest first; without the checksums' own."""
    sizes = {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    sizes.pop(CHECKSUMS, None)
    return sorted(sizes, key=lambda name: (-sizes[name], name))


def compute_checksums(folder: Path, names: Sequence[str]) -> dict[str, str]:
    """name -> checksum of the file's content, or "" where it cannot be read."""
    with ThreadPoolExecutor(MAX_THREADS) as pool:
        return dict(zip(names, pool.map(lambda name: _checksum(folder / name), names), strict=True))


def _checksum(path: Path) -> str:
    digest = xxhash.xxh3_128()
    try:
        with path.open("rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                digest.update(chunk)
    except OSError:
        return ""
    return digest.hexdigest()


def write_checksums(folder: Path, checksums: Mapping[str, str]) -> None:
    content = {"algorithm": ALGORITHM, "files": dict(sorted(checksums.items()))}
    (folder / CHECKSUMS).write_text(json.dumps(content, indent=2) + "\n")


def seal(folder: Path) -> None:
    """Write the checksums of everything that the folder holds."""
    write_checksums(folder, compute_checksums(folder, list_files(folder)))


def read_checksums(folder: Path) -> dict[str, str] | None:
    """What `write_checksums` wrote; None where there is no such file, as in checkpoints of older releases. Raises
    UserError where it is damaged."""
    path = folder / CHECKSUMS
    try:
        content = json.loads(path.read_text())
        if content["algorithm"] != ALGORITHM:
            raise UserError(
                f"{path} has checksums of the kind {content['algorithm']!r}, this release reads {ALGORITHM}"
            )
        return {str(name): str(value) for name, value in content["files"].items()}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is damaged ({type(error).__name__}: {error})") from error


def find_changed(folder: Path, checksums: Mapping[str, str], names: Iterable[str]) -> dict[str, str]:
    """name -> what is wrong, for those of the files that are not as they were written."""
    present = [name for name in names if (folder / name).is_file()]
    problems = {name: "is missing" for name in names if name not in present}
    found = compute_checksums(folder, present)
    for name in present:
        if found[name] != checksums[name]:
            problems[name] = "has another content than was written (checksum)" if found[name] else "cannot be read"
    return problems


def check_as_written(folder: Path) -> None:
    """Check a folder that a checkpoint's checksums cover: theirs lie in it, or up to two folders above it.

    Does nothing where there are none. Raises UserError naming the files that changed since they were written.
    """
    for top in (folder, *folder.absolute().parents[:2]):
        checksums = read_checksums(top)
        if checksums is None:
            continue
        inside = [name for name in checksums if (top / name).absolute().is_relative_to(folder.absolute())]
        problems = find_changed(top, checksums, inside)
        if problems:
            raise UserError(
                f"{top} is not as it was written: {describe_changed(problems)}; restore it from a "
                "copy or use another checkpoint (what was edited on purpose is read from a copy of the folder "
                "elsewhere)"
            )
        return


def describe_changed(problems: Mapping[str, str], limit: int = 3) -> str:
    """One line for `find_changed`'s answer."""
    shown = [f"{name} {problem}" for name, problem in sorted(problems.items())[:limit]]
    return ", ".join(shown) + (f" and {len(problems) - limit} more" if len(problems) > limit else "")
