"""What rows hold that a run does not honour, counted over a data set and told once."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple


class Kind(StrEnum):
    """What a note is about; the value is how a notice begins."""

    COLUMN = "columns that nothing reads"
    EXTRA = "columns that only reward functions can read"
    MESSAGE_KEY = "message keys that the chat template does not render"
    TEMPLATE_KEY = "chat_template_kwargs that the chat template does not read"
    THINKING = "thinking that the chat template strips, so that it is not trained"
    TEXT = "message text that the chat template drops or changes"
    TOOLS = "tools that the chat template does not render"
    LOSS = "loss asked for where none is given"
    END = "answers that end with an end token of their own: it is trained once"
    SPECIAL = "special tokens written in messages, encoded as such"
    REPEATED = "answers that repeat the prompt, which stays there twice"
    ANSWER = "last assistant messages that are not read, since a column holds the reference answer"


class Note(NamedTuple):
    """One thing in one row. name: the column, key or place."""

    kind: Kind
    name: str


@dataclass
class Notices:
    """Notes of a whole data set: how many rows have each, and the first of them."""

    rows: Counter[Note] = field(default_factory=Counter)
    first: dict[Note, int] = field(default_factory=dict)

    def add(self, number: int, notes: Iterable[Note]) -> None:
        """number: the row's, counted from 1."""
        for note in set(notes):
            self.rows[note] += 1
            self.first.setdefault(note, number)

    def lines(self) -> list[str]:
        """One line a kind, in the kinds' order."""
        found = []
        for kind in Kind:
            notes = [note for note in sorted(self.rows, key=lambda note: note.name) if note.kind is kind]
            if notes:
                found.append(f"{kind}: {', '.join(map(self._describe, notes))}")
        return found

    def _describe(self, note: Note) -> str:
        count = self.rows[note]
        rows = f"row {self.first[note]}" if count == 1 else f"{count} rows, first row {self.first[note]}"
        return f"{note.name!r} ({rows})"
