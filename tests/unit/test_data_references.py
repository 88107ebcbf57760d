"""Reference answers: the names they go by, what is none, and which rows lack one."""

import pytest

from megatron_lora.data.examples import Instructions
from megatron_lora.data.forms import Keys
from megatron_lora.data.parse import RowReader
from megatron_lora.data.references import find_reference, rows_without_reference


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"answer": "2"}, "2"),
        ({"final_answer": 2}, "2"),
        ({"label": 0}, "0"),
        ({"answer": "", "solution": "so 2"}, "so 2"),
        ({"solution": "so 2", "answer": "2"}, "2"),
        ({"reward_model": {"style": "rule", "ground_truth": "2"}}, "2"),
        ({"completion": [{"role": "assistant", "content": "2"}]}, "2"),
    ],
)
def test_known_names(row: dict, text: str) -> None:
    assert find_reference(row).text == text


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"prompt": "1+1"}, "no column holds one"),
        ({"answer": ["2", "two"]}, "column 'answer' is a list"),
        ({"answer": {"value": 2}}, "column 'answer' is an object"),
        ({"reward_model": {"ground_truth": ["2"]}}, "'reward_model.ground_truth' is a list"),
        ({"label": True}, "column 'label' is true or false"),
        ({"answer": " "}, "no column holds one"),
    ],
)
def test_what_is_no_reference(row: dict, problem: str) -> None:
    reference = find_reference(row)
    assert reference.text == "" and problem in reference.problem
    # A reward function of the user's may still want the column as it is.
    example = RowReader(Keys(), Instructions(), []).read_prompt({"prompt": "1+1", **row})
    assert example.no_reference == reference.problem
    kept = [name for name, value in row.items() if name != "prompt" and value != " "]
    assert all(example.extra[name] == row[name] for name in kept)


def test_rows_without_one_are_counted() -> None:
    class Item:
        def __init__(self, index: int, no_reference: str):
            self.index, self.no_reference = index, no_reference

    assert rows_without_reference([Item(1, ""), Item(2, "")]) == ""
    assert rows_without_reference([Item(1, ""), Item(5, "empty"), Item(7, "a list")]) == (
        "2 rows have no reference answer, the first is row 5: empty"
    )
