"""Conversations as people write them become messages as chat templates read them."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_lora.data.loss_keys import message_switch
from megatron_lora.data.values import RowError, as_text, from_json_text

Message = dict[str, Any]

# Speakers of ShareGPT and its kin, and ms-swift's and Axolotl's names.
SPEAKERS = {
    "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant",
    "bard": "assistant", "assistant": "assistant",
    "system": "system", "developer": "developer", "tool": "tool", "function": "function", "ipython": "ipython",
    "observation": "tool", "tool_response": "tool", "function_response": "tool",
    "function_call": "call", "tool_call": "call",
}  # fmt: skip
# Roles that some know as the answer's. Templates leave them out or render them as another speaker, without loss.
NOT_ASSISTANT = ("model", "bot", "ai", "chatbot", "claude", "llm", "response", "answer", "completion")
THINKING_KEYS = ("reasoning_content", "reasoning", "thinking")
TEXT_PARTS = ("text", "input_text", "output_text")


@dataclass
class Turns:
    """messages: with 'role' and 'content', as templates read them. loss: what the row says of each one's loss, None
    where it says nothing."""

    messages: list[Message] = field(default_factory=list)
    loss: list[bool | None] = field(default_factory=list)

    def __add__(self, other: "Turns") -> "Turns":
        return Turns(self.messages + other.messages, self.loss + other.loss)

    def __len__(self) -> int:
        return len(self.messages)

    def __getitem__(self, part: slice) -> "Turns":
        return Turns(self.messages[part], self.loss[part])

    @property
    def last_role(self) -> str:
        return self.messages[-1]["role"] if self.messages else ""


def turn(role: str, content: str) -> Turns:
    """One message."""
    return Turns([{"role": role, "content": content}], [None])


def is_conversation(value: Any) -> bool:
    """Whether a field's value is messages (or one), not text."""
    return isinstance(value, list | Mapping)


def decode_messages(value: Any) -> Any:
    """Messages that a text column holds as JSON text, decoded (columns of tables hold them so); else as it is."""
    if not isinstance(value, str) or value.lstrip()[:1] not in ("[", "{"):
        return value
    try:
        messages = json.loads(value)
    except ValueError:
        return value
    parts = messages if isinstance(messages, list) else [messages]
    written = all(isinstance(part, Mapping) and not {"role", "from"}.isdisjoint(part) for part in parts)
    return messages if parts and written else value


def read_messages(value: Any, name: str) -> Turns:
    """The messages of field `name` (a list, one message, or either as JSON text), without nulls. Raises RowError."""
    value = from_json_text(value, f"field {name!r}")
    value = [value] if isinstance(value, Mapping) else value
    if not isinstance(value, list) or not value:
        raise RowError(f"field {name!r} is empty or no list of messages")
    turns = Turns()
    for number, raw in enumerate(value, start=1):
        what = f"message {number} of {name!r}"
        if not isinstance(raw, Mapping):
            raise RowError(f"{what} is {type(raw).__name__}; wanted an object with 'role' and 'content'")
        message = dict(raw)
        turns.loss.append(message_switch(message, what))
        turns.messages.append(_read_message(message, what))
    return turns


def read_history(value: Any, name: str) -> Turns:
    """Earlier rounds: LLaMA-Factory's and ms-swift's pairs [question, answer], or messages. Raises RowError."""
    value = from_json_text(value, f"field {name!r}")
    if value is None:
        return Turns()
    if not isinstance(value, list):
        raise RowError(f"field {name!r} is {type(value).__name__}; wanted pairs [question, answer]")
    if value and isinstance(value[0], Mapping):
        return read_messages(value, name)
    turns = Turns()
    for number, pair in enumerate(value, start=1):
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(part, str) for part in pair):
            raise RowError(f"round {number} of {name!r} is no pair [question, answer] of texts")
        turns += turn("user", pair[0]) + turn("assistant", pair[1])
    return turns


def read_tools(value: Any, name: str) -> list[dict[str, Any]]:
    """Tools as templates read them ({"type": "function", "function": {...}}), from a list or JSON text. Raises
    RowError."""
    value = from_json_text(value, f"field {name!r}")
    value = [value] if isinstance(value, Mapping) else value
    if value is None:
        return []
    if not isinstance(value, list):
        raise RowError(f"field {name!r} is {type(value).__name__}; wanted a list of tools")
    tools = []
    for number, tool in enumerate(value, start=1):
        tool = from_json_text(tool, f"tool {number} of {name!r}")
        if not isinstance(tool, Mapping):
            raise RowError(f"tool {number} of {name!r} is {type(tool).__name__}; wanted an object with its 'name'")
        tool = dict(tool) if isinstance(tool.get("function"), Mapping) else {"type": "function", "function": dict(tool)}
        if not isinstance(tool["function"].get("name"), str):
            raise RowError(f"tool {number} of {name!r} has no 'name'")
        tools.append(tool)
    return tools


