"""One raw row, field by field: nulls are absent, what was read is remembered, what cannot be text is refused."""

import json
import math
from collections.abc import Mapping
from typing import Any


class RowError(ValueError):
    """A row that cannot be used; the message says why, the caller adds where it stands."""


class Fields:
    """The fields of a row. Raises RowError for a row that is no object or is empty.

    A null is an absent field, at every depth (Arrow fills what other rows have with nulls); in a list of plain values
    it stays. A field that holds NaN, infinity or half a surrogate pair is refused when it is read.
    """

    def __init__(self, row: Any):
        if not isinstance(row, Mapping):
            raise RowError(f"wanted a JSON object, got {type(row).__name__}")
        if not row:
            raise RowError("the row is empty")
        self._row = row
        self.read: set[str] = set()

    def __contains__(self, name: object) -> bool:
        """Whether the row names this field, with whatever value."""
        return name in self._row

    @property
    def names(self) -> list[str]:
        return sorted(map(str, self._row))

    def has(self, name: str) -> bool:
        """Whether the field holds something: no null, no blank text, no empty list or object."""
        value = self._row.get(name)
        return bool(value.strip()) if isinstance(value, str) else value is not None and value not in ([], {}, ())

    def take(self, name: str) -> Any:
        """The field's value without nulls; None where it has none. It counts as read."""
        self.read.add(name)
        return without_nulls(self._row.get(name), repr(name))

    def unread(self) -> list[str]:
        """The fields that hold something and that nobody took."""
        return [name for name in self._row if name not in self.read and self.has(name)]

    def why_absent(self, name: str) -> str:
        if name not in self._row:
            return f"field {name!r} is missing; the row has {self.names}"
        return f"field {name!r} is {'null' if self._row[name] is None else 'empty'}"


def without_nulls(value: Any, path: str) -> Any:
    """`value` without absent fields. Raises RowError, naming the path, for what no text or JSON can hold."""
    if isinstance(value, Mapping):
        kept = {without_nulls(name, path): without_nulls(part, f"{path}.{name}") for name, part in value.items()}
        return {name: part for name, part in kept.items() if part is not None}
    if isinstance(value, list | tuple):
        return [without_nulls(part, path) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        raise RowError(f"field {path} holds {'NaN' if math.isnan(value) else 'infinity'}, which is no number; mend it")
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise RowError(
                f"field {path} holds half a surrogate pair (\\u{ord(value[error.start]):04x} at character "
                f"{error.start + 1}), which is no Unicode text; mend the file"
            ) from error
    return value


def from_json_text(value: Any, what: str) -> Any:
    """A list or object that a column holds as JSON text, decoded; anything else as it is. None: the text says null,
    the field is absent. Raises RowError."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise RowError(
            f"{what} is text, but no JSON ({error}); wanted a list or object, or that as JSON text"
        ) from error


def as_text(value: Any, what: str) -> str:
    """A text field; whole and decimal numbers are written out. Raises RowError."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise RowError(f"{what} is {type(value).__name__}; wanted text")
    return value
