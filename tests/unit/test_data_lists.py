"""Several data sets in a list, and rows held out of them: each read by its own keys, one set in the end."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_lora.config.loader import LoadedRecipe, check_recipe, dump_recipe, load_recipe
from megatron_lora.data.prepare import PreparedData, prepare_data
from megatron_lora.errors import UserError
from tools.tiny_model import build_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer and three files of rows."""
    folder = tmp_path_factory.mktemp("lists")
    build_tokenizer().save_pretrained(folder / "tokenizer")
    for name, count in (("a", 4), ("b", 10), ("c", 2)):
        rows = [{"ask": f"{name}{i}=", "say": str(i)} for i in range(count)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "system.txt").write_text("Be brief.")
    return folder


def block(folder: Path, name: str, **more: Any) -> dict[str, Any]:
    return {"data_path": str(folder / f"{name}.jsonl"), "input_key": "ask", "output_key": "say"} | more


def load(folder: Path, algorithm: str = "sft", **data: Any) -> LoadedRecipe:
    tokenizer = str(folder / "tokenizer")
    content = {"policy": {"model_name": tokenizer, "train_global_batch_size": 512}, "data": data, algorithm: {}}
    return check_recipe(content)


def prepared(folder: Path, algorithm: str = "sft", **data: Any) -> PreparedData:
    return prepare_data(load(folder, algorithm, **data).recipe)


def held_out(data: PreparedData) -> Any:
    assert data.validation is not None
    return data.validation


def texts(data: PreparedData, rows: Any) -> list[str]:
    return [str(data.tokenizer.decode(rows[position][0].input_ids)) for position in range(len(rows))]


def test_the_rows_follow_one_another_each_by_its_own_keys(folder: Path) -> None:
    other = block(folder, "b", system_prompt_file=str(folder / "system.txt"))
    data = prepared(folder, train=[block(folder, "a"), other], validation=[block(folder, "c"), block(folder, "a")])
    train = texts(data, data.train)
    assert len(train) == 14 and len(held_out(data)) == 6
    assert all("a" in text and "brief" not in text for text in train[:4])
    assert all("Be brief." in text for text in train[4:])
    assert data.train.stats.rows == 14 and data.train.stats.target_tokens > 0 and len(data.train.group_lengths()) == 14
    lines = [line for line in data.lines() if "kept" in line]
    assert len(lines) == 4 and lines[1].startswith(f"train, {folder / 'b.jsonl'}: 10 rows")
    one = prepared(folder, train=[block(folder, "a")], validation=block(folder, "c"))
    assert texts(one, one.train) == train[:4] and one.lines()[0].startswith("train: 4 rows")


def test_held_out_rows_join_the_validation_rows(folder: Path) -> None:
    held = [block(folder, "a", split_validation_size=0.5), block(folder, "b", split_validation_size=0.2, seed=3)]
    data = prepared(folder, train=held, validation=block(folder, "c"))
    assert len(data.train) == 2 + 8 and len(held_out(data)) == 2 + 2 + 2
    everything = texts(data, data.train) + texts(data, held_out(data))
    assert len(set(everything)) == 16
    alone = prepared(folder, train=held)
    assert texts(alone, held_out(alone)) == texts(data, held_out(data))[:4]
    assert prepared(folder, train=block(folder, "a")).validation is None


def test_rows_are_drawn_before_any_are_held_out(folder: Path) -> None:
    drawn = [block(folder, "a", max_samples=100), block(folder, "b", max_samples=5, split_validation_size=0.4, seed=3)]
    data = prepared(folder, train=drawn, validation=block(folder, "c", max_samples=1))
    assert (len(data.train), len(held_out(data))) == (4 + 3, 2 + 1)
    again = prepared(folder, train=drawn)
    assert texts(data, data.train) == texts(again, again.train)
    assert len(set(texts(data, data.train) + texts(data, held_out(data)))) == 10
    first, second = (prepared(folder, train=block(folder, "b", max_samples=5, seed=seed)) for seed in (3, 4))
    assert texts(first, first.train) != texts(second, second.train)
    assert not load(folder, train=block(folder, "a"), validation=block(folder, "c", max_samples=1, seed=1)).notices


def test_prompts_of_one_entry_are_repeated(folder: Path) -> None:
    validation = [block(folder, "c", repeat=3), block(folder, "a")]
    data = prepared(folder, "grpo", train=[block(folder, "b"), block(folder, "c")], validation=validation)
    assert len(data.train) == 12
    assert [prompt.index for prompt in held_out(data)] == [1, 2, 1, 2, 1, 2, 1, 2, 3, 4]


def test_defaults_and_keys_without_effect_reach_every_entry(folder: Path) -> None:
    bare = [{"data_path": str(folder / f"{name}.jsonl"), "processor": "sft_processor"} for name in "ab"]
    loaded = load(folder, train=bare, default={"input_key": "ask", "output_key": "say", "env_name": "math"})
    train = loaded.recipe.data.train
    assert [entry.input_key for entry in (train, *train.also)] == ["ask", "ask"]
    assert loaded.notices == ["NeMo RL keys accepted without effect: data.train.processor, data.default.env_name"]
    assert len(prepare_data(loaded.recipe).train) == 14


def test_the_resolved_recipe_reads_back(folder: Path, tmp_path: Path) -> None:
    loaded = load(folder, train=[block(folder, "a"), block(folder, "b")])
    (tmp_path / "recipe.yaml").write_text(dump_recipe(loaded.recipe))
    assert load_recipe(tmp_path / "recipe.yaml").recipe == loaded.recipe


@pytest.mark.parametrize(
    "train, message",
    [
        ([], "train"),
        ([{"data_path": "x"}, {"input_key": "ask"}], r"train.also\[0\] names no rows"),
        ([{"data_path": "x"}, {"data_paht": "y"}], "data_paht"),
        ([{"data_path": "x"}, {"data_path": "y", "repeat": 2}], r"train.also\[0\].repeat=2"),
        ([{"data_path": "x"}, {"data_path": "y", "also": [{"data_path": "z"}]}], "put them into one list"),
    ],
)
def test_mistakes_name_the_entry(train: Any, message: str, folder: Path) -> None:
    with pytest.raises(UserError, match=message):
        load(folder, train=train)
