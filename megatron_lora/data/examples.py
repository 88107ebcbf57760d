"""What a row becomes before it is tokenized: plain text, a conversation, a prompt; and what the recipe puts around."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_lora.data.messages import Message, Turns, turn
from megatron_lora.data.values import RowError
from megatron_lora.errors import UserError

PROMPTS_FOLDER = Path(__file__).parent / "prompts"


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

    def refuse_whole_text(self) -> None:
        """Raise RowError where the recipe puts something around a question that the row, one text, does not have."""
        if self.prompt_template is not None or self.system_prompt is not None:
            raise RowError(
                "data.default.prompt_file or system_prompt_file is set, but the row is one text without a question; "
                "set them to null"
            )

    def wrap_turns(self, turns: Turns) -> Turns:
        """The system prompt in front where there is none yet; the template around the first user message."""
        wrapped = turns + Turns()
        if self.prompt_template is not None:
            first = next((i for i, message in enumerate(wrapped.messages) if message["role"] == "user"), None)
            if first is not None:
                message = wrapped.messages[first]
                wrapped.messages[first] = {**message, "content": self._fill(message["content"])}
        if self.system_prompt is not None and (not wrapped.messages or wrapped.messages[0]["role"] != "system"):
            wrapped = turn("system", self.system_prompt) + wrapped
        return wrapped

    def _fill(self, prompt: str) -> str:
        return prompt if self.prompt_template is None else self.prompt_template.format(prompt)


@dataclass(frozen=True)
class TextExample:
    """Plain text: the prompt's tokens (none where it is empty), then the answer's, no template. trained: whether the
    answer carries loss."""

    prompt: str
    answer: str
    trained: bool = True


@dataclass(frozen=True)
class ChatExample:
    """A conversation for the chat template. trained: which messages carry loss; None for every assistant message.
    tools, template_kwargs: what the row gives the template besides."""

    messages: list[Message]
    trained: tuple[bool, ...] | None = None
    tools: list[dict[str, Any]] | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)

    @property
    def trained_numbers(self) -> list[int]:
        """Positions of the messages that carry loss."""
        answers = [number for number, message in enumerate(self.messages) if message["role"] == "assistant"]
        return answers if self.trained is None else [number for number in answers if self.trained[number]]


@dataclass(frozen=True)
class PromptExample:
    """What GRPO samples answers for: plain text or messages, the reference answer, the row's other fields, and why
    there is no reference ("" where there is one). tools, template_kwargs: as in `ChatExample`."""

    prompt: str | list[Message]
    answer: str
    extra: dict[str, Any] = field(default_factory=dict)
    no_reference: str = ""
    tools: list[dict[str, Any]] | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)


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
