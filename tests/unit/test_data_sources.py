"""Raw rows: files, built-in data sets, the hub's table, and one clear message for each kind of bad row."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from megatron_lora.data.arithmetic import arithmetic_rows
from megatron_lora.data.examples import (
    ChatExample,
    Example,
    Instructions,
    PromptExample,
    TextExample,
    load_instructions,
)
from megatron_lora.data.forms import Keys
from megatron_lora.data.hub import HUB_DATASETS
from megatron_lora.data.parse import RowReader
from megatron_lora.data.sources import GSM8K_VARIABLE, Source, SourceSpec, hold_out, load_source
from megatron_lora.data.values import RowError
from megatron_lora.errors import UserError

NONE = (Keys(), Instructions())
USER = {"role": "user", "content": "How?"}
GOOD = {"role": "assistant", "content": "Well"}
BAD = {"role": "assistant", "content": "Badly"}


def parse_sft(row: Any, keys: Keys, instructions: Instructions) -> Example:
    return RowReader(keys, instructions, []).read_sft(row)


def parse_preference(row: Any, keys: Keys, instructions: Instructions) -> tuple[Example, Example]:
    return RowReader(keys, instructions, []).read_preference(row)


def parse_prompt(row: Any, keys: Keys, instructions: Instructions) -> PromptExample:
    return RowReader(keys, instructions, []).read_prompt(row)


def write_jsonl(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def raw(source: Source, position: int) -> Mapping[str, Any]:
    row = source[position][1]
    assert not isinstance(row, RowError)
    return row


def test_sft_forms() -> None:
    assert parse_sft({"prompt": "12+7=", "completion": "19"}, *NONE) == TextExample("12+7=", "19")
    chat = ChatExample([USER, GOOD], (False, True))
    assert parse_sft({"messages": [USER, GOOD]}, *NONE) == chat
    assert parse_sft({"input": "How?", "output": "Well"}, *NONE) == chat
    assert parse_sft({"question": "How?", "answer": "Well"}, *NONE) == chat
    assert parse_sft({"prompt": [USER], "completion": [GOOD]}, *NONE) == chat
    assert parse_sft({"q": "How?", "a": "Well"}, Keys("q", "a"), Instructions()) == chat
    assert parse_sft({"prompt": "1", "completion": 2, "messages": [USER]}, Keys("prompt", "completion"), NONE[1]) == (
        TextExample("1", "2")
    )


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({}, "the row is empty"),
        ({"prompt": "a"}, "field 'completion' is missing"),
        ({"answer": "a"}, "field 'question' is missing"),
        ({"body": "a"}, "wanted one of: 'messages', .*'prompt' and 'completion'"),
        ({"prompt": "a", "completion": " "}, "field 'completion' is empty"),
        ({"prompt": None, "completion": "b"}, "field 'prompt' is null"),
        ({"prompt": {"a": 1}, "completion": "b"}, "message 1 of 'prompt' has no 'role'"),
        ({"messages": []}, "field 'messages' is empty"),
        ({"messages": [USER]}, "no assistant message"),
        ({"messages": [{"content": "a"}]}, "message 1 of 'messages' has no 'role'"),
        ({"messages": [USER, {"role": "assistant"}]}, "message 2 of 'messages' has no text"),
    ],
)
def test_bad_sft_rows(row: dict, message: str) -> None:
    with pytest.raises(RowError, match=message):
        parse_sft(row, *NONE)


def test_preference_forms() -> None:
    assert parse_preference({"prompt": "p", "chosen": "c", "rejected": "r"}, *NONE) == (
        TextExample("p", "c"),
        TextExample("p", "r"),
    )
    chat = (ChatExample([USER, GOOD], (False, True)), ChatExample([USER, BAD], (False, True)))
    assert parse_preference({"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}, *NONE) == chat
    assert parse_preference({"prompt": [USER], "chosen": "Well", "rejected": "Badly"}, *NONE) == chat
    assert parse_preference({"chosen": [USER, GOOD], "rejected": [USER, BAD]}, *NONE) == chat
    named = Keys(input_key="q", chosen_key="good", rejected_key="bad")
    assert parse_preference({"q": "How?", "good": "Well", "bad": "Badly"}, named, Instructions()) == chat
    for row, message in (
        ({"prompt": "p", "chosen": "c"}, "field 'rejected' is missing"),
        ({"prompt": "p", "chosen": "", "rejected": "r"}, "field 'chosen' is empty"),
        ({"chosen": "c", "rejected": "r"}, "field 'prompt' is missing"),
        ({"prompt": [USER], "chosen": [GOOD], "rejected": [USER]}, "'rejected' is a conversation that begins with"),
        ({"prompt": [USER], "chosen": [GOOD], "rejected": [BAD, USER]}, "'rejected' does not end with an assistant"),
    ):
        with pytest.raises(RowError, match=message):
            parse_preference(row, *NONE)


def test_prompt_forms() -> None:
    plain = parse_prompt({"prompt": "12+7=", "completion": "19", "level": 3}, *NONE)
    assert (plain.prompt, plain.answer, plain.extra) == (
        "12+7=",
        "19",
        {"level": 3, "completion": "19"},
    )
    question = parse_prompt({"question": "How many?", "answer": "Two.\n#### 1,002"}, *NONE)
    assert question.prompt == [{"role": "user", "content": "How many?"}]
    assert question.answer == "Two.\n#### 1,002"  # rewards cut it where they want the number alone
    assert parse_prompt({"messages": [USER, GOOD]}, *NONE).answer == "Well"
    named = parse_prompt({"problem": "How?", "expected_answer": 4}, Keys("problem", "expected_answer"), Instructions())
    assert (named.prompt, named.answer) == ([USER], "4")


def test_instructions_come_from_files(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "system.txt").write_text("Be brief.")
    (tmp_path / "ask.txt").write_text("Solve {} and put {{it}} last.")
    monkeypatch.chdir(tmp_path)
    instructions = load_instructions("ask.txt", "system.txt")
    example = parse_prompt({"question": "1+1", "answer": "2"}, Keys(), instructions)
    assert example.prompt == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Solve 1+1 and put {it} last."},
    ]
    kept = parse_sft({"messages": [{"role": "system", "content": "Mine."}, USER, GOOD]}, Keys(), instructions)
    assert isinstance(kept, ChatExample) and [m["role"] for m in kept.messages] == ["system", "user", "assistant"]
    with pytest.raises(RowError, match="system_prompt_file is set, but the row is plain text"):
        parse_sft({"prompt": "a", "completion": "b"}, Keys(), instructions)
    # NeMo RL's recipes name a file of its own repository: this package has one of that name.
    own = load_instructions("examples/prompts/cot.txt")
    assert "\\boxed{}" in own._fill("1+1") and "1+1" in own._fill("1+1")
    with pytest.raises(UserError, match="prompt_file=missing.txt cannot be read"):
        load_instructions("missing.txt")
    (tmp_path / "bad.txt").write_text("no place")
    with pytest.raises(UserError, match="with {} once"):
        load_instructions("bad.txt")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"prompt": "a", "completion": "b"}\n{"prompt": \n', r"bad.jsonl, row 2: no JSON"),
        ('{"prompt": "a"}\n\n{"prompt": "a"}\n', r"bad.jsonl, row 2: the row is empty"),
        ("{}\n", r"bad.jsonl, row 1: wanted a JSON object with fields, got an empty object"),
        ("[1]\n", r"bad.jsonl, row 1: wanted a JSON object with fields, got int"),
        ("3\n", r"bad.jsonl, row 1: wanted a JSON object with fields, got int"),
        ("", r"bad.jsonl holds no rows"),
    ],
)
def test_bad_files_name_the_row(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        load_source(SourceSpec(data_path=str(path)))


def test_missing_file_folder_and_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="data.train.data_path=.*nowhere.jsonl cannot be read"):
        load_source(SourceSpec(data_path=str(tmp_path / "nowhere.jsonl")))
    with pytest.raises(UserError, match="could not be loaded"):
        load_source(SourceSpec(data_path=str(tmp_path)))
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "\xe9"}')
    with pytest.raises(UserError, match="UTF-8"):
        load_source(SourceSpec(data_path=str(tmp_path / "latin.jsonl")))
    with pytest.raises(UserError, match="data.validation names no data"):
        load_source(SourceSpec(), "data.validation")
    with pytest.raises(UserError, match="set data.train.data_path"):
        load_source(SourceSpec(dataset_name="PreferenceDataset"))


def test_a_file_wins_over_the_base_recipes_data_set(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": "b"}])
    source = load_source(SourceSpec(dataset_name="squad", split="train", data_path=str(path)))
    assert source[0] == (1, {"prompt": "a", "completion": "b"}) and source.strict


def test_arithmetic_is_right_and_its_splits_share_nothing() -> None:
    train, validation = arithmetic_rows("train"), arithmetic_rows("validation")
    assert train == arithmetic_rows("train")
    assert len(train) + len(validation) == 100 * 100 + 100 * 101 // 2
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in validation}
    for row in train + validation:
        assert eval(row["prompt"].rstrip("=")) == int(row["completion"]) == int(row["answer"]) >= 0
    assert {"+" in row["prompt"] for row in validation} == {True, False}
    source = load_source(SourceSpec("arithmetic", split="validation"))
    assert isinstance(parse_sft(raw(source, 0), source.sft_keys, Instructions()), TextExample)
    asked = load_source(SourceSpec("arithmetic", input_key="question", output_key="answer"))
    assert isinstance(parse_sft(raw(asked, 0), asked.sft_keys, Instructions()), ChatExample)
    with pytest.raises(UserError, match="arithmetic has the splits train and validation"):
        load_source(SourceSpec("arithmetic", split="dev"))


def test_gsm8k_from_a_local_copy(tmp_path: Path, monkeypatch) -> None:
    write_jsonl(tmp_path / "train.jsonl", [{"question": "1?", "answer": "x\n#### 1"}])
    write_jsonl(tmp_path / "test.jsonl", [{"question": "2?", "answer": "y\n#### 2"}])
    assert raw(load_source(SourceSpec("gsm8k", data_path=str(tmp_path))), 0)["question"] == "1?"
    monkeypatch.setenv(GSM8K_VARIABLE, str(tmp_path))
    assert raw(load_source(SourceSpec("gsm8k", split="validation")), 0)["question"] == "2?"
    assert raw(load_source(SourceSpec("gsm8k", split="test")), 0)["question"] == "2?"
    assert raw(load_source(SourceSpec("GSM8K", split="test")), 0)["question"] == "2?"
    with pytest.raises(UserError, match="dev.jsonl cannot be read"):
        load_source(SourceSpec("gsm8k", split="dev"))


def test_validation_rows_split_off_training_rows(tmp_path: Path) -> None:
    rows = [{"prompt": str(i), "completion": "x"} for i in range(20)]
    spec = SourceSpec(data_path=str(write_jsonl(tmp_path / "rows.jsonl", rows)))
    source = load_source(spec)
    train, validation = hold_out(source, 0.25, seed=1)
    assert (len(train), len(validation)) == (15, 5)
    numbers = [[part[i][0] for i in range(len(part))] for part in (train, validation)]
    assert sorted(numbers[0] + numbers[1]) == list(range(1, 21))
    assert numbers[0] == sorted(numbers[0])
    assert raw(train, 3)["prompt"] == str(numbers[0][3] - 1)
    assert hold_out(source, 0.25, seed=1)[1].order == validation.order != hold_out(source, 0.25, seed=2)[1].order
    with pytest.raises(UserError, match="split_validation_size=20 takes 20 of"):
        hold_out(source, 20, seed=1)


def test_hub_rows_become_known_forms() -> None:
    squad = HUB_DATASETS["squad"].adapt
    helpsteer = HUB_DATASETS["HelpSteer3"].adapt
    assert squad is not None and helpsteer is not None
    row = squad({"context": "C", "question": "Q", "answers": {"text": ["A"]}})
    example = parse_sft(row, *NONE)
    assert isinstance(example, ChatExample) and [m["content"] for m in example.messages] == ["C", "Q", "A"]
    for preference, chosen in ((-2, "Well"), (3, "Badly")):
        row = helpsteer(
            {"context": [USER], "response1": "Well", "response2": "Badly", "overall_preference": preference}
        )
        pair = parse_preference(row, *NONE)
        assert isinstance(pair[0], ChatExample) and pair[0].messages[-1]["content"] == chosen and pair[0] != pair[1]
    aime = HUB_DATASETS["DAPOMathAIME2024"].adapt
    assert aime is not None and aime is HUB_DATASETS["DAPOMath17K"].adapt
    assert aime({"prompt": [USER], "reward_model": {"ground_truth": "42"}}) == {"messages": [USER], "answer": "42"}
    assert HUB_DATASETS["Tulu3Preference"] is HUB_DATASETS["tulu3_preference"]
    number = HUB_DATASETS["AIME2026"].adapt
    assert number is not None and number({"problem": "P", "answer": 7})["answer"] == "7"
    tie = helpsteer({"context": [USER], "response1": "Well", "response2": "Badly", "overall_preference": 0})
    assert tie["chosen"] == tie["rejected"]


def test_hub_data_sets_go_through_datasets(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "local_set"
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", [{"question": f"{i}?", "answer": str(i)} for i in range(3)])
    source = load_source(SourceSpec(str(folder), split="train"))
    assert len(source) == 3 and source[2] == (3, {"question": "2?", "answer": "2"}) and not source.strict
    with pytest.raises(UserError, match="split nosuch.*could not be loaded"):
        load_source(SourceSpec(str(folder), split="nosuch"))
