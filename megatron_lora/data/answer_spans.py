"""Where the answers stand in a rendered conversation, for templates that do not mark them."""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_lora.data.messages import Message
from megatron_lora.data.templates import Rendering, free_sentinel, with_call_names
from megatron_lora.data.values import RowError


@dataclass(frozen=True)
class Span:
    """Characters [start, end) of a rendered conversation that the model is to produce."""

    start: int
    end: int


class AnswerFinder:
    """Finds the answers of `messages` in `text`, their rendering."""

    def __init__(self, rendering: Rendering, messages: Sequence[Message], text: str):
        self.rendering = rendering
        self.messages = list(messages)
        self.text = text

    def span(self, number: int) -> Span:
        """Where message `number` stands, its end token included.

        A span starts where generation would, so that a thinking block that the template opens inside the turn
        belongs to the answer; the role's header never does. It ends after the special token that closes the turn.
        Raises RowError where the answer cannot be found exactly.
        """
        has_calls = bool(self.messages[number].get("tool_calls"))
        span = self._span_of_calls(number) if has_calls else self._span_of_text(number)
        if span.start >= span.end:
            raise RowError(_not_found(number))
        return span

    def _span_of_text(self, number: int) -> Span:
        """One answer, found by putting a sentinel in its place: what surrounds the sentinel surrounds the answer.

        Cutting the text by rendering messages[:number] alone would fail for templates that treat earlier turns
        differently from the last one (Qwen3 strips their thinking).
        """
        before, after = self._surroundings(number)
        if after is not None and self.text.endswith(after):
            content_end = len(self.text) - len(after)
        else:
            content_end = self._end_by_prefix(number)
        start = self._start(number, before)
        if start > content_end:
            raise RowError(_not_found(number))
        return Span(start, self._closing_end(number, content_end))

    def _span_of_calls(self, number: int) -> Span:
        """An answer with tool calls. Its text may be empty, and what surrounds it then another than beside a text; so
        its end is looked for behind the last call."""
        start = self._start(number, self._surroundings(number)[0])
        upto = self.rendering.try_render(self.messages[: number + 1])
        if upto is not None and self.text.startswith(upto):
            return Span(start, self._turn_end(number, upto))
        sentinel = free_sentinel(self.text)
        named = with_call_names(self.messages[number], sentinel)
        whole = self._split([*self.messages[:number], named, *self.messages[number + 1 :]], sentinel)
        alone = self._split([*self.messages[:number], named], sentinel)
        if whole is None or alone is None or not self.text.endswith(whole[1]) or not whole[1].startswith(alone[1]):
            raise RowError(_not_found(number))
        name_end = len(self.text) - len(whole[1])
        return Span(start, self._turn_end(number, self.text[: name_end + len(alone[1])]))

    def _start(self, number: int, before: str | None) -> int:
        """Where generation of message `number` would start."""
        prompt = self._prompt(number)
        prompt_fits = prompt is not None and self.text.startswith(prompt)
        if before is not None and self.text.startswith(before):
            start = len(before)
            if prompt_fits and prompt is not None and len(prompt) <= start:
                has_generation_prompt = prompt != self._prompt(number, add_generation_prompt=False)
                # Without a generation prompt the text in between may be the role's header, which is no answer.
                if has_generation_prompt or not self.text[len(prompt) : start].strip():
                    start = len(prompt)
            return start
        if prompt_fits and prompt is not None:
            return len(prompt)
        raise RowError(_not_found(number))

    def _prompt(self, number: int, add_generation_prompt: bool = True) -> str | None:
        """The text that generation of message `number` would start from; None where the template refuses it."""
        return self.rendering.try_render(self.messages[:number], add_generation_prompt) if number else None

    def _surroundings(self, number: int, upto: int | None = None) -> tuple[str | None, str | None]:
        """The text before and after message `number`'s content, in the rendering of messages[:upto]."""
        sentinel = free_sentinel(self.text)
        changed = [
            *self.messages[:number],
            {**self.messages[number], "content": sentinel},
            *self.messages[number + 1 :],
        ]
        return self._split(changed[:upto], sentinel) or (None, None)

    def _split(self, messages: list[Message], sentinel: str) -> tuple[str, str] | None:
        parts = (self.rendering.try_render(messages) or "").split(sentinel)
        return (parts[0], parts[1]) if len(parts) == 2 else None

    def _end_by_prefix(self, number: int) -> int:
        """The end of the turn where its surroundings depend on the answer: the last special token of the prefix."""
        upto = self.rendering.render(self.messages[: number + 1])
        if not self.text.startswith(upto):
            raise RowError(_not_found(number))
        closings = list(self.rendering.template.special_token.finditer(upto))
        if closings and not upto[closings[-1].end() :].strip():
            return closings[-1].start()
        return len(upto)

    def _turn_end(self, number: int, upto: str) -> int:
        """The end of the turn that `upto` ends with: past its last special token, if only blanks follow that."""
        closings = list(self.rendering.template.special_token.finditer(upto))
        if closings and not upto[closings[-1].end() :].strip():
            return closings[-1].end()
        return len(upto)

    def _closing_end(self, number: int, content_end: int) -> int:
        """Past the special token that closes the turn, if nothing but whitespace stands before it."""
        closing = self.rendering.template.special_token.search(self.text, content_end)
        if closing is None or self.text[content_end : closing.start()].strip():
            return content_end
        # A special token that is not there when the turn comes last opens the next turn; it closes nothing.
        _, own_tail = self._surroundings(number, number + 1)
        if own_tail is not None and closing.end() > content_end + len(own_tail):
            return content_end
        return closing.end()


def _not_found(number: int) -> str:
    return (
        f"the chat template renders message {number + 1} so that its answer cannot be told from the rest; use a "
        "template that marks answers with {% generation %}"
    )
