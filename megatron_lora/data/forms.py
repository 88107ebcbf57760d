"""The forms of rows that people have: which columns make a form, and which of them a row has."""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_lora.config.algorithm_section import RowKind
from megatron_lora.config.schema import ALGORITHMS
from megatron_lora.data.values import Fields, RowError


@dataclass(frozen=True)
class Form:
    """How one form of rows is read.

    name: the value of `data.train.form`. origin: who writes it. conversation: the column of messages. question: the
    columns whose texts, line by line, are the user's message; only the first is required. answer: the column of the
    answer. chosen, rejected: a pair's. rank: column of NeMo RL's ranked completions. plain: texts are tokenized as
    they stand, without the chat template. final_only: a pair's loss falls on the last answer alone.
    """

    name: str
    origin: str
    conversation: str | None = None
    question: tuple[str, ...] = ()
    answer: str | None = None
    chosen: str | None = None
    rejected: str | None = None
    rank: str | None = None
    plain: bool = False
    final_only: bool = False

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that make the form complete."""
        named = (self.conversation, *self.question[:1], self.answer, self.rank, self.chosen, self.rejected)
        return tuple(column for column in named if column is not None)

    @property
    def optional(self) -> tuple[str, ...]:
        return self.question[1:]

    @property
    def becomes(self) -> str:
        """What a row becomes, for the docs."""
        if self.rank is not None:
            return "the conversation, with the completion of lower rank over the other"
        answers = "" if self.rejected is None else " and its two answers"
        if self.conversation is not None:
            return f"the conversation{answers}"
        if self.plain:
            return "plain text, no template; a conversation where a column holds messages"
        return f"a user message{answers}" if self.answer is None else "a user and an assistant message"

    def doc_row(self, kind: RowKind) -> str:
        """The form's row in docs/data.md."""
        columns = ", ".join(f"`{column}`" for column in self.columns)
        optional = ", ".join(f"`{column}`" for column in self.optional)
        return f"| {algorithms_of(kind)} | `{self.name}` | {self.origin} | {columns} | {optional} | {self.becomes} |"


CONVERSATION_FORMS = (
    Form("messages", "OpenAI, TRL", conversation="messages"),
    Form("conversations", "ShareGPT", conversation="conversations"),
    Form("conversation", "ShareGPT", conversation="conversation"),
    Form("prompt-completion", "TRL", question=("prompt",), answer="completion", plain=True),
    Form("instruction-output", "Alpaca", question=("instruction", "input"), answer="output"),
    Form("instruction-response", "Dolly", question=("instruction", "context", "input"), answer="response"),
    Form("input-output", "NeMo RL", question=("input",), answer="output"),
    Form("question-answer", "GSM8K", question=("question",), answer="answer"),
    Form("question-response", "OpenOrca", question=("question",), answer="response"),
    Form("query-response", "ms-swift", question=("query",), answer="response"),
    Form("problem-solution", "NuminaMath", question=("problem",), answer="solution"),
    Form("prompt-response", "OpenRLHF", question=("prompt",), answer="response"),
    Form("text", "TRL, language modelling", answer="text", plain=True),
)
PAIR_FORMS = (
    Form("prompt-chosen-rejected", "TRL", question=("prompt",), chosen="chosen", rejected="rejected", plain=True),
    Form("question-chosen-rejected", "Orca", question=("question",), chosen="chosen", rejected="rejected"),
    Form(
        "instruction-chosen-rejected",
        "LLaMA-Factory",
        question=("instruction", "input"),
        chosen="chosen",
        rejected="rejected",
    ),
    Form("input-chosen-rejected", "Intel Orca", question=("input",), chosen="chosen", rejected="rejected"),
    Form("query-response-rejected", "ms-swift", question=("query",), chosen="response", rejected="rejected_response"),
    Form("messages-rejected", "ms-swift", conversation="messages", rejected="rejected_response"),
    Form(
        "conversations-chosen-rejected",
        "LLaMA-Factory",
        conversation="conversations",
        chosen="chosen",
        rejected="rejected",
    ),
    Form(
        "messages-preferred",
        "OpenAI, whose `input` object is opened",
        conversation="messages",
        chosen="preferred_output",
        rejected="non_preferred_output",
    ),
    Form("context-completions", "NeMo RL", conversation="context", rank="completions", final_only=True),
    Form("chosen-rejected", "TRL, implicit prompt", chosen="chosen", rejected="rejected", plain=True),
)
PROMPT_FORMS = (
    Form("prompt", "TRL, verl", question=("prompt",), plain=True),
    Form("messages", "OpenAI", conversation="messages"),
    Form("conversations", "ShareGPT", conversation="conversations"),
    Form("question", "GSM8K", question=("question",)),
    Form("problem", "mathematics", question=("problem",)),
    Form("instruction", "Alpaca", question=("instruction", "input")),
    Form("input", "NeMo RL", question=("input",)),
    Form("query", "ms-swift", question=("query",)),
)
FORMS: dict[RowKind, tuple[Form, ...]] = {
    "conversations": CONVERSATION_FORMS,
    "pairs": PAIR_FORMS,
    "prompts": PROMPT_FORMS,
}


def algorithms_of(kind: RowKind) -> str:
    """The names of the algorithms that train on rows of this kind."""
    return ", ".join(name for name, section in ALGORITHMS.items() if section.rows == kind)


