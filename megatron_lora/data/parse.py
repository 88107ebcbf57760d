"""Rows become examples: a row's form says where prompt and answer stand."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from megatron_lora.data.examples import ChatExample, Example, Instructions, PromptExample, TextExample
from megatron_lora.data.forms import SYSTEM_COLUMNS, TOOL_COLUMNS, Form, Keys, choose_form
from megatron_lora.data.loss_keys import row_switches
from megatron_lora.data.messages import (
    Turns,
    decode_messages,
    is_conversation,
    read_history,
    read_messages,
    read_tools,
    turn,
)
from megatron_lora.data.notices import Kind, Note
from megatron_lora.data.pairs import split_pair, split_text_pair
from megatron_lora.data.references import Reference, find_reference
from megatron_lora.data.values import Fields, RowError, as_text, from_json_text

# What a template is called with by this package; a row may not set it.
RESERVED_KWARGS = frozenset(
    {"messages", "conversation", "tools", "documents", "chat_template", "add_generation_prompt", "tokenize",
     "continue_final_message", "padding", "truncation", "max_length", "return_tensors", "return_dict",
     "return_assistant_tokens_mask", "tokenizer_kwargs"}
)  # fmt: skip


@dataclass
class RowReader:
    """Reads rows of one data block. keys, instructions: the recipe's. notes: what the row at hand holds that is not
    honoured; whoever reads a row takes them."""

    keys: Keys
    instructions: Instructions
    notes: list[Note]

    def read_sft(self, row: Any) -> Example:
        """One training row. Raises RowError."""
        fields = Fields(row)
        form = choose_form(fields, self.keys, "conversations")
        if not form.question and form.answer and is_conversation(decode_messages(fields.take(form.answer))):
            form = replace(form, conversation=form.answer, answer=None)
        if form.plain and not any(is_conversation(decode_messages(fields.take(column))) for column in form.columns):
            example: Example = self._sft_text(fields, form)
        else:
            example = self._sft_chat(fields, form)
        self._name_unread(fields)
        return example

    def read_preference(self, row: Any) -> tuple[Example, Example]:
        """One preference row: the chosen and the rejected example. Raises RowError."""
        fields = Fields(_opened(row))
        form = choose_form(fields, self.keys, "pairs")
        if row_switches(fields, None) is False:
            raise RowError("the row's own weight is 0, but every pair counts in DPO; take the row out of the file")
        columns = [column for column in (form.chosen, form.rejected) if column]
        answers = _ranked(fields, form) if form.rank else [decode_messages(fields.take(column)) for column in columns]
        if form.plain and all(isinstance(value, str) for value in self._texts_of_pair(fields, form, answers)):
            pair: tuple[Example, Example] = self._text_pair(fields, form, answers)
        else:
            pair = self._chat_pair(fields, form, answers)
        self._name_unread(fields)
        return pair

    def read_prompt(self, row: Any) -> PromptExample:
        """One prompt and its reference answer ("" where the row has none). Raises RowError."""
        fields = Fields(row)
        form = choose_form(fields, self.keys, "prompts")
        written = ""
        question = self._question(fields, form)
        if isinstance(question, Turns) and form.conversation and question.last_role == "assistant":
            written, question = question.messages[-1]["content"], question[:-1]
            if not len(question):
                raise RowError(f"{form.conversation!r} holds no question")
        reference = self._reference(fields, written)
        tools, kwargs = None, {}
        if isinstance(question, str):
            prompt: Any = self.instructions.wrap_text(question)
        else:
            prompt = self._wrap(fields, question).messages
            tools, kwargs = self._tools(fields), self._template_kwargs(fields)
        shared = {*SYSTEM_COLUMNS, *TOOL_COLUMNS, "history", "chat_template_kwargs"}
        rest = fields.unread()
        self.notes += [Note(Kind.COLUMN if name in shared else Kind.EXTRA, name) for name in rest]
        extra = {name: fields.take(name) for name in rest}
        if reference.column not in ("", "answer"):
            extra[reference.column] = fields.take(reference.column)  # reward functions know it by its own name
        return PromptExample(prompt, reference.text, extra, reference.problem, tools, kwargs)

    # --- training rows

    def _sft_text(self, fields: Fields, form: Form) -> TextExample:
        texts = [as_text(fields.take(column), f"field {column!r}") for column in form.columns]
        trained = row_switches(fields, None) is not False
        if len(texts) == 1:
            self.instructions.refuse_whole_text()
            return TextExample("", texts[0], trained)
        return TextExample(self.instructions.wrap_text(texts[0]), texts[1], trained)

    def _sft_chat(self, fields: Fields, form: Form) -> ChatExample:
        question = self._question(fields, form)
        turns = turn("user", question) if isinstance(question, str) else question
        first = 0
        if form.answer is not None:
            first = len(turns)
            turns = turns + _as_turns(decode_messages(fields.take(form.answer)), form.answer)
        loss = self._loss(turns, row_switches(fields, len(turns)), first)
        if not any(message["role"] == "assistant" for message in turns.messages[first:]):
            column = form.answer or form.conversation
            raise RowError(f"{column!r} has no assistant message, so nothing carries loss")
        whole = self._wrap(fields, Turns(turns.messages, [*loss]))
        trained = tuple(
            message["role"] == "assistant" and switch is not False
            for message, switch in zip(whole.messages, whole.loss, strict=True)
        )
        return ChatExample(whole.messages, trained, self._tools(fields), self._template_kwargs(fields))

    def _loss(self, turns: Turns, row: bool | list[bool] | None, first: int) -> list[bool]:
        """Which messages carry loss: assistant messages from `first` on, unless they or the row say no."""
        switches = row if isinstance(row, list) else [row] * len(turns)
        loss = []
        for number, (message, own, other) in enumerate(zip(turns.messages, turns.loss, switches, strict=True)):
            may = message["role"] == "assistant" and number >= first
            asked = own is True or (isinstance(row, list) and other is True)
            if asked and not may:
                self.notes.append(Note(Kind.LOSS, "prompt" if message["role"] == "assistant" else message["role"]))
            loss.append(may and own is not False and other is not False)
            if loss[-1] and set(message) <= {"role", "content"} and not message["content"].strip():
                raise RowError(f"the answer in message {number + 1} is empty: only its end would be trained")
        return loss

    # --- pairs

    def _texts_of_pair(self, fields: Fields, form: Form, answers: list[Any]) -> list[Any]:
        return [*answers, *(decode_messages(fields.take(column)) for column in form.question[:1])]

    def _text_pair(self, fields: Fields, form: Form, answers: list[str]) -> tuple[TextExample, TextExample]:
        if form.question:
            prompt = as_text(fields.take(form.question[0]), f"field {form.question[0]!r}")
            if all(answer.startswith(prompt.strip()) for answer in answers):
                self.notes.append(Note(Kind.REPEATED, form.question[0]))
        elif fields.has("messages"):
            raise RowError("the row has no 'prompt', but 'messages'; if they are the prompt, set chat_key=messages")
        else:
            prompt, *answers = split_text_pair(*answers)
        wrapped = self.instructions.wrap_text(prompt)
        return TextExample(wrapped, answers[0]), TextExample(wrapped, answers[1])

    def _chat_pair(self, fields: Fields, form: Form, answers: list[Any]) -> tuple[ChatExample, ChatExample]:
        names = [form.chosen or form.rank or "messages", form.rejected or form.rank or "completions"]
        prompt: Turns | None = None
        if form.conversation or form.question:
            question = self._question(fields, form)
            prompt = turn("user", question) if isinstance(question, str) else question
            if form.conversation and not form.chosen and not form.rank:  # the conversation ends with the chosen answer
                prompt, answers = prompt[:-1], [prompt.messages[-1:], *answers]
        pair = [_as_turns(value, name) for value, name in zip(answers, names, strict=True)]
        prompt, completions = split_pair(prompt, pair, names)
        tools, kwargs = self._tools(fields), self._template_kwargs(fields)
        examples = []
        for name, completion in zip(names, completions, strict=True):
            if completion.last_role != "assistant":
                raise RowError(f"{name!r} does not end with an assistant message")
            loss = self._loss(completion, None, len(completion) - 1 if form.final_only else 0)
            if not any(loss):
                raise RowError(f"{name!r} keeps its answer out of the loss, but every pair counts in DPO")
            whole = self._wrap(
                fields, Turns(prompt.messages, [False] * len(prompt)) + Turns(completion.messages, [*loss])
            )
            trained = tuple(switch is True for switch in whole.loss)
            examples.append(ChatExample(whole.messages, trained, tools, kwargs))
        return examples[0], examples[1]

    # --- what all have in common

    def _question(self, fields: Fields, form: Form) -> Turns | str:
        """The conversation or prompt of a row; text only where it goes without the template."""
        if form.conversation is not None:
            return read_messages(fields.take(form.conversation), form.conversation)
        first = decode_messages(fields.take(form.question[0]))
        if is_conversation(first):
            return read_messages(first, form.question[0])
        texts = [first, *(fields.take(column) for column in form.optional if fields.has(column))]
        joined = "\n".join(
            as_text(text, f"field {column!r}") for text, column in zip(texts, form.question, strict=False)
        )
        return joined if form.plain else turn("user", joined)

    def _wrap(self, fields: Fields, turns: Turns) -> Turns:
        """With the row's earlier rounds and system message, and what the recipe puts around."""
        if fields.has("history"):
            turns = read_history(fields.take("history"), "history") + turns
        names = (self.keys.system_key,) if self.keys.system_key else SYSTEM_COLUMNS
        column = next((name for name in names if fields.has(name)), None)
        if column is not None:
            text = as_text(fields.take(column), f"field {column!r}")
            first = turns.messages[0] if len(turns) else {}
            if first.get("role") != "system":
                turns = turn("system", text) + turns
            elif first["content"].strip() != text.strip():
                raise RowError(f"the row has two system messages: its field {column!r} and its first message; keep one")
        return self.instructions.wrap_turns(turns)

    def _tools(self, fields: Fields) -> list[dict[str, Any]] | None:
        names = (self.keys.tool_key,) if self.keys.tool_key else TOOL_COLUMNS
        column = next((name for name in names if fields.has(name)), None)
        return (read_tools(fields.take(column), column) or None) if column is not None else None

    def _template_kwargs(self, fields: Fields) -> dict[str, Any]:
        if not fields.has("chat_template_kwargs"):
            return {}
        kwargs = from_json_text(fields.take("chat_template_kwargs"), "field 'chat_template_kwargs'")
        if kwargs is None:
            return {}
        if not isinstance(kwargs, dict):
            raise RowError(f"field 'chat_template_kwargs' is {type(kwargs).__name__}; wanted an object")
        if taken := sorted(RESERVED_KWARGS & set(kwargs)):
            raise RowError(f"field 'chat_template_kwargs' sets {taken}, which this run sets itself; take it out")
        return kwargs

    def _reference(self, fields: Fields, written: str) -> Reference:
        """The reference answer: in a column of its own, else what the conversation ends with."""
        columns = {name: fields.take(name) for name in fields.names if name not in fields.read and fields.has(name)}
        fields.read -= set(columns)
        key = self.keys.output_key
        if key is None and self.keys.reader == "ResponseDataset" and not written:
            key = "output"
        reference = find_reference(columns, key)
        if not reference.text and written:
            return Reference(written)
        if written:
            self.notes.append(Note(Kind.ANSWER, reference.column))
        if reference.text:
            fields.read.add(reference.column)
        return reference

    def _name_unread(self, fields: Fields) -> None:
        self.notes += [Note(Kind.COLUMN, name) for name in fields.unread()]


