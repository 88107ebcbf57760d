"""Encode every row of a source, in this process or several, in order."""

import multiprocessing
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from transformers import PreTrainedTokenizerBase

from megatron_lora.data.notices import Note
from megatron_lora.data.sources import Source
from megatron_lora.data.tokenize import Encoder, EncodingOptions
from megatron_lora.data.values import RowError

CHUNK = 256  # rows that a worker process takes at a time
ROWS_WORTH_A_WORKER = 4096  # fewer take less time than starting a process

# A row with its number, or why it could not be read.
NumberedRow = tuple[int, Mapping[str, Any] | RowError]
# encode(encoder, row number, row) -> what to keep; picklable. What it does not honour it adds to encoder.notes.
EncodeRow = Callable[[Encoder, int, Mapping[str, Any]], Any]
# Row number, what is kept of it or why nothing is, and what of it is not honoured.
EncodedRow = tuple[int, Any, tuple[Note, ...]]

# A worker process builds its encoder once: tokenizers are slow to send.
_worker_encoder: Encoder | None = None


def encode_rows(
    source: Source, tokenizer: PreTrainedTokenizerBase, options: EncodingOptions, encode: EncodeRow, num_workers: int
) -> Iterator[EncodedRow]:
    """(row number, what `encode` returns or its RowError, notes) for every row, in the source's order."""
    if num_workers > 1 and len(source) >= ROWS_WORTH_A_WORKER:
        # spawn: the parent may hold process groups and CUDA, which do not survive a fork.
        context = multiprocessing.get_context("spawn")
        with context.Pool(num_workers, initializer=_start_worker, initargs=(tokenizer, options)) as pool:
            for chunk in pool.imap(partial(_encode_chunk, encode=encode), _chunks(source)):
                yield from chunk
    else:
        encoder = Encoder(tokenizer, options)
        for row in _rows(source):
            yield _encode_one(encoder, encode, row)


def _start_worker(tokenizer: PreTrainedTokenizerBase, options: EncodingOptions) -> None:
    global _worker_encoder
    _worker_encoder = Encoder(tokenizer, options)


def _encode_chunk(rows: Sequence[NumberedRow], encode: EncodeRow) -> list[EncodedRow]:
    assert _worker_encoder is not None
    return [_encode_one(_worker_encoder, encode, row) for row in rows]


def _encode_one(encoder: Encoder, encode: EncodeRow, numbered: NumberedRow) -> EncodedRow:
    number, row = numbered
    if isinstance(row, RowError):
        return number, row, ()
    encoder.notes.clear()
    try:
        return number, encode(encoder, number, row), tuple(encoder.notes)
    except RowError as error:  # a value: raising would lose the row's number on the way out of a worker
        return number, error, ()


def _rows(source: Source) -> Iterator[NumberedRow]:
    for position in range(len(source)):
        yield source[position]


def _chunks(source: Source) -> Iterator[list[NumberedRow]]:
    chunk = []
    for row in _rows(source):
        chunk.append(row)
        if len(chunk) == CHUNK:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