def _read_message(message: Message, what: str) -> Message:
    """Canonical: role, content (text), tool_calls with decoded arguments; other keys as they are."""
    role = _take_one(message, ("role", "from"), what)
    content = _take_one(message, ("content", "value"), what)
    if not isinstance(role, str) or not role.strip():
        raise RowError(f"{what} has no 'role' (or ShareGPT's 'from')")
    role = SPEAKERS.get(role.strip().lower(), role)
    if role.lower() in NOT_ASSISTANT:
        raise RowError(f"{what} has the role {role!r}, which no chat template trains; write 'assistant' for the answer")
    if role == "call":
        message["tool_calls"] = content
        role, content = "assistant", None
    thinking, content = _read_content(content, role, what)
    if thinking:
        if any(key in message for key in THINKING_KEYS):
            raise RowError(f"{what} has thinking twice: in 'content' and in a key of its own; keep one")
        message["reasoning_content"] = thinking
    calls = _take_one(message, ("tool_calls", "function_call"), what)
    if calls not in (None, [], "", {}):
        message["tool_calls"] = _read_calls(calls, what)
    elif content is None:
        raise RowError(f"{what} has no text in 'content'")
    return {"role": role, "content": content or "", **message}


def _take_one(message: Message, names: tuple[str, str], what: str) -> Any:
    """The value under one of two names, taken out. Raises RowError where both hold something."""
    values = [message.pop(name, None) for name in names]
    if all(value not in (None, "", []) for value in values):
        raise RowError(f"{what} has both {names[0]!r} and {names[1]!r}; keep one")
    return values[0] if values[1] is None or values[0] not in (None, "", []) else values[1]


def _read_content(content: Any, role: str, what: str) -> tuple[str, str | None]:
    """(thinking, text) of a content that is text or a list of parts; (\"\", None) where there is none."""
    if content is None or isinstance(content, str):
        return "", content
    if isinstance(content, list) and all(isinstance(part, str | Mapping) for part in content):
        thinking, texts = "", []
        for part in content:
            if isinstance(part, str):
                texts.append(part)
            elif isinstance(part.get("text"), str) and part.get("type", "text") in TEXT_PARTS:
                texts.append(part["text"])
            elif isinstance(part.get("thinking"), str):
                thinking += part["thinking"]
            elif role in ("tool", "function", "ipython") and "type" not in part:
                return "", json.dumps(content, ensure_ascii=False)  # a tool's answer that is a list of objects
            else:
                kind = part.get("type", sorted(part))
                raise RowError(f"{what} holds a part of type {kind!r}; only text can be trained on here")
        return thinking, "".join(texts) if content else None
    if isinstance(content, Mapping | list) and role in ("tool", "function", "ipython"):
        return "", json.dumps(content, ensure_ascii=False)
    return "", as_text(content, f"'content' of {what}")


def _read_calls(calls: Any, what: str) -> list[dict[str, Any]]:
    calls = from_json_text(calls, f"the tool call of {what}")
    if calls is None:
        return []
    calls = [calls] if isinstance(calls, Mapping) else calls
    if not isinstance(calls, list):
        raise RowError(f"'tool_calls' of {what} is {type(calls).__name__}; wanted a list")
    return [_read_call(call, f"tool call {number} of {what}") for number, call in enumerate(calls, start=1)]


def _read_call(call: Any, what: str) -> dict[str, Any]:
    """{"type": "function", "function": {"name", "arguments"}, ...} with arguments as an object."""
    call = from_json_text(call, what)
    if not isinstance(call, Mapping):
        raise RowError(f"{what} is {type(call).__name__}; wanted an object with 'name' and 'arguments'")
    if isinstance(call.get("function"), Mapping):
        function = dict(call["function"])
        rest = {key: value for key, value in call.items() if key != "function"}
    else:
        function = {key: value for key, value in call.items() if key not in ("type", "id")}
        rest = {key: call[key] for key in ("id",) if key in call}
    if not isinstance(function.get("name"), str) or not function["name"]:
        raise RowError(f"{what} has no function 'name'")
    if "parameters" in function and "arguments" not in function:  # Llama's own spelling
        function["arguments"] = function.pop("parameters")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        arguments = from_json_text(arguments, f"'arguments' of {what}") if arguments.strip() else {}
    if arguments is not None and not isinstance(arguments, Mapping):
        raise RowError(f"'arguments' of {what} is {type(arguments).__name__}; wanted an object, or one as JSON text")
    function["arguments"] = dict(arguments or {})
    return {"type": "function", **rest, "function": function}
