"""Chat templates: a conversation as text, and where its answers stand in that text."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from megatron_lora.data.examples import Message, RowError

# For tokenizers without a template of their own (base models): roles as words, every answer closed by EOS.
PLAIN_TEMPLATE = (
    "{% for message in messages %}"
    "{{ message['role'] | capitalize + ':' }}"
    "{% if message['content'] %}{{ ' ' + message['content'] }}{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{{ '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
_SENTINEL = "ANSWERSTANDSHERE"


@dataclass(frozen=True)
class Span:
    """Characters [start, end) of a rendered conversation that the model is to produce."""

    start: int
    end: int


class ChatTemplate:
    """A tokenizer's chat template, or `PLAIN_TEMPLATE`, with the recipe's `chat_template_kwargs`."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, kwargs: Mapping[str, Any] | None = None):
        self.tokenizer = tokenizer
        self.kwargs = dict(kwargs or {})
        has_own = isinstance(tokenizer.chat_template, (str, dict)) and bool(tokenizer.chat_template)
        self.source: str | None = None if has_own else PLAIN_TEMPLATE
        text = tokenizer.get_chat_template() if has_own else PLAIN_TEMPLATE
        self.marks_answers = re.search(r"\{%[-+]?\s*generation\b", text) is not None
        special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        tokens = sorted(special | set(tokenizer.all_special_tokens), key=len, reverse=True)
        self._special_token = re.compile("|".join(re.escape(token) for token in tokens))

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        """The conversation as text. Raises RowError where the template refuses it."""
        return self._apply(messages, add_generation_prompt=add_generation_prompt, tokenize=False)

    def marked_tokens(self, messages: Sequence[Message]) -> tuple[list[int], list[int]]:
        """Token ids, and 1 where the template's `{% generation %}` marks an answer."""
        encoding = self._apply(messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        return list(encoding["input_ids"]), list(encoding["assistant_masks"])

    def _apply(self, messages: Sequence[Message], **options: Any) -> Any:
        try:
            return self.tokenizer.apply_chat_template(
                list(messages), chat_template=self.source, **options, **self.kwargs
            )
        except (jinja2.TemplateError, TypeError, KeyError, IndexError) as error:
            raise RowError(f"the chat template refuses this conversation: {error}") from error

    def answer_spans(self, messages: Sequence[Message], text: str, only_final: bool) -> list[Span]:
        """Where each assistant message (or the last) stands in `text` = render(messages), its end token included.

        A span starts where generation would, so that a thinking block that the template opens inside the turn
        belongs to the answer; the role's header never does. It ends after the special token that closes the turn.
        Raises RowError where an answer cannot be found exactly.
        """
        numbers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        return [self._answer_span(messages, number, text) for number in (numbers[-1:] if only_final else numbers)]

    def _answer_span(self, messages: Sequence[Message], number: int, text: str) -> Span:
        """One answer, found by putting a sentinel in its place: what surrounds the sentinel surrounds the answer.

        Cutting `text` by rendering messages[:number] alone would fail for templates that treat earlier turns
        differently from the last one (Qwen3 strips their thinking).
        """
        prompt = self._rendered_prompt(messages, number)
        before, after = self._surroundings(messages, number, text)
        prompt_fits = prompt is not None and text.startswith(prompt)
        if after is not None and text.endswith(after):
            content_end = len(text) - len(after)
        else:
            content_end = self._end_by_prefix(messages, number, text)
        if before is not None and text.startswith(before):
            start = len(before)
            if prompt_fits and prompt is not None and len(prompt) <= start:
                has_generation_prompt = prompt != self._rendered_prompt(messages, number, add_generation_prompt=False)
                # Without a generation prompt the text in between may be the role's header, which is no answer.
                if has_generation_prompt or not text[len(prompt) : start].strip():
                    start = len(prompt)
        elif prompt_fits and prompt is not None:
            start = len(prompt)
        else:
            raise RowError(_not_found(number))
        if start > content_end:
            raise RowError(_not_found(number))
        return Span(start, self._closing_end(messages, number, text, content_end))

    def _rendered_prompt(
        self, messages: Sequence[Message], number: int, add_generation_prompt: bool = True
    ) -> str | None:
        """The text that generation of message `number` would start from; None where the template refuses it."""
        if number == 0:
            return None
        try:
            return self.render(messages[:number], add_generation_prompt)
        except RowError:
            return None

    def _surroundings(self, messages: Sequence[Message], number: int, text: str) -> tuple[str | None, str | None]:
        sentinel = _SENTINEL
        while sentinel in text:
            sentinel += "X"
        changed = [*messages[:number], {**messages[number], "content": sentinel}, *messages[number + 1 :]]
        parts = self.render(changed).split(sentinel)
        return (parts[0], parts[1]) if len(parts) == 2 else (None, None)

    def _end_by_prefix(self, messages: Sequence[Message], number: int, text: str) -> int:
        """The end of the turn where its surroundings depend on the answer: the last special token of the prefix."""
        upto = self.render(messages[: number + 1])
        closings = list(self._special_token.finditer(upto))
        if not text.startswith(upto):
            raise RowError(_not_found(number))
        if closings and not upto[closings[-1].end() :].strip():
            return closings[-1].start()
        return len(upto)

    def _closing_end(self, messages: Sequence[Message], number: int, text: str, content_end: int) -> int:
        """Past the special token that closes the turn, if nothing but whitespace (or tool calls) stands before it."""
        closing = self._special_token.search(text, content_end)
        if closing is None:
            return content_end
        if text[content_end : closing.start()].strip() and not messages[number].get("tool_calls"):
            return content_end
        # A special token that is not there when the turn comes last opens the next turn; it closes nothing.
        _, own_tail = self._surroundings(messages[: number + 1], number, text)
        if own_tail is not None and closing.end() > content_end + len(own_tail):
            return content_end
        return closing.end()


def _not_found(number: int) -> str:
    return (
        f"the chat template renders message {number + 1} so that its answer cannot be told from the rest; use a "
        "template that marks answers with {% generation %}"
    )
