"""What a raw row means: the fields of a data set's row become one of four shapes that can be tokenized."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_lora.data.references import Reference, final_answer, find_reference
from megatron_lora.errors import UserError

Message = dict[str, Any]
PROMPTS_FOLDER = Path(__file__).parent / "prompts"


class RowError(ValueError):
    """A row that cannot be used; the message says why, the caller adds where it stands."""


@dataclass(frozen=True)
class Keys:
    """The recipe's names for a row's fields; None where the recipe names none."""

    input_key: str | None = None
    output_key: str | None = None
    chosen_key: str | None = None
    rejected_key: str | None = None


@dataclass(frozen=True)
class Instructions:
    """What the recipe puts around every question: a system prompt, and a text with `{}` where the question goes."""

    prompt_template: str | None = None
    system_prompt: str | None = None

    def wrap_text(self, prompt: str) -> str:
        if self.system_prompt is not None:
            raise RowError(
                "data.default.system_prompt_file is set, but the row is plain text without messages; "
                "use rows with 'messages' or 'question'/'answer', or set it to null"
            )
        return self._fill(prompt)

    def wrap_messages(self, messages: list[Message]) -> list[Message]:
        """The system prompt in front where there is none yet; the template around the first user message."""
        messages = list(messages)
        if self.prompt_template is not None:
            first = next((i for i, message in enumerate(messages) if message["role"] == "user"), None)
            if first is not None:
                messages[first] = {**messages[first], "content": self._fill(messages[first]["content"])}
        if self.system_prompt is not None and (not messages or messages[0]["role"] != "system"):
            messages.insert(0, {"role": "system", "content": self.system_prompt})
        return messages

    def _fill(self, prompt: str) -> str:
        return prompt if self.prompt_template is None else self.prompt_template.format(prompt)


@dataclass(frozen=True)
class TextExample:
    """Plain text: the prompt's tokens, then the answer's, no template."""

    prompt: str
    answer: str


@dataclass(frozen=True)
class ChatExample:
    """A conversation for the chat template; loss falls on assistant messages."""

    messages: list[Message]


@dataclass(frozen=True)
class PromptExample:
    """What GRPO samples answers for: plain text or messages, the reference answer, the row's other fields, and why
    there is no reference ("" where there is one)."""

    prompt: str | list[Message]
    answer: str
    extra: dict[str, Any] = field(default_factory=dict)
    no_reference: str = ""


Example = TextExample | ChatExample


def load_instructions(prompt_file: str | None = None, system_prompt_file: str | None = None) -> Instructions:
    """Read the two files of `data.default`.

    A file is looked up from the working folder and then by its name among this package's own prompts (so that NeMo
    RL's `examples/prompts/cot.txt` works). Raises UserError for a missing file or one without exactly one `{}`.
    """
    template = _read_prompt("data.default.prompt_file", prompt_file)
    if template is not None:
        try:
            correct = template.format("\0").count("\0") == 1
        except (IndexError, KeyError, ValueError):
            correct = False
        if not correct:
            raise UserError(
                f"data.default.prompt_file={prompt_file}: wanted a text with {{}} once, where the question goes, and "
                "every other brace doubled ({{ and }})"
            )
    return Instructions(template, _read_prompt("data.default.system_prompt_file", system_prompt_file))


def _read_prompt(key: str, name: str | None) -> str | None:
    if name is None:
        return None
    own = PROMPTS_FOLDER / Path(name).name
    path = Path(name) if Path(name).is_file() or not own.is_file() else own
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{key}={name} cannot be read ({error}); give a text file's path or null") from error


def parse_sft(row: Mapping[str, Any], keys: Keys, instructions: Instructions) -> Example:
    """One training row. Raises RowError."""
    _check_row(row)
    if keys.input_key is None and keys.output_key is None and "messages" in row:
        return ChatExample(instructions.wrap_messages(_messages(row, "messages", needs_answer=True)))
    input_key, output_key = _question_keys(row, keys)
    prompt = _text_or_messages(row, input_key)
    answer = _text_or_messages(row, output_key)
    if (input_key, output_key) == ("prompt", "completion") and isinstance(prompt, str) and isinstance(answer, str):
        return TextExample(instructions.wrap_text(prompt), answer)
    return ChatExample(instructions.wrap_messages(_as_messages(prompt, "user") + _as_messages(answer, "assistant")))


def parse_preference(row: Mapping[str, Any], keys: Keys, instructions: Instructions) -> tuple[Example, Example]:
    """One preference row: the chosen and the rejected example. Raises RowError."""
    _check_row(row)
    chosen_key, rejected_key = keys.chosen_key or "chosen", keys.rejected_key or "rejected"
    prompt_key = keys.input_key or "prompt"
    answers = [_text_or_messages(row, chosen_key), _text_or_messages(row, rejected_key)]
    if prompt_key not in row and all(isinstance(answer, list) for answer in answers):
        prompt: str | list[Message] = []  # whole conversations
    else:
        prompt = _text_or_messages(row, prompt_key)
    named_plain = (prompt_key, chosen_key, rejected_key) == ("prompt", "chosen", "rejected")
    if named_plain and isinstance(prompt, str) and all(isinstance(answer, str) for answer in answers):
        text = instructions.wrap_text(prompt)
        chosen, rejected = (TextExample(text, str(answer)) for answer in answers)
        return chosen, rejected
    chosen, rejected = (
        ChatExample(instructions.wrap_messages(_as_messages(prompt, "user") + _as_messages(answer, "assistant")))
        for answer in answers
    )
    for key, example in ((chosen_key, chosen), (rejected_key, rejected)):
        if example.messages[-1]["role"] != "assistant":
            raise RowError(f"{key!r} does not end with an assistant message")
    return chosen, rejected


def parse_prompt(row: Mapping[str, Any], keys: Keys, instructions: Instructions) -> PromptExample:
    """One GRPO prompt and its reference answer ("" where the row has none). Raises RowError."""
    _check_row(row)
    if keys.input_key is None and "messages" in row:
        used = {"messages"}
        messages = _messages(row, "messages")
        answer = ""
        if messages[-1]["role"] == "assistant":
            answer = messages[-1]["content"]
            messages = messages[:-1]
        if not messages:
            raise RowError("'messages' holds no question")
        prompt: str | list[Message] = instructions.wrap_messages(messages)
    else:
        input_key = keys.input_key or next(
            (k for k in ("prompt", "input", "question", "problem") if k in row), "prompt"
        )
        used = {input_key}
        question = _text_or_messages(row, input_key)
        # Field names say the form, as in `parse_sft`: a text "prompt" is plain, anything else goes to the template.
        if isinstance(question, str) and input_key == "prompt":
            prompt = instructions.wrap_text(question)
        else:
            prompt = instructions.wrap_messages(_as_messages(question, "user"))
        answer = ""
    reference = find_reference(row, keys.output_key)
    if answer and not reference.text:
        reference = Reference(answer, "messages")
    elif not reference.problem:
        used.add(reference.column)
    extra = {key: value for key, value in row.items() if key not in used}
    final = final_answer(reference.text)
    if final != reference.text:
        extra["solution"] = reference.text
    return PromptExample(prompt, final, extra, reference.problem)


def _check_row(row: Any) -> None:
    if not isinstance(row, Mapping):
        raise RowError(f"wanted a JSON object, got {type(row).__name__}")
    if not row:
        raise RowError("the row is empty")


def _question_keys(row: Mapping[str, Any], keys: Keys) -> tuple[str, str]:
    """The fields that hold question and answer: named by the recipe, or the first known pair that is there."""
    pairs = [("prompt", "completion"), ("input", "output"), ("question", "answer")]
    if keys.input_key is not None or keys.output_key is not None:
        return keys.input_key or "input", keys.output_key or "output"
    for pair in pairs:
        if pair[0] in row and pair[1] in row:
            return pair
    for known_input, known_output in pairs:
        if known_input in row or known_output in row:
            missing = known_output if known_input in row else known_input
            raise RowError(f"field {missing!r} is missing; the row has {sorted(row)}")
    raise RowError(
        f"the row has {sorted(row)}; wanted 'messages', 'prompt' and 'completion', 'input' and 'output' or 'question' "
        "and 'answer' (or name them with input_key and output_key)"
    )


def _text_or_messages(row: Mapping[str, Any], key: str) -> str | list[Message]:
    value = row.get(key)
    if value is None:
        raise RowError(f"field {key!r} is missing; the row has {sorted(row)}")
    if isinstance(value, list):
        return _messages(row, key)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        raise RowError(f"field {key!r} is {type(value).__name__}; wanted text or a list of messages")
    if not value.strip():
        raise RowError(f"field {key!r} is empty")
    return value


def _messages(row: Mapping[str, Any], key: str, needs_answer: bool = False) -> list[Message]:
    value = row[key]
    if not isinstance(value, list) or not value:
        raise RowError(f"field {key!r} is empty or no list of messages")
    messages = []
    for number, message in enumerate(value, start=1):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise RowError(f"message {number} of {key!r} has no 'role'")
        content = message.get("content")
        if not isinstance(content, str) and not message.get("tool_calls"):
            raise RowError(f"message {number} of {key!r} has no text in 'content'")
        # Hub data sets fill absent fields with None, which templates would take for present.
        messages.append({name: part for name, part in message.items() if part is not None} | {"content": content or ""})
    if needs_answer and not any(message["role"] == "assistant" for message in messages):
        raise RowError(f"{key!r} has no assistant message, so nothing carries loss")
    return messages


def _as_messages(value: str | list[Message], role: str) -> list[Message]:
    return [{"role": role, "content": value}] if isinstance(value, str) else value
