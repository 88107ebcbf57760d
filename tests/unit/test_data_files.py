"""Every kind of file gives the rows that were put into it; `data.show` and the docs say what the code does."""

import csv
import gzip
import io
import json
from pathlib import Path

import pyarrow
import pytest
import zstandard
from datasets import Dataset
from pyarrow import parquet
from row_recipes import assistant, calling, run_show, user

from megatron_lora.data.files import read_rows
from megatron_lora.data.forms import FORMS, algorithms_of
from megatron_lora.data.sources import SourceSpec, load_source

ROWS = [{"prompt": "P", "completion": "A"}, {"prompt": "P2\u2028", "completion": "A2"}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


def table() -> bytes:
    sink = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), sink)
    return sink.getvalue()


def comma_separated() -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, ["prompt", "completion"])
    writer.writeheader()
    writer.writerows(ROWS)
    return text.getvalue().encode()


CONTENTS = {
    "a.jsonl": LINES.encode(),
    "bom.jsonl": b"\xef\xbb\xbf" + LINES.encode(),
    "blank.jsonl": LINES.encode() + b"\n  \n\n",
    "windows.jsonl": LINES.replace("\n", "\r\n").encode(),
    "lines.json": LINES.encode(),
    "array.json": json.dumps(ROWS, indent=1).encode(),
    "array.jsonl": json.dumps(ROWS).encode(),
    "data.json": json.dumps({"data": ROWS}, indent=1).encode(),
    "a.jsonl.gz": gzip.compress(LINES.encode()),
    "two.jsonl.gz": gzip.compress(LINES[:10].encode()) + gzip.compress(LINES[10:].encode()),
    "a.jsonl.zst": zstandard.compress(LINES.encode()),
    "array.json.zst": zstandard.compress(json.dumps(ROWS).encode()),
    "a.parquet": table(),
    "a.csv": comma_separated(),
    "a.txt": LINES.encode(),
}


@pytest.mark.parametrize("name", CONTENTS)
def test_every_kind_of_file(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(CONTENTS[name])
    assert list(read_rows(tmp_path / name)) == ROWS


def test_one_object_is_one_row(tmp_path: Path) -> None:
    (tmp_path / "one.json").write_text(json.dumps(ROWS[0], indent=2))
    assert list(read_rows(tmp_path / "one.json")) == ROWS[:1]


def test_a_saved_data_set_is_read_from_its_folder(tmp_path: Path) -> None:
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    source = load_source(SourceSpec("ResponseDataset", data_path=str(tmp_path / "saved")))
    assert [source[position][1] for position in range(2)] == ROWS


def test_nulls_that_arrow_fills_in_are_absent(tmp_path: Path) -> None:
    rows = [
        {"messages": [user("1?"), calling({"a": 12}), assistant("x", mood="glad")], "tools": None},
        {"messages": [user("1?"), calling({"b": 7}), assistant("y")], "tools": [{"name": "add"}]},
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    filled = read_rows(tmp_path / "a.parquet")[0]["messages"][1]["tool_calls"][0]["function"]["arguments"]
    assert filled == {"a": 12, "b": None}
    shown = run_show(tmp_path, "sft", (tmp_path / "a.parquet").read_bytes(), file="a.parquet")
    assert '"arguments": {"a": 12}}' in shown.trained("row", 1)[0] and "null" not in shown.part("row")["text"]
    assert '"arguments": {"b": 7}}' in shown.trained("row", 2)[0]
    assert "does not render: 'mood' (row 1)" in shown.said


def test_what_show_prints_for_the_eye(tmp_path: Path, capsys) -> None:
    from megatron_lora.data import show

    rows = [{"prompt": "12+7=", "completion": "19", "source": "web"}, {"prompt": "1" * 90, "completion": "2"}]
    assert run_show(tmp_path, "sft", rows).status == 0
    limit = ("policy.max_total_sequence_length=20",)
    assert show.main([str(tmp_path / "recipe.yaml"), "--rows", "2", *limit]) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("--- train row 1, row: ") and "\n12+7=[[19<|im_end|>]]\n" in printed.out
    assert "--- train row 2, row: dropped, no token that carries loss is left within 20 tokens" in printed.out
    assert (
        "train: 2 rows, 1 kept" in printed.err and "train: columns that nothing reads: 'source' (2" not in printed.err
    )
    assert "nothing reads: 'source' (row 1)" in printed.err
    dropped = run_show(tmp_path, "sft", rows, overrides=limit).rows[1]
    assert dropped == {
        "set": "train",
        "row": 2,
        "part": "row",
        "dropped": "no token that carries loss is left within 20 tokens",
    }
    assert show.main([str(tmp_path / "recipe.yaml"), "data.train.form=nonsense"]) == 2
    assert "data.train.form=nonsense is none of sft's: messages" in capsys.readouterr().err


def test_an_answer_that_a_reward_needs_is_missed_before_anything_else(tmp_path: Path) -> None:
    shown = run_show(tmp_path, "grpo", [{"prompt": "1+1", "answer": "2"}, {"prompt": "1+1", "answer": ["2"]}])
    assert (
        shown.status == 2
        and "1 row has no reference answer, the first is row 2: column 'answer' is a list" in shown.said
    )
    assert "env.reward_functions has 'exact'" in shown.said
    other = ("env.reward_functions=[{kind: length, max_tokens: 3}]",)
    shown = run_show(tmp_path, "grpo", [{"prompt": "1+1", "answer": ["2"]}], overrides=other)
    assert shown.status == 0 and shown.part("prompt")["answer"] == ""


@pytest.mark.parametrize(
    ("row", "answer"),
    [
        ({"prompt": [user("1+1")], "reward_model": {"style": "rule", "ground_truth": "2"}, "data_source": "x"}, "2"),
        ({"prompt": "1+1", "final_answer": 2}, "2"),
        ({"question": "1+1", "answer": "so\n#### 2"}, "so\n#### 2"),
        ({"messages": [user("1+1"), assistant("2")]}, "2"),
        ({"conversations": [{"from": "human", "value": "1+1"}, {"from": "gpt", "value": "2"}]}, "2"),
    ],
)
def test_reference_answers(tmp_path: Path, row: dict, answer: str) -> None:
    shown = run_show(tmp_path, "grpo", [row])
    assert shown.status == 0, shown.said
    assert shown.part("prompt")["answer"] == answer
    if "data_source" in row:
        assert "columns that only reward functions can read: 'data_source' (row 1)" in shown.said


def test_the_table_in_the_docs_is_the_codes() -> None:
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    for kind, forms in FORMS.items():
        rows = [line for line in page.splitlines() if line.startswith(f"| {algorithms_of(kind)} | ")]
        assert rows == [form.doc_row(kind) for form in forms], f"the rows of {kind} differ from forms.py"


def test_each_json_object_is_one_line_whatever_its_text_holds(tmp_path: Path) -> None:
    text = "a\u2028b\u2029c\x85d"
    shown = run_show(tmp_path, "sft", [{"prompt": text, "completion": "A"}])
    assert shown.part("row")["text"].startswith(text)
