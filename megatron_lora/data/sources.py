"""Raw rows: JSONL files, the built-in data sets and the hub, one shape for all."""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from megatron_lora.data.arithmetic import arithmetic_rows
from megatron_lora.data.files import COMPRESSIONS, FILE_KINDS, read_rows
from megatron_lora.data.forms import Keys
from megatron_lora.data.hub import HUB_DATASETS, HubDataset, load_hub_rows
from megatron_lora.data.values import RowError
from megatron_lora.errors import UserError

# NeMo RL's classes, which read the file (or hub data set) that data_path names.
FILE_DATASETS = ("ResponseDataset", "PreferenceDataset", "BinaryPreferenceDataset", "openai_format")
GSM8K_VARIABLE = "MEGATRON_LORA_GSM8K"


@dataclass(frozen=True)
class SourceSpec:
    """One `data.train` or `data.validation` block; field names are the recipe's keys."""

    dataset_name: str | None = None
    data_path: str | None = None
    split: str | None = None
    subset: str | None = None
    input_key: str | None = None
    output_key: str | None = None
    chosen_key: str | None = None
    rejected_key: str | None = None
    prompt_key: str | None = None
    chat_key: str | None = None
    system_key: str | None = None
    tool_key: str | None = None
    form: str | None = None

    @property
    def keys(self) -> Keys:
        reader = self.dataset_name if self.dataset_name in FILE_DATASETS else None
        return Keys(
            input_key=self.input_key or self.prompt_key,
            output_key=self.output_key,
            chosen_key=self.chosen_key,
            rejected_key=self.rejected_key,
            chat_key=self.chat_key,
            system_key=self.system_key,
            tool_key=self.tool_key,
            form=self.form,
            reader=reader,
        )


@dataclass(frozen=True)
class Source:
    """Rows of one data set, by position.

    name: the file or data set, for messages. sft_keys, prompt_keys: the fields to read in training on answers and in
    GRPO. strict: one bad row is an error (the user's own file); otherwise it is dropped and counted. order: positions
    in `rows`, where only some of them belong to this source. notices: keys of its block that are not honoured.
    """

    name: str
    rows: Sequence[Mapping[str, Any]]
    sft_keys: Keys = Keys()
    prompt_keys: Keys = Keys()
    strict: bool = False
    adapt: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None
    order: Sequence[int] | None = field(default=None, repr=False)
    notices: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.rows) if self.order is None else len(self.order)

    def __getitem__(self, position: int) -> tuple[int, Mapping[str, Any] | RowError]:
        """(row number counted from 1 in the whole data set, the row or why it cannot be used)."""
        position = position if self.order is None else self.order[position]
        row = self.rows[position]
        try:
            return position + 1, row if self.adapt is None else self.adapt(row)
        except (KeyError, IndexError, TypeError) as error:
            return position + 1, RowError(f"the data set's own fields are not as expected: {error!r}")

    def select(self, positions: Sequence[int]) -> "Source":
        """The rows at `positions`, in that order, with their numbers kept."""
        order = list(positions) if self.order is None else [self.order[position] for position in positions]
        return replace(self, order=order)


def load_source(spec: SourceSpec, where: str = "data.train") -> Source:
    """Load the rows of one data block; `where` names it in messages.

    `data_path`, if given, is a file of rows and wins over `dataset_name` (a folder with train.jsonl and test.jsonl for
    gsm8k; a folder that `datasets` reads; under NeMo RL's class names also a hub name). Raises UserError: nothing
    named, an unknown split, a file that cannot be read, a line that is no JSON object or is empty (with its number), an
    empty data set, a hub data set that cannot be loaded.
    """
    if spec.dataset_name is None and spec.data_path is None:
        raise UserError(f"{where} names no data; set {where}.dataset_name or {where}.data_path (a file of rows)")
    if spec.dataset_name == "GSM8K":  # NeMo RL has both
        spec = replace(spec, dataset_name="gsm8k")
    if spec.dataset_name == "gsm8k":
        source = _load_gsm8k(spec, where)
    elif spec.data_path is not None:
        source = _load_path(spec.data_path, spec, where)
    elif spec.dataset_name in FILE_DATASETS:
        raise UserError(f"{where}.dataset_name={spec.dataset_name} reads a file; set {where}.data_path to it")
    elif spec.dataset_name == "arithmetic":
        source = _load_arithmetic(spec, where)
    else:
        source = _load_hub(str(spec.dataset_name), spec)
    if len(source) == 0:
        raise UserError(f"{where}: {source.name} holds no rows; at least one is needed")
    return source


