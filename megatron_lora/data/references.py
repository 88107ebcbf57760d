"""GRPO's reference answers: which column of a row holds one, and which rows have none."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from megatron_lora.data.values import from_json_text

# In order: the first that a row has is its reference. `reward_model.ground_truth` is verl's.
REFERENCE_COLUMNS = (
    "answer", "final_answer", "expected_answer", "reference_answer", "ground_truth", "gt_answer", "reward_model",
    "target", "label", "solution", "completion", "output", "response",
)  # fmt: skip


@dataclass(frozen=True)
class Reference:
    """text: the reference answer, "" where there is none. column: where it stood. problem: why there is none, "" where
    there is one."""

    text: str = ""
    column: str = ""
    problem: str = ""


class HasReference(Protocol):
    """What `rows_without_reference` reads: a `Prompt`."""

    @property
    def index(self) -> int: ...

    @property
    def no_reference(self) -> str: ...


def find_reference(row: Mapping[str, Any], column: str | None = None) -> Reference:
    """The reference answer of a row without nulls. column: the recipe's output_key; None for the first known name."""
    if column is None:
        held = (name for name in REFERENCE_COLUMNS if row.get(name) is not None and str(row[name]).strip())
        column = next(held, None)
    if column is None:
        return Reference(problem=f"no column holds one (read are {', '.join(REFERENCE_COLUMNS)})")
    value, where = row.get(column), f"column {column!r}"
    if isinstance(value, str) and column == "reward_model":
        value = from_json_text(value, where)
    if isinstance(value, Mapping) and "ground_truth" in value:
        value, where = value["ground_truth"], f"'{column}.ground_truth'"
    if isinstance(value, list) and value and all(isinstance(part, Mapping) and "role" in part for part in value):
        value = value[-1].get("content")  # TRL's completion as messages
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        kind = {dict: "an object", list: "a list", bool: "true or false", type(None): "null"}.get(
            type(value), "no text"
        )
        return Reference(column=column, problem=f"{where} is {kind}; wanted one text or number")
    if not str(value).strip():
        return Reference(column=column, problem=f"{where} is empty")
    return Reference(str(value), column)


def rows_without_reference(prompts: Sequence[HasReference]) -> str:
    """Which rows have no reference answer, in words for a message ("3 rows, the first is row 7: ..."); "" for none."""
    missing = [prompt for prompt in prompts if prompt.no_reference]
    if not missing:
        return ""
    first = missing[0]
    rows = "1 row has" if len(missing) == 1 else f"{len(missing)} rows have"
    return f"{rows} no reference answer, the first is row {first.index}: {first.no_reference}"