def _opened(row: Any) -> Any:
    """OpenAI's preference rows have messages and tools in an object under `input`: its fields become the row's own."""
    given = row.get("input") if isinstance(row, Mapping) else None
    if not isinstance(given, Mapping) or "messages" not in given:
        return row
    rest = {name: value for name, value in row.items() if name != "input"}
    if twice := sorted(name for name in given if rest.get(name) is not None):
        raise RowError(f"the row has {twice} both inside 'input' and beside it; keep one")
    return {**rest, **given}


def _as_turns(value: Any, name: str) -> Turns:
    """An answer: text, one message or several."""
    if is_conversation(value):
        return read_messages(value, name)
    text = as_text(value, f"field {name!r}")
    return turn("assistant", text)


def _ranked(fields: Fields, form: Form) -> list[Any]:
    """NeMo RL's `completions`: two, the one of lower rank is the better. Raises RowError."""
    assert form.rank is not None
    completions = from_json_text(fields.take(form.rank), f"field {form.rank!r}")
    wanted = f"field {form.rank!r}: wanted two objects with 'rank' and 'completion'"
    if not isinstance(completions, list) or len(completions) != 2:
        raise RowError(f"{wanted}, got {len(completions) if isinstance(completions, list) else completions!r}")
    for completion in completions:
        if not isinstance(completion, dict) or not isinstance(completion.get("rank"), int | float):
            raise RowError(f"{wanted}; one has no rank")
        if not completion.get("completion"):
            raise RowError(f"{wanted}; one has a null or empty completion")
    first, second = sorted(completions, key=lambda completion: completion["rank"])
    if first["rank"] == second["rank"]:
        raise RowError(f"field {form.rank!r}: both have rank {first['rank']}, so none is preferred; take the row out")
    return [first["completion"], second["completion"]]