def draw(source: Source, count: int, seed: int) -> Source:
    """`count` rows drawn at random with `seed`, in their order; the source itself where it has no more."""
    if len(source) <= count:
        return source
    return source.select(sorted(_shuffled(len(source), seed)[:count]))


def _shuffled(count: int, seed: int) -> list[int]:
    import torch

    return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()


def hold_out(source: Source, size: float, seed: int, where: str = "data.train") -> tuple[Source, Source]:
    """(the rest in its order, rows cut off at random with `seed`).

    size: `split_validation_size`, a share below 1 or a number of rows. Raises UserError where a side would be empty.
    """
    count = round(len(source) * size) if size < 1 else int(size)
    if not 0 < count < len(source):
        raise UserError(
            f"{where}.split_validation_size={size} takes {count} of {source.name}'s {len(source)} "
            f"rows; it must leave at least one row on both sides"
        )
    shuffled = _shuffled(len(source), seed)
    return source.select(sorted(shuffled[count:])), source.select(sorted(shuffled[:count]))


def _load_path(name: str, spec: SourceSpec, where: str) -> Source:
    path = Path(name).expanduser()
    is_hub_name = spec.dataset_name in FILE_DATASETS and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name)
    if path.is_dir() or (is_hub_name and not path.exists() and not name.endswith((*FILE_KINDS, *COMPRESSIONS))):
        return _load_hub(str(path) if path.is_dir() else name, spec)
    return _load_file(path, spec, where)


def _load_file(path: Path, spec: SourceSpec, where: str) -> Source:
    rows = read_rows(path, f"{where}.data_path")
    keys = [key for key in ("split", "subset") if getattr(spec, key) not in (None, "train")]
    unread = tuple(f"{where}.{key}={getattr(spec, key)} is not read: {where}.data_path is one file" for key in keys)
    notices = () if spec.dataset_name == "gsm8k" else unread
    return Source(str(path), rows, sft_keys=spec.keys, prompt_keys=spec.keys, strict=True, notices=notices)


def _load_arithmetic(spec: SourceSpec, where: str) -> Source:
    try:
        rows = arithmetic_rows(spec.split or "train")
    except ValueError as error:
        raise UserError(f"{where}.split={spec.split}: arithmetic has the splits train and validation") from error
    named = (spec.input_key or "prompt", spec.output_key or "completion")
    # A row is in two forms at once; the recipe's keys, or plain text, say which is meant.
    kept = [{name: value for name, value in row.items() if name in named} for row in rows]
    return Source("arithmetic", kept, sft_keys=spec.keys, prompt_keys=spec.keys, strict=True)


def _load_gsm8k(spec: SourceSpec, where: str) -> Source:
    """A local copy (data_path or the environment variable names its folder, or one file), otherwise the hub's."""
    split = {"validation": "test", None: "train"}.get(spec.split, spec.split)
    local = spec.data_path or os.environ.get(GSM8K_VARIABLE)
    if local is None:
        return _load_hub("gsm8k", replace(spec, split=split))
    path = Path(local).expanduser()
    if path.is_dir():
        path = path / f"{split}.jsonl"
    return _load_file(path, spec, where)


def _load_hub(name: str, spec: SourceSpec) -> Source:
    entry = HUB_DATASETS.get(name, HubDataset(name))
    if spec.subset is not None:
        entry = replace(entry, subset=spec.subset)
    named = spec.keys.names_columns
    return Source(
        f"{name} ({spec.split or entry.train_split})",
        load_hub_rows(entry, spec.split),
        sft_keys=spec.keys if named or name not in HUB_DATASETS else entry.sft_keys,
        prompt_keys=spec.keys if named or name not in HUB_DATASETS else entry.prompt_keys,
        adapt=None if named else entry.adapt,
    )
