"""A whole model as safetensors files, streamed, with the index that transformers wants."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from megatron_lora.conversion.safetensors_io import INDEX_FILE, SINGLE_FILE, read_header, write_tensors
from megatron_lora.conversion.weight_source import WeightSource

Description = tuple[torch.dtype, tuple[int, ...]]


def write_shards(
    out: Path,
    source: WeightSource,
    described: Mapping[str, Description],
    read: Callable[[str], Tensor],
    *,
    title: str,
    metadata: Mapping[str, str] | None = None,
    show_progress: bool = True,
) -> None:
    """Write every shard of `source` under its own name, each tensor when `read` gives it, and the index if there are
    several.

    described: what each tensor is. title: of the progress bar.
    """
    shards, total_bytes = source.shards, 0
    with progress_bar(show_progress) as progress:
        task = progress.add_task(title, total=len(described))
        for shard, names in shards.items():

            def stream(names: Sequence[str] = names) -> Iterator[tuple[str, Tensor]]:
                for name in names:
                    yield source.file_name(name), read(name)
                    progress.advance(task)

            header = _in_files(source, names, described)
            total_bytes += write_tensors(out / shard, header, stream(), metadata)
    if list(shards) != [SINGLE_FILE]:
        weight_map = {source.file_name(name): shard for shard, names in shards.items() for name in names}
        index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        (out / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")


def check_shards(out: Path, source: WeightSource, described: Mapping[str, Description]) -> None:
    """Names, dtypes and shapes of what lies in `out` are as described. Raises RuntimeError where they are not."""
    entries = [entry for shard in source.shards for entry in read_header(out / shard)[0].values()]
    found = {entry.name: (entry.dtype, entry.shape) for entry in entries}
    wanted = _in_files(source, described, described)
    if found != wanted:
        names = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
        raise RuntimeError(f"self-check failed: {names[:3]} were not written as they should have been")


def _in_files(
    source: WeightSource, names: Iterable[str], described: Mapping[str, Description]
) -> dict[str, Description]:
    """What the files hold of these tensors."""
    found = {}
    for name in names:
        file_name, (dtype, shape) = source.file_name(name), described[name]
        found[file_name] = dtype, source.packed.get(file_name, shape)
    return found


def progress_bar(show: bool) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, disable=not show, transient=False)
