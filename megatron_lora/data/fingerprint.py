"""Short names for what a run reads: prepared rows, and tokenizers. Another content has another name."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from megatron_lora.data.batch import Row
from megatron_lora.data.dataset import Prompt

DIGITS = 16
# So many names a data set at most: enough to say about where two sets begin to differ.
MAX_BLOCKS = 256


def fingerprint_rows(dataset: Any) -> list[str]:
    """One name for each block of consecutive items of a data set, as the run trains on them: token ids, which of them
    carry loss, and of prompts the reference answer and the row's other fields.

    dataset: groups of rows (SFT, DPO) or prompts (GRPO), by position.
    """
    size = block_size(len(dataset))
    names = []
    for start in range(0, len(dataset), size):
        digest = hashlib.sha256()
        for position in range(start, min(start + size, len(dataset))):
            for part in _content(dataset[position]):
                digest.update(part)
        names.append(digest.hexdigest()[:DIGITS])
    return names


def block_size(num_items: int) -> int:
    """Items a block of `fingerprint_rows`; the last may have fewer."""
    return max(1, -(-num_items // MAX_BLOCKS))


def first_difference(ours: Sequence[str], theirs: Sequence[str], num_items: int) -> tuple[int, int] | None:
    """(first, last) item, counted from 1, of the first block that differs between two sets of `num_items`; None where
    they are the same."""
    size = block_size(num_items)
    for number, (mine, other) in enumerate(zip(ours, theirs, strict=False)):
        if mine != other:
            return number * size + 1, min((number + 1) * size, num_items)
    return None if len(ours) == len(theirs) else (min(len(ours), len(theirs)) * size + 1, num_items)


def fingerprint_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """Of the vocabulary, how texts are cut, the special tokens and the chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    digest = hashlib.sha256(rules.encode())
    digest.update(json.dumps([tokenizer.chat_template, tokenizer.eos_token_id, tokenizer.bos_token_id]).encode())
    return digest.hexdigest()[:DIGITS]


def _content(item: Prompt | Sequence[Row]) -> Iterator[bytes]:
    if isinstance(item, Prompt):
        yield f"{item.input_ids.numel()}|".encode() + item.input_ids.numpy().tobytes()
        yield json.dumps([item.answer, item.extra], sort_keys=True, default=str).encode()
        return
    for row in item:
        yield f"{len(row)}|".encode() + row.input_ids.numpy().tobytes()
        yield row.target_mask.numpy().tobytes()
