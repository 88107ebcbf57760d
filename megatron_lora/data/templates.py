"""Chat templates: a conversation as text."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from megatron_lora.data.messages import THINKING_KEYS, Message
from megatron_lora.data.values import RowError

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
SENTINEL = "ANSWERSTANDSHERE"


class ChatTemplate:
    """A tokenizer's chat template, or `PLAIN_TEMPLATE`, with the recipe's `chat_template_kwargs`."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, kwargs: Mapping[str, Any] | None = None):
        self.tokenizer = tokenizer
        self.kwargs = dict(kwargs or {})
        has_own = isinstance(tokenizer.chat_template, (str, dict)) and bool(tokenizer.chat_template)
        self.source: str | None = None if has_own else PLAIN_TEMPLATE
        templates = tokenizer.chat_template if has_own else PLAIN_TEMPLATE
        self.text = "\n".join(templates.values()) if isinstance(templates, dict) else str(templates)
        marked = tokenizer.get_chat_template() if has_own else PLAIN_TEMPLATE
        self.marks_answers = re.search(r"\{%[-+]?\s*generation\b", marked) is not None
        special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        tokens = sorted(special | set(tokenizer.all_special_tokens), key=len, reverse=True)
        self.special_token = re.compile("|".join(re.escape(token) for token in tokens))
        self._thinking_key = next((key for key in THINKING_KEYS if self.reads_key(key)), None)
        self._arguments_as_text = False
        # Some templates (DeepSeek R1's) look at the calls only where there is no content at all.
        self._none_for_empty = re.search(r"content['\"\]]*\s+is\s+(not\s+)?none", self.text) is not None

    def mentions(self, name: str) -> bool:
        """Whether the template's source has this word anywhere."""
        return re.search(rf"\b{re.escape(name)}\b", self.text) is not None

    def reads_key(self, name: str) -> bool:
        """Whether the template's source has this name as a key: `message.name` or `message['name']`."""
        return re.search(rf"[.'\"]{re.escape(name)}\b", self.text) is not None

    def bind(self, tools: list[dict[str, Any]] | None = None, kwargs: Mapping[str, Any] | None = None) -> "Rendering":
        """The template with what one row gives it besides messages."""
        return Rendering(self, tools, dict(kwargs or {}))

    def apply(
        self, messages: Sequence[Message], tools: list[dict[str, Any]] | None, kwargs: Mapping[str, Any], **options: Any
    ) -> Any:
        """transformers' `apply_chat_template`. Raises RowError where the template refuses the conversation."""
        own = [self._spelled(message) for message in messages]
        try:
            return self._call(own, tools, kwargs, options)
        except TypeError as error:
            # Some templates (DeepSeek's) put the arguments into a text as they are, and want them as JSON text.
            if self._arguments_as_text or not any(message.get("tool_calls") for message in messages):
                raise _refusal(error) from error
            try:
                result = self._call([_arguments_as_text(message) for message in own], tools, kwargs, options)
            except (jinja2.TemplateError, TypeError, KeyError, IndexError, AttributeError, ValueError):
                raise _refusal(error) from error
            self._arguments_as_text = True
            return result
        except (jinja2.TemplateError, KeyError, IndexError, AttributeError, ValueError) as error:
            raise _refusal(error) from error

    def _call(self, messages: list[Message], tools: Any, kwargs: Mapping[str, Any], options: dict[str, Any]) -> Any:
        return self.tokenizer.apply_chat_template(
            messages, tools=tools, chat_template=self.source, **options, **{**self.kwargs, **kwargs}
        )

    def _spelled(self, message: Message) -> Message:
        """The message as the template wants it: the key of its thinking, its arguments, its missing text."""
        key = self._thinking_key
        if key is not None and key not in message:
            given = next((other for other in THINKING_KEYS if other in message), None)
            if given is not None:
                message = {(key if name == given else name): value for name, value in message.items()}
        if self._none_for_empty and message.get("tool_calls") and not message["content"]:
            message = {**message, "content": None}
        return _arguments_as_text(message) if self._arguments_as_text else message


@dataclass(frozen=True)
class Rendering:
    """A template bound to one row's tools and variables."""

    template: ChatTemplate
    tools: list[dict[str, Any]] | None
    kwargs: dict[str, Any]

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        """The conversation as text. Raises RowError where the template refuses it."""
        return self._apply(messages, add_generation_prompt=add_generation_prompt, tokenize=False)

    def render_prompt(self, messages: Sequence[Message]) -> str:
        """What generation starts from: a last assistant message is gone on with, otherwise one is begun."""
        if messages[-1]["role"] == "assistant":
            return self._apply(messages, continue_final_message=True, tokenize=False)
        return self.render(messages, add_generation_prompt=True)

    def marked_tokens(self, messages: Sequence[Message]) -> tuple[list[int], list[int]]:
        """Token ids, and 1 where the template's `{% generation %}` marks an answer."""
        encoding = self._apply(messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        return list(encoding["input_ids"]), list(encoding["assistant_masks"])

    def try_render(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str | None:
        """None where the template refuses it."""
        try:
            return self.render(messages, add_generation_prompt)
        except RowError:
            return None

    def _apply(self, messages: Sequence[Message], **options: Any) -> Any:
        return self.template.apply(messages, self.tools, self.kwargs, **options)


def _refusal(error: Exception) -> RowError:
    return RowError(f"the chat template refuses this conversation: {error}")


def _arguments_as_text(message: Message) -> Message:
    if not message.get("tool_calls"):
        return message
    calls = []
    for call in message["tool_calls"]:
        function = dict(call["function"])
        if not isinstance(function["arguments"], str):
            function["arguments"] = json.dumps(function["arguments"], ensure_ascii=False)
        calls.append({**call, "function": function})
    return {**message, "tool_calls": calls}


def with_call_names(message: Message, name: str) -> Message:
    """The message with its last tool call's function named so."""
    *rest, last = message["tool_calls"]
    return {**message, "tool_calls": [*rest, {**last, "function": {**last["function"], "name": name}}]}


def free_sentinel(text: str) -> str:
    """A word that the text does not hold."""
    sentinel = SENTINEL
    while sentinel in text:
        sentinel += "X"
    return sentinel
