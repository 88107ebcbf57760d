"""Files of rows: JSON lines and arrays, plain or compressed, parquet, Arrow and CSV."""

import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_lora.errors import UserError

RawRow = Mapping[str, Any]
# In an object, the key whose list of objects is the rows.
ARRAY_KEY = "data"


def read_rows(path: Path, where: str = "data_path") -> Sequence[RawRow]:
    """Every row of a file, whose ending says its kind: see FILE_KINDS.

    Row numbers are a JSONL file's lines, counted from 1; blank lines at the end do not count. Raises UserError naming
    file and row: a file that cannot be read, a line that is no JSON object, a number that JSON does not have (NaN), a
    field named twice.
    """
    name = path.name.lower()
    opener: Callable[[bytes], bytes] = bytes
    for ending, decompress in COMPRESSIONS.items():
        if name.endswith(ending):
            name, opener = name.removesuffix(ending), decompress
    read = next((kind for ending, kind in FILE_KINDS.items() if name.endswith(ending)), _read_json)
    try:
        content = opener(path.read_bytes())
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise _unreadable(path, where, error) from error
    return read(path, content, where)


def _unreadable(path: Path, where: str, error: Exception) -> UserError:
    kinds = ", ".join(FILE_KINDS)
    return UserError(
        f"{where}={path} cannot be read ({error}); give a file of rows ({kinds}, also with {', '.join(COMPRESSIONS)})"
    )


def _zstd(content: bytes) -> bytes:
    import zstandard

    try:
        with zstandard.ZstdDecompressor().stream_reader(io.BytesIO(content), read_across_frames=True) as stream:
            return stream.read()
    except zstandard.ZstdError as error:
        raise ValueError(str(error)) from error


def _decode(path: Path, content: bytes, where: str) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{where}={path} cannot be read ({error}); give a file in UTF-8") from error


# --- JSON


def _read_json(path: Path, content: bytes, where: str) -> list[dict[str, Any]]:
    """One array of objects, one object with such an array under `data`, or one object a line."""
    text = _decode(path, content, where)
    start = text.lstrip()[:1]
    if start == "[":
        return _check_objects(path, _parse(path, text, None))
    if start == "{" and _is_one_value(text):
        return _check_objects(path, _rows_of_object(path, _parse(path, text, 1)))
    return _read_lines(path, text)


def _is_one_value(text: str) -> bool:
    """Whether the text is one JSON object, over however many lines; reads the first object only."""
    body = text.lstrip()
    try:
        _, end = json.JSONDecoder().raw_decode(body)
    except (json.JSONDecodeError, RecursionError):
        return False
    return not body[end:].strip()


def _rows_of_object(path: Path, value: dict[str, Any]) -> list[Any]:
    """The rows under `data`, or the object itself as the only row."""
    rows = value.get(ARRAY_KEY)
    if not (isinstance(rows, list) and rows and all(isinstance(row, dict) for row in rows)):
        return [value]
    if len(value) > 1:
        others = sorted(set(value) - {ARRAY_KEY})
        raise UserError(f"{path}: beside its rows under {ARRAY_KEY!r} it has {others}; give the array of rows alone")
    return rows


def _read_lines(path: Path, text: str) -> list[dict[str, Any]]:
    lines = text.split("\n")
    while lines and not lines[-1].strip():
        lines.pop()
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            raise UserError(f"{path}, row {number}: the row is empty; every line must hold one JSON object")
        rows.append(_check_object(path, number, _parse(path, line, number)))
    return rows


def _parse(path: Path, text: str, number: int | None) -> Any:
    where = str(path) if number is None else f"{path}, row {number}"

    def refuse_constant(name: str) -> None:
        raise UserError(f"{where}: {name} is no JSON value; write null or leave the field out")

    def refuse_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        fields = dict(pairs)
        if len(fields) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise UserError(f"{where}: the field {twice!r} is there twice in one object; keep one")
        return fields

    try:
        return json.loads(text, parse_constant=refuse_constant, object_pairs_hook=refuse_twice)
    except json.JSONDecodeError as error:
        wanted = "the file must hold one array of objects" if number is None else "every line must hold one JSON object"
        raise UserError(f"{where}: no JSON ({error.msg} at column {error.colno}); {wanted}") from error
    except UserError:
        raise
    except (RecursionError, ValueError) as error:  # nested too deeply, or a number of thousands of digits
        raise UserError(f"{where}: no JSON that can be read ({error}); mend it") from error


def _check_objects(path: Path, rows: Any) -> list[dict[str, Any]]:
    return [_check_object(path, number, row) for number, row in enumerate(rows, start=1)]


def _check_object(path: Path, number: int, row: Any) -> dict[str, Any]:
    if not isinstance(row, dict) or not row:
        got = "an empty object" if row == {} else type(row).__name__
        raise UserError(f"{path}, row {number}: wanted a JSON object with fields, got {got}")
    return row


# --- tables


class _ArrowRows(Sequence[RawRow]):
    """A table's rows, made when asked for."""

    def __init__(self, table: Any):
        self._table = table

    def __len__(self) -> int:
        return self._table.num_rows

    def __getitem__(self, position):  # type: ignore[override]  # no slices
        if not 0 <= position < len(self):
            raise IndexError(position)
        return self._table.slice(position, 1).to_pylist()[0]


def _read_parquet(path: Path, content: bytes, where: str) -> Sequence[RawRow]:
    import pyarrow
    from pyarrow import parquet

    try:
        return _ArrowRows(parquet.read_table(pyarrow.BufferReader(content)))
    except (pyarrow.ArrowException, OSError) as error:
        raise _unreadable(path, where, error) from error


def _read_arrow(path: Path, content: bytes, where: str) -> Sequence[RawRow]:
    """An Arrow stream (as `datasets` saves) or file."""
    import pyarrow

    try:
        try:
            return _ArrowRows(pyarrow.ipc.open_stream(content).read_all())
        except pyarrow.ArrowInvalid:
            return _ArrowRows(pyarrow.ipc.open_file(content).read_all())
    except (pyarrow.ArrowException, OSError) as error:
        raise _unreadable(path, where, error) from error


def _read_csv(path: Path, content: bytes, where: str, delimiter: str = ",") -> list[dict[str, Any]]:
    """A header, then a row each; an empty cell is an absent field. All values are text."""
    text = _decode(path, content, where)
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        header = next(reader, [])
        if len(set(header)) < len(header) or not all(name.strip() for name in header):
            raise UserError(f"{path}: the first line must name every column, each once; got {header}")
        rows = []
        for number, cells in enumerate((cells for cells in reader if cells), start=1):
            if len(cells) != len(header):
                raise UserError(f"{path}, row {number}: {len(cells)} cells for {len(header)} columns; quote the texts")
            rows.append({name: cell if cell else None for name, cell in zip(header, cells, strict=True)})
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: no CSV ({error})") from error
    return rows


def _read_tsv(path: Path, content: bytes, where: str) -> list[dict[str, Any]]:
    return _read_csv(path, content, where, delimiter="\t")


COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {".gz": gzip.decompress, ".zst": _zstd}
# Any other ending is read as JSON.
FILE_KINDS: dict[str, Callable[[Path, bytes, str], Sequence[RawRow]]] = {
    ".jsonl": _read_json,
    ".json": _read_json,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
}