# What a row of any form that goes through the chat template may have besides.
SYSTEM_COLUMNS = ("system", "system_prompt")
TOOL_COLUMNS = ("tools", "functions")
SHARED_COLUMNS = (*SYSTEM_COLUMNS, "history", *TOOL_COLUMNS, "chat_template_kwargs")


@dataclass(frozen=True)
class Keys:
    """The recipe's names for a row's fields, and NeMo RL's class that reads them; None where it names none."""

    input_key: str | None = None
    output_key: str | None = None
    chosen_key: str | None = None
    rejected_key: str | None = None
    chat_key: str | None = None
    system_key: str | None = None
    tool_key: str | None = None
    form: str | None = None
    reader: str | None = None

    @property
    def names_columns(self) -> bool:
        named = (self.input_key, self.output_key, self.chosen_key, self.rejected_key, self.chat_key, self.form)
        return any(value is not None for value in named)


def choose_form(fields: Fields, keys: Keys, kind: RowKind) -> Form:
    """The one form that the row has: what the recipe names, else the known one whose columns hold something.

    A form whose columns all belong to another that is complete is no form of its own (Alpaca's `input` and `output`).
    Raises RowError where there is none, with what is missing, and where there are two.
    """
    named = named_form(keys, kind) or _nemo_rl_form(fields, keys, kind)
    if named is not None:
        for column in named.columns:
            if not fields.has(column):
                raise RowError(fields.why_absent(column))
        return named
    forms = FORMS[kind]
    complete = [form for form in forms if all(map(fields.has, form.columns))]
    kept = [form for form in complete if not any(_covers(other, form) for other in complete)]
    if len(kept) == 1:
        return kept[0]
    if not kept:
        raise RowError(_why_none(fields, forms))
    found = " and ".join(f"{form.name} ({', '.join(map(repr, form.columns))})" for form in kept)
    raise RowError(
        f"the row has {len(kept)} forms at once: {found}; keep the columns of one, or say which with data.train.form "
        f"(form={kept[0].name})"
    )


def named_form(keys: Keys, kind: RowKind) -> Form | None:
    """The form that the recipe's keys make; None where they name no column. Raises RowError for an unknown name."""
    if keys.form is not None:
        known = {form.name: form for form in FORMS[kind]}
        if keys.form not in known:
            raise RowError(f"form={keys.form} is none of {algorithms_of(kind)}'s: {', '.join(known)}")
        return known[keys.form]
    if not keys.names_columns:
        return None
    plain = keys.reader is None
    if kind == "pairs":
        names = (keys.input_key or "prompt", keys.chosen_key or "chosen", keys.rejected_key or "rejected")
        if keys.chat_key is not None:
            return Form("named", "", keys.chat_key, chosen=names[1], rejected=names[2])
        plain = plain and names == ("prompt", "chosen", "rejected")
        return Form("named", "", None, names[:1], None, *names[1:], plain=plain)
    if keys.chat_key is not None:
        return Form("named", "", keys.chat_key)
    if kind == "prompts":
        return _named_prompt(keys, plain)
    names = (keys.input_key or "input", keys.output_key or "output")
    return Form("named", "", None, names[:1], names[1], plain=plain and names == ("prompt", "completion"))


def _named_prompt(keys: Keys, plain: bool) -> Form | None:
    if keys.input_key is None:
        return None  # output_key alone names the reference; the row's form says where the question is
    return Form("named", "", None, (keys.input_key,), plain=plain and keys.input_key == "prompt")


def _nemo_rl_form(fields: Fields, keys: Keys, kind: RowKind) -> Form | None:
    """What NeMo RL's data set classes read where the recipe names no column: always messages for the template."""
    if keys.reader == "ResponseDataset" and kind != "pairs":
        if "messages" in fields:
            return Form("messages", "", "messages")
        return Form("ResponseDataset", "", None, ("input",), "output" if kind == "conversations" else None)
    if keys.reader == "BinaryPreferenceDataset" and kind == "pairs":
        return Form("BinaryPreferenceDataset", "", None, ("prompt",), None, "chosen", "rejected", final_only=True)
    if keys.reader == "PreferenceDataset" and kind == "pairs":
        return next(form for form in PAIR_FORMS if form.rank is not None)
    if keys.reader == "openai_format" and kind != "pairs":
        return Form("messages", "", "messages")
    return None


def _covers(other: Form, form: Form) -> bool:
    """Whether `other` reads all columns of `form`, and more."""
    theirs, ours = {*other.columns, *other.optional}, set(form.columns)
    return other is not form and ours <= theirs and not set(other.columns) <= ours


def _why_none(fields: Fields, forms: Sequence[Form]) -> str:
    """What is missing from the form that comes nearest, else which forms there are."""
    nearest = max(forms, key=lambda form: sum(column in fields for column in form.columns) / len(form.columns))
    absent = [column for column in nearest.columns if not fields.has(column)]
    if len(absent) < len(nearest.columns) or any(column in fields for column in absent):
        return fields.why_absent(absent[0])
    wanted = ", ".join(" and ".join(map(repr, form.columns)) for form in forms)
    return f"the row has {fields.names}; wanted one of: {wanted} (or name the columns with input_key and output_key)"
