"""Tokenized data sets: groups of rows for SFT and DPO, prompts for GRPO."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from rich.progress import track
from transformers import PreTrainedTokenizerBase

from megatron_lora.data.examples import Instructions
from megatron_lora.data.forms import Keys
from megatron_lora.data.parse import RowReader
from megatron_lora.data.sources import Source
from megatron_lora.data.stats import LengthStats, joined_stats
from megatron_lora.data.tokenize import Encoded, Encoder, EncodingOptions
from megatron_lora.data.values import RowError
from megatron_lora.data.workers import EncodeRow, encode_rows
from megatron_lora.errors import UserError

if TYPE_CHECKING:  # as in `tokenize`
    from torch import Tensor

    from megatron_lora.data.batch import Row


@dataclass(frozen=True)
class Prompt:
    """What GRPO samples answers for.

    input_ids: [S] int64. text: the same as text. answer: the reference answer ("" if the row has none). index: the
    row's number, counted from 1. extra: the row's other fields, for reward functions. no_reference: why there is no
    reference answer, "" where there is one (`references.rows_without_reference` says which rows lack one).
    """

    input_ids: "Tensor"
    text: str
    answer: str
    index: int
    extra: dict[str, Any] = field(default_factory=dict)
    no_reference: str = ""


class TokenizedDataset(Sequence["list[Row]"]):
    """Groups of rows that stay in one micro-batch: [row] for SFT, [chosen, rejected] for DPO."""

    def __init__(self, groups: Sequence[Sequence[Encoded]], stats: LengthStats):
        self._groups = groups
        self.stats = stats

    def __len__(self) -> int:
        return len(self._groups)

    def __getitem__(self, position):  # type: ignore[override]  # no slices
        return [encoded.to_row() for encoded in self._groups[position]]

    @property
    def items(self) -> Sequence[Sequence[Encoded]]:
        return self._groups

    def encoded(self, position: int) -> Sequence[Encoded]:
        """A group as token ids and masks, without making its tensors."""
        return self._groups[position]

    def with_targets(self) -> "TokenizedDataset":
        """Without the groups that carry no loss."""
        return TokenizedDataset([group for group in self._groups if any(row.mask.any() for row in group)], self.stats)

    def first_id_from(self, limit: int) -> tuple[int, int] | None:
        """(row number, token id) of the first token whose id is `limit` or above; None where there is none."""
        for encoded in (encoded for group in self._groups for encoded in group):
            beyond = encoded.ids[encoded.ids >= limit]
            if beyond.size:
                return encoded.index, int(beyond[0])
        return None

    def group_lengths(self) -> list[int]:
        """Tokens of each group, without making its tensors."""
        return [sum(map(len, group)) for group in self._groups]


class PromptDataset(Sequence[Prompt]):
    """GRPO's prompts, in the data set's order."""

    def __init__(self, prompts: Sequence[Prompt], stats: LengthStats):
        self._prompts = prompts
        self.stats = stats

    def __len__(self) -> int:
        return len(self._prompts)

    def __getitem__(self, position):  # type: ignore[override]  # no slices
        return self._prompts[position]

    @property
    def items(self) -> Sequence[Prompt]:
        return self._prompts

    def first_id_from(self, limit: int) -> tuple[int, int] | None:
        """As `TokenizedDataset.first_id_from`."""
        for prompt in self._prompts:
            beyond = prompt.input_ids[prompt.input_ids >= limit]
            if beyond.numel():
                return prompt.index, int(beyond[0])
        return None


def join(parts: Sequence[tuple[Any, int]]) -> Any:
    """One data set of several of a kind, each so many times over, in their order; None of none."""
    if len(parts) == 1 and parts[0][1] == 1:
        return parts[0][0]
    if not parts:
        return None
    items = [item for dataset, times in parts for _ in range(times) for item in dataset.items]
    return type(parts[0][0])(items, joined_stats([dataset.stats for dataset, _ in parts]))


@dataclass(frozen=True)
class Preparation:
    """How a data set is prepared; the same for all algorithms.

    max_length: limit in tokens. num_workers: processes that tokenize (used where there are rows enough).
    show_progress: a progress bar, on one rank.
    """

    max_length: int
    options: EncodingOptions = EncodingOptions()
    instructions: Instructions = Instructions()
    num_workers: int = 1
    show_progress: bool = False


def build_sft_dataset(source: Source, tokenizer: PreTrainedTokenizerBase, preparation: Preparation) -> TokenizedDataset:
    """Tokenize rows for training on answers.

    Rows over `max_length` are cut at the end; one that keeps no target token is dropped. Raises UserError for a row
    that cannot be used (with file and number; hub rows are dropped and counted), where every row is over the limit,
    where none is left, and where none of those left carries loss.
    """
    stats = LengthStats(preparation.max_length)
    encode = partial(_encode_sft, keys=source.sft_keys, instructions=preparation.instructions)
    groups = []
    for number, [encoded] in _encode_all(source, tokenizer, preparation, encode, stats):
        stats.lengths.append(len(encoded))
        untrained = not encoded.mask.any()
        if len(encoded) > preparation.max_length:
            encoded = encoded.truncated(preparation.max_length)
            if not encoded.mask.any():
                stats.dropped_long += 1
                stats.drops[number] = f"no token that carries loss is left within {preparation.max_length} tokens"
                continue
            stats.truncated += 1
        stats.untrained += untrained
        stats.target_tokens += int(encoded.mask.sum())
        groups.append([encoded])
    if stats.lengths and stats.min > preparation.max_length:
        raise _all_too_long(source, stats, "row")
    kept = _checked(groups, source, stats)
    if not stats.target_tokens:
        raise UserError(
            f"{source.name}: none of its rows carries loss, as they say themselves; there is nothing to train"
        )
    return TokenizedDataset(kept, stats)


def build_preference_dataset(
    source: Source, tokenizer: PreTrainedTokenizerBase, preparation: Preparation
) -> TokenizedDataset:
    """Tokenize pairs [chosen, rejected]; loss on the last answer of each.

    A pair with a sequence over `max_length`, or with both answers equal, is dropped and counted. Raises UserError for
    a row that cannot be used (chosen or rejected missing), and where no pair is left.
    """
    stats = LengthStats(preparation.max_length)
    encode = partial(_encode_preference, keys=source.sft_keys, instructions=preparation.instructions)
    groups = []
    for number, pair in _encode_all(source, tokenizer, preparation, encode, stats):
        stats.lengths.extend(map(len, pair))
        if pair[0].same_tokens(pair[1]):
            stats.dropped_equal += 1
            stats.drops[number] = "both answers are equal"
        elif max(map(len, pair)) > preparation.max_length:
            stats.dropped_long += 1
            stats.drops[number] = f"an answer with its prompt is longer than {preparation.max_length} tokens"
        else:
            stats.target_tokens += sum(int(encoded.mask.sum()) for encoded in pair)
            groups.append(pair)
    if not groups and stats.dropped_long and stats.dropped_long == stats.rows:
        raise _all_too_long(source, stats, "pair")
    return TokenizedDataset(_checked(groups, source, stats), stats)


def build_prompt_dataset(source: Source, tokenizer: PreTrainedTokenizerBase, preparation: Preparation) -> PromptDataset:
    """Tokenize GRPO's prompts, ready for generation; those over `max_length` are dropped and counted.

    Raises UserError for a row that cannot be used and where every prompt is over the limit.
    """
    stats = LengthStats(preparation.max_length, unit="prompt")
    encode = partial(_encode_prompt, keys=source.prompt_keys, instructions=preparation.instructions)
    prompts = []
    for number, prompt in _encode_all(source, tokenizer, preparation, encode, stats):
        stats.lengths.append(prompt.input_ids.numel())
        if prompt.input_ids.numel() > preparation.max_length:
            stats.dropped_long += 1
            stats.drops[number] = f"the prompt is longer than {preparation.max_length} tokens"
        else:
            prompts.append(prompt)
    if not prompts and stats.dropped_long:
        raise _all_too_long(source, stats, "prompt")
    return PromptDataset(_checked(prompts, source, stats), stats)


def _encode_sft(
    encoder: Encoder, number: int, row: Mapping[str, Any], keys: Keys, instructions: Instructions
) -> list[Encoded]:
    return [encoder.encode(RowReader(keys, instructions, encoder.notes).read_sft(row), number)]


def _encode_preference(
    encoder: Encoder, number: int, row: Mapping[str, Any], keys: Keys, instructions: Instructions
) -> list[Encoded]:
    pair = RowReader(keys, instructions, encoder.notes).read_preference(row)
    return [encoder.encode(example, number) for example in pair]


def _encode_prompt(
    encoder: Encoder, number: int, row: Mapping[str, Any], keys: Keys, instructions: Instructions
) -> Prompt:
    import torch

    example = RowReader(keys, instructions, encoder.notes).read_prompt(row)
    ids, text = encoder.encode_prompt(example)
    tokens = torch.tensor(ids, dtype=torch.int64)
    return Prompt(tokens, text, example.answer, number, example.extra, example.no_reference)


def _encode_all(
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    preparation: Preparation,
    encode: EncodeRow,
    stats: LengthStats,
) -> Iterator[tuple[int, Any]]:
    """(number, encoded row) of every row in order; one that cannot be used ends the run in the user's own file, else it
    is counted."""
    results = encode_rows(source, tokenizer, preparation.options, encode, preparation.num_workers)
    reason = ""
    for number, result, notes in track(
        results,
        description=f"Tokenizing {source.name}",
        total=len(source),
        transient=True,
        disable=not (preparation.show_progress and sys.stdout.isatty()),
    ):
        stats.rows += 1
        if not isinstance(result, RowError):
            stats.notices.add(number, notes)
            yield number, result
        elif source.strict:
            raise UserError(f"{source.name}, row {number}: {result}")
        else:
            reason = str(result)
            stats.dropped_bad += 1
            stats.drops[number] = reason
    if stats.dropped_bad == stats.rows:
        raise UserError(f"{source.name}: none of its {stats.rows} rows can be used; the last one: {reason}")


def _all_too_long(source: Source, stats: LengthStats, noun: str) -> UserError:
    return UserError(
        f"{source.name}: every {noun} is longer than the limit of {stats.max_length} tokens (the shortest sequence has "
        f"{stats.min}, the longest {stats.max}); raise policy.max_total_sequence_length and data.max_input_seq_length"
    )


def _checked[T](kept: list[T], source: Source, stats: LengthStats) -> list[T]:
    stats.kept = len(kept)
    if not kept:
        raise UserError(f"{source.name}: no row is left to train on: {stats.describe()}")
    return kept
