"""Examples become token ids and a mask of the tokens that carry loss."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from megatron_lora.data.batch import Row
from megatron_lora.data.examples import ChatExample, Example, Message, PromptExample, RowError, TextExample
from megatron_lora.data.templates import ChatTemplate, Span
from megatron_lora.data.tokenizer import adds_bos
from megatron_lora.errors import UserError


@dataclass(frozen=True)
class EncodingOptions:
    """How examples are tokenized; names are the recipe's.

    add_bos: the tokenizer's own beginning-of-sequence token, where it puts one and the text has none yet. add_eos:
    the end-of-sequence token after the last answer, where the template did not put it. only_unmask_final: loss on the
    last assistant message alone.
    """

    add_bos: bool = True
    add_eos: bool = True
    only_unmask_final: bool = False
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Encoded:
    """A tokenized row, compact: ids [S] int32, mask [S] bool (True: carries loss), index as in `Row`."""

    ids: np.ndarray
    mask: np.ndarray
    index: int

    def __len__(self) -> int:
        return len(self.ids)

    def truncated(self, max_length: int) -> "Encoded":
        return Encoded(self.ids[:max_length], self.mask[:max_length], self.index)

    def same_tokens(self, other: "Encoded") -> bool:
        return np.array_equal(self.ids, other.ids)

    def to_row(self) -> Row:
        return Row(torch.from_numpy(self.ids.astype(np.int64)), torch.from_numpy(self.mask.copy()), self.index)


class Encoder:
    """Tokenizes examples with one tokenizer and one set of options."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, options: EncodingOptions):
        if not tokenizer.is_fast:
            raise UserError(
                f"policy.tokenizer.name={tokenizer.name_or_path}: {type(tokenizer).__name__} cannot say where its "
                "tokens stand in a text; wanted a fast tokenizer (one with tokenizer.json)"
            )
        self.tokenizer = tokenizer
        self.options = options
        self.template = ChatTemplate(tokenizer, options.chat_template_kwargs)
        self._bos = tokenizer.bos_token_id if options.add_bos and adds_bos(tokenizer) else None
        self._eos = tokenizer.eos_token_id

    def encode(self, example: Example, index: int, only_final: bool | None = None) -> Encoded:
        """Raises RowError where the template refuses a conversation or an answer cannot be found in it."""
        if isinstance(example, TextExample):
            ids, mask = self._encode_text(example)
        else:
            final = self.options.only_unmask_final if only_final is None else only_final
            ids, mask = self._encode_chat(example, final)
        if self._bos is not None and ids[:1] != [self._bos]:
            ids, mask = [self._bos, *ids], [False, *mask]
        mask[0] = False  # nothing predicts the first token
        return Encoded(np.array(ids, dtype=np.int32), np.array(mask, dtype=np.bool_), index)

    def encode_prompt(self, example: PromptExample) -> tuple[list[int], str]:
        """Token ids and text of what generation starts from."""
        if isinstance(example.prompt, str):
            text = example.prompt
        else:
            text = self.template.render(example.prompt, add_generation_prompt=True)
        ids = self._tokenize(text)
        if self._bos is not None and ids[:1] != [self._bos]:
            ids = [self._bos, *ids]
        return ids, text

    def _tokenize(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def _encode_text(self, example: TextExample) -> tuple[list[int], list[bool]]:
        prompt, answer = self._tokenize(example.prompt), self._tokenize(example.answer)
        if self.options.add_eos and answer[-1:] != [self._eos]:
            answer = [*answer, self._eos]
        return prompt + answer, [False] * len(prompt) + [True] * len(answer)

    def _encode_chat(self, example: ChatExample, only_final: bool) -> tuple[list[int], list[bool]]:
        if self.template.marks_answers:
            ids, mask = self._marked_tokens(example.messages, only_final)
        else:
            ids, mask = self._found_tokens(example.messages, only_final)
        if not any(mask):
            raise RowError("the chat template renders no answer, so nothing carries loss")
        last = len(mask) - 1 - mask[::-1].index(True)
        if self.options.add_eos and example.messages[-1]["role"] == "assistant" and self._eos not in ids[last:]:
            # Generation stops at EOS alone: it must follow the answer (or its end-of-turn token) at once.
            ids, mask = [*ids[: last + 1], self._eos], [*mask[: last + 1], True]
        return ids, mask

    def _found_tokens(self, messages: list[Message], only_final: bool) -> tuple[list[int], list[bool]]:
        text = self.template.render(messages)
        spans = self.template.answer_spans(messages, text, only_final)
        encoding = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return encoding["input_ids"], _tokens_in_spans(encoding["offset_mapping"], spans)

    def _marked_tokens(self, messages: list[Message], only_final: bool) -> tuple[list[int], list[bool]]:
        """Answers as the template marks them, up to the special token that closes each.

        Some templates mark that token, or a line break after it as well, others neither; the loss is the same.
        """
        ids, marks = self.template.marked_tokens(messages)
        special = set(self.tokenizer.all_special_ids)
        special |= {number for number, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        runs = [self._closed_run(ids, special, start, end) for start, end in _runs(marks)]
        # A token right after the mark closes the turn if it is there after the last one too; otherwise it opens a turn.
        if runs and runs[-1][1] < len(ids):
            closing = ids[runs[-1][1]]
            runs = [
                (start, end + 1 if closing in special and ids[end] == closing and ids[end - 1] not in special else end)
                for start, end in runs
            ]
        mask = [False] * len(ids)
        for start, end in runs[-1:] if only_final else runs:
            mask[start:end] = [True] * (end - start)
        return ids, mask

    def _closed_run(self, ids: list[int], special: set[int], start: int, end: int) -> tuple[int, int]:
        """Cut whitespace off the end of a run where it follows a special token."""
        last = end - 1
        while last > start and ids[last] not in special and not str(self.tokenizer.decode([ids[last]])).strip():
            last -= 1
        return start, last + 1 if ids[last] in special else end


def _runs(marks: list[int]) -> list[tuple[int, int]]:
    """[start, end) of each run of nonzero marks."""
    edges = [i for i in range(len(marks) + 1) if bool(i and marks[i - 1]) != bool(i < len(marks) and marks[i])]
    return list(zip(edges[::2], edges[1::2], strict=True))


def _tokens_in_spans(offsets: list[tuple[int, int]], spans: list[Span]) -> list[bool]:
    """True for each token that shares a character with a span.

    A token of whitespace alone may have an empty range at its end (byte-level tokenizers trim it): it belongs to the
    span that it ends in.
    """
    mask = []
    number = 0
    for start, end in offsets:
        while number < len(spans) and spans[number].end <= start and not start == end == spans[number].end:
            number += 1
        if number == len(spans):
            mask.append(False)
            continue
        span = spans[number]
        if start == end:
            mask.append(span.start < end <= span.end)
        else:
            mask.append(start < span.end and end > span.start)
    return mask
