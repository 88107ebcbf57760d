"""What a chat template rendered is checked against what the row's messages say."""

import json
from collections.abc import Callable, Sequence

from megatron_lora.data.messages import THINKING_KEYS, Message
from megatron_lora.data.notices import Kind, Note
from megatron_lora.data.templates import ChatTemplate, Rendering, free_sentinel, with_call_names
from megatron_lora.data.values import RowError

# Renderings that must agree before a key is taken for one that the template does not read.
TRIES = 3
_THINK_END = "</think>"


class RenderingCheck:
    """Whether messages reach the text. One for a template: what it does with a kind of message is tried once."""

    def __init__(self, template: ChatTemplate):
        self.template = template
        self._renders: dict[tuple, bool] = {}
        self._reads: dict[tuple, bool] = {}
        self._unread: dict[tuple, int] = {}

    def check(self, rendering: Rendering, messages: Sequence[Message], text: str) -> list[Note]:
        """What of the messages, tools and variables does not reach `text`, their rendering.

        Raises RowError where a message or a tool call is left out altogether.
        """
        notes: list[Note] = []
        for number, message in enumerate(messages):
            notes += self._check_content(rendering, messages, number, text)
            if message.get("tool_calls"):
                self._check_calls(rendering, messages, number, text)
            notes += self._check_keys(rendering, messages, number, text)
            if self.template.special_token.search(message["content"]):
                notes.append(Note(Kind.SPECIAL, message["role"]))
        if rendering.tools and not self._reads_tools(rendering, messages):
            notes.append(Note(Kind.TOOLS, "tools"))
        given = {**self.template.kwargs, **rendering.kwargs}
        notes += [Note(Kind.TEMPLATE_KEY, key) for key in given if not self.template.mentions(key)]
        return notes

    def _check_content(self, rendering: Rendering, messages: Sequence[Message], number: int, text: str) -> list[Note]:
        message = messages[number]
        content = message["content"].strip()
        if not content:
            return []

        def put(sentinel: str) -> Message:
            return {**message, "content": sentinel}

        if not self._is_rendered("content", put, rendering, messages, number, text):
            if message.get("tool_calls"):
                return [Note(Kind.TEXT, f"{message['role']} beside tool_calls")]
            raise RowError(
                f"the chat template does not render message {number + 1} (role {message['role']!r}): its text would be "
                "lost; use a role that the template knows, or another policy.tokenizer.chat_template"
            )
        if _stands_in(content, text):
            return []
        thought, mark, answer = content.rpartition(_THINK_END)
        if not mark:
            return [Note(Kind.TEXT, message["role"])]
        notes = []
        if not _stands_in(thought.rpartition("<think>")[2].strip(), text):
            notes.append(Note(Kind.THINKING, "content"))
        if not _stands_in(answer.strip(), text):
            notes.append(Note(Kind.TEXT, message["role"]))
        return notes

    def _check_calls(self, rendering: Rendering, messages: Sequence[Message], number: int, text: str) -> None:
        def put(sentinel: str) -> Message:
            return with_call_names(messages[number], sentinel)

        functions = [call["function"] for call in messages[number]["tool_calls"]]
        parts = [part for function in functions for part in (function["name"], *function["arguments"])]
        lost = [part for part in parts if not _stands_in(part, text)]
        if lost or not self._is_rendered("tool_calls", put, rendering, messages, number, text):
            what = f"{lost[0]!r} of the tool calls" if lost else "the tool calls"
            raise RowError(
                f"the chat template does not render {what} of message {number + 1}; use a "
                "policy.tokenizer.chat_template that does"
            )

    def _check_keys(self, rendering: Rendering, messages: Sequence[Message], number: int, text: str) -> list[Note]:
        message, notes = messages[number], []
        for key, value in message.items():
            if key in ("role", "content", "tool_calls"):
                continue
            if key in THINKING_KEYS and isinstance(value, str):
                sentinel = free_sentinel(text)
                changed = [*messages[:number], {**message, key: sentinel}, *messages[number + 1 :]]
                if value.strip() and sentinel not in (rendering.try_render(changed) or sentinel):
                    notes.append(Note(Kind.THINKING, key))
            elif not self._reads_key(key, rendering, messages, number, text):
                notes.append(Note(Kind.MESSAGE_KEY, key))
        return notes

    def _is_rendered(
        self,
        field: str,
        put: Callable[[str], Message],
        rendering: Rendering,
        messages: Sequence[Message],
        number: int,
        text: str,
    ) -> bool:
        """Whether a word put into this field of the message comes out, for this kind of message at such a place."""
        message = messages[number]
        roles = tuple(messages[i]["role"] if 0 <= i < len(messages) else None for i in (number - 1, number, number + 1))
        kind = (field, roles, number == 0, len(message.get("tool_calls", ())) > 1, *sorted(message))
        if kind not in self._renders:
            sentinel = free_sentinel(text)
            changed = rendering.try_render([*messages[:number], put(sentinel), *messages[number + 1 :]])
            self._renders[kind] = changed is None or sentinel.lower() in changed.lower()
        return self._renders[kind]

    def _reads_key(self, key: str, rendering: Rendering, messages: Sequence[Message], number: int, text: str) -> bool:
        """Whether leaving the key out changes the text."""
        kind = (messages[number]["role"], key)
        if self._unread.get(kind, 0) >= TRIES:
            return False
        if not self._reads.get(kind):
            without = {name: value for name, value in messages[number].items() if name != key}
            changed = rendering.try_render([*messages[:number], without, *messages[number + 1 :]])
            self._reads[kind] = changed != text
            self._unread[kind] = self._unread.get(kind, 0) + (changed == text)
        return self._reads[kind]

    def _reads_tools(self, rendering: Rendering, messages: Sequence[Message]) -> bool:
        if ("tools",) not in self._reads:
            bare = self.template.bind(None, rendering.kwargs)
            self._reads["tools",] = bare.try_render(messages) != rendering.try_render(messages)
        return self._reads["tools",]


def _stands_in(part: str, text: str) -> bool:
    """Whether a text is in the rendering, as it is or as JSON writes it."""
    return part in text or any(json.dumps(part, ensure_ascii=ascii)[1:-1] in text for ascii in (False, True))
