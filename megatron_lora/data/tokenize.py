"""Examples become token ids and a mask of the tokens that carry loss."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from megatron_lora.data.answer_spans import AnswerFinder, Span
from megatron_lora.data.examples import ChatExample, Example, PromptExample, TextExample
from megatron_lora.data.messages import Message
from megatron_lora.data.notices import Kind, Note
from megatron_lora.data.rendering_check import RenderingCheck
from megatron_lora.data.templates import ChatTemplate, Rendering
from megatron_lora.data.tokenizer import adds_bos, special_ids
from megatron_lora.data.values import RowError
from megatron_lora.errors import UserError

if TYPE_CHECKING:  # data.show does without the seconds that importing torch takes
    from megatron_lora.data.batch import Row


@dataclass(frozen=True)
class EncodingOptions:
    """How examples are tokenized; names are the recipe's.

    add_bos: the tokenizer's own beginning-of-sequence token, where it puts one and the text has none yet. add_eos:
    the end-of-sequence token after the last answer, where none of `end_token_ids` ends it yet. end_token_ids: further
    tokens that generation stops at; only special ones count. only_unmask_final: loss on the last assistant message
    alone.
    """

    add_bos: bool = True
    add_eos: bool = True
    end_token_ids: tuple[int, ...] = ()
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

    def to_row(self) -> "Row":
        import torch

        from megatron_lora.data.batch import Row

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
        self._check = RenderingCheck(self.template)
        self._bos = tokenizer.bos_token_id if options.add_bos and adds_bos(tokenizer) else None
        self._eos: int = tokenizer.eos_token_id  # type: ignore[assignment]  # one token, `load_tokenizer` saw to it
        self._special = special_ids(tokenizer)
        self._ends = frozenset({self._eos, *(self._special & set(options.end_token_ids))})
        self._end_texts = tuple(str(text) for text in tokenizer.convert_ids_to_tokens(sorted(self._ends)) if text)
        self.notes: list[Note] = []  # of the rows encoded since somebody took them

    def encode(self, example: Example, index: int) -> Encoded:
        """Raises RowError where the template refuses or leaves out a message, or an answer cannot be found."""
        if isinstance(example, TextExample):
            ids, mask = self._encode_text(example)
        else:
            ids, mask = self._encode_chat(example)
        if self._bos is not None and ids[:1] != [self._bos]:
            ids, mask = [self._bos, *ids], [False, *mask]
        trained = any(mask)
        mask[0] = False  # nothing predicts the first token
        if trained and not any(mask):
            raise RowError("the text is one token, and nothing stands before it to predict it from")
        return Encoded(np.array(ids, dtype=np.int32), np.array(mask, dtype=np.bool_), index)

    def encode_prompt(self, example: PromptExample) -> tuple[list[int], str]:
        """Token ids and text of what generation starts from. A prompt that ends with an assistant message is gone on
        with. Raises RowError as `encode` does."""
        if isinstance(example.prompt, str):
            text = example.prompt
        else:
            rendering = self.template.bind(example.tools, example.template_kwargs)
            text = rendering.render_prompt(example.prompt)
            self.notes += self._check.check(rendering, example.prompt, text)
        ids = self._tokenize(text)
        if self._bos is not None and ids[:1] != [self._bos]:
            ids = [self._bos, *ids]
        return ids, text

    def _tokenize(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def _encode_text(self, example: TextExample) -> tuple[list[int], list[bool]]:
        prompt, answer = self._tokenize(example.prompt), self._tokenize(self._without_blanks_after_end(example.answer))
        if self.options.add_eos and not self._ends & set(answer[-1:]):
            answer = [*answer, self._eos]
        return prompt + answer, [False] * len(prompt) + [example.trained] * len(answer)

    def _without_blanks_after_end(self, answer: str) -> str:
        """An answer that ends with an end token of its own, and blanks, ends there."""
        stripped = answer.rstrip()
        return stripped if stripped.endswith(self._end_texts) else answer

    def _encode_chat(self, example: ChatExample) -> tuple[list[int], list[bool]]:
        messages = [self._without_own_end(message) for message in example.messages]
        rendering = self.template.bind(example.tools, example.template_kwargs)
        text = rendering.render(messages)
        self.notes += self._check.check(rendering, messages, text)
        numbers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        trained = set(example.trained_numbers) & set(numbers[-1:] if self.options.only_unmask_final else numbers)
        if self.template.marks_answers:
            ids, mask, last = self._marked_tokens(rendering, messages, trained)
        else:
            ids, mask, last = self._found_tokens(rendering, messages, text, trained)
        if trained and not any(mask):
            raise RowError("the chat template renders no answer, so nothing carries loss")
        if self.options.add_eos and messages[-1]["role"] == "assistant" and not self._ends & set(ids[last - 1 :]):
            # Generation stops at these tokens alone: one must follow the answer (or its end-of-turn token) at once.
            ids, mask = [*ids[:last], self._eos], [*mask[:last], len(messages) - 1 in trained]
        return ids, mask

    def _without_own_end(self, message: Message) -> Message:
        """An assistant message without the end token that its text was written with: the template puts its own."""
        content = message["content"].rstrip()
        if message["role"] != "assistant" or not content.endswith(self._end_texts):
            return message
        self.notes.append(Note(Kind.END, message["role"]))
        end = next(text for text in self._end_texts if content.endswith(text))
        return {**message, "content": content.removesuffix(end)}

    def _found_tokens(
        self, rendering: Rendering, messages: list[Message], text: str, trained: set[int]
    ) -> tuple[list[int], list[bool], int]:
        """(ids, mask, where the last answer's tokens end)."""
        finder = AnswerFinder(rendering, messages, text)
        answers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        last = answers[-1] if answers else None
        spans = {number: finder.span(number) for number in answers if number in trained or number == last}
        for number in trained:
            _check_span(messages[number], number, text[spans[number].start : spans[number].end], text)
        encoding = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        offsets = encoding["offset_mapping"]
        mask = _tokens_in_spans(offsets, [spans[number] for number in sorted(trained)])
        ends = _tokens_in_spans(offsets, [] if last is None else [spans[last]])
        return encoding["input_ids"], mask, _end_of_last(ends)

    def _marked_tokens(
        self, rendering: Rendering, messages: list[Message], trained: set[int]
    ) -> tuple[list[int], list[bool], int]:
        """Answers as the template marks them, up to the special token that closes each.

        Some templates mark that token, or a line break after it as well, others neither; the loss is the same.
        """
        ids, marks = rendering.marked_tokens(messages)
        special = self._special
        runs = [self._closed_run(ids, special, start, end) for start, end in _runs(marks)]
        # A token right after the mark closes the turn if it is there after the last one too; otherwise it opens a turn.
        if runs and runs[-1][1] < len(ids):
            closing = ids[runs[-1][1]]
            runs = [
                (start, end + 1 if closing in special and ids[end] == closing and ids[end - 1] not in special else end)
                for start, end in runs
            ]
        numbers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        if len(runs) != len(numbers) and trained == set(numbers[-1:]):
            runs, numbers = runs[-1:], numbers[-1:]
        elif len(runs) != len(numbers) and trained != set(numbers):
            raise RowError(
                f"the chat template marks {len(runs)} answers in {len(numbers)} assistant messages, so those that "
                "carry no loss cannot be told from the others"
            )
        mask = [False] * len(ids)
        for position, (start, end) in enumerate(runs):
            if len(runs) != len(numbers) or numbers[position] in trained:
                mask[start:end] = [True] * (end - start)
        return ids, mask, runs[-1][1] if runs else len(ids)

    def _closed_run(self, ids: list[int], special: frozenset[int], start: int, end: int) -> tuple[int, int]:
        """Cut whitespace off the end of a run where it follows a special token."""
        last = end - 1
        while last > start and ids[last] not in special and not str(self.tokenizer.decode([ids[last]])).strip():
            last -= 1
        return start, last + 1 if ids[last] in special else end


def _check_span(message: Message, number: int, span: str, text: str) -> None:
    """Raises RowError where an answer's tokens would not hold what the message says (though the text does)."""
    parts = [message["content"].rpartition("</think>")[2].strip()]
    parts += [call["function"]["name"] for call in message.get("tool_calls", ())]
    for part in parts:
        if part in text and part not in span:
            raise RowError(
                f"the chat template renders message {number + 1} so that its answer cannot be told from the rest; use "
                "a template that marks answers with {% generation %}"
            )


def _end_of_last(mask: list[bool]) -> int:
    """Position after the last True; the mask's length where there is none."""
    return len(mask) - mask[::-1].index(True) if any(mask) else len(mask)


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
