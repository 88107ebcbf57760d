"""Tokenized data sets: truncation, dropping, statistics and messages; the tokenizer's loading; workers."""

import json
from pathlib import Path

import pytest
import torch
from data_tokenizers import build_tokenizer, family_template

from megatron_lora.data import workers
from megatron_lora.data.dataset import (
    Preparation,
    build_preference_dataset,
    build_prompt_dataset,
    build_sft_dataset,
)
from megatron_lora.data.examples import load_instructions
from megatron_lora.data.sources import Source, SourceSpec, load_source
from megatron_lora.data.tokenizer import load_tokenizer
from megatron_lora.errors import UserError


def source_of(rows: list, strict: bool = True) -> Source:
    return Source("rows.jsonl", rows, strict=strict)


def test_sft_rows_are_truncated_at_the_end_and_dropped_without_targets() -> None:
    tokenizer = build_tokenizer()
    short, middle = {"prompt": "1", "completion": "2"}, {"prompt": "1", "completion": "1234567890" * 2}
    hopeless = {"prompt": "1234567890" * 3, "completion": "2"}
    dataset = build_sft_dataset(source_of([short, hopeless, middle]), tokenizer, Preparation(max_length=10))
    assert [[row.index for row in group] for group in dataset] == [[1], [3]]
    [row] = dataset[1]
    assert row.input_ids.tolist() == tokenizer("1" + "1234567890" * 2)["input_ids"][:10]
    assert row.input_ids.dtype == torch.int64 and row.target_mask.tolist() == [False] + [True] * 9
    stats = dataset.stats
    assert (stats.rows, stats.kept, stats.truncated, stats.dropped_long) == (3, 2, 1, 1)
    assert (stats.min, stats.max, stats.mean) == (3, 32, pytest.approx((3 + 32 + 22) / 3))
    assert stats.target_tokens == 2 + 9
    assert dataset.group_lengths() == [3, 10]
    assert stats.describe() == (
        "3 rows, 2 kept, 1 truncated to 10, 1 dropped (1 over 10 tokens); "
        "tokens a sequence: min 3, mean 19.0, p95 31, max 32; 11 target tokens"
    )


def test_every_row_over_the_limit() -> None:
    rows = [{"prompt": "1234567890", "completion": "12"}] * 2
    with pytest.raises(UserError, match="every row is longer than the limit of 5 tokens .*the shortest .* 13"):
        build_sft_dataset(source_of(rows), build_tokenizer(), Preparation(max_length=5))
    with pytest.raises(UserError, match="every prompt is longer than the limit of 5"):
        build_prompt_dataset(source_of(rows), build_tokenizer(), Preparation(max_length=5))
    pairs = [{"prompt": "1234567890", "chosen": "1", "rejected": "2"}]
    with pytest.raises(UserError, match="every pair is longer than the limit of 5"):
        build_preference_dataset(source_of(pairs), build_tokenizer(), Preparation(max_length=5))


def test_a_bad_row_names_file_and_number_but_on_the_hub_it_is_counted() -> None:
    rows = [{"prompt": "1", "completion": "2"}, {"prompt": "1"}]
    with pytest.raises(UserError, match="rows.jsonl, row 2: field 'completion' is missing"):
        build_sft_dataset(source_of(rows), build_tokenizer(), Preparation(max_length=10))
    dataset = build_sft_dataset(source_of(rows, strict=False), build_tokenizer(), Preparation(max_length=10))
    assert (len(dataset), dataset.stats.dropped_bad) == (1, 1) and "1 unusable" in dataset.stats.describe()
    with pytest.raises(UserError, match="none of its 1 rows can be used; the last one: field 'completion'"):
        build_sft_dataset(source_of(rows[1:], strict=False), build_tokenizer(), Preparation(max_length=10))
    adapted = Source("hub", [{"a": 1}], adapt=lambda row: row["b"])
    with pytest.raises(UserError, match="none of its 1 rows can be used.*KeyError"):
        build_sft_dataset(adapted, build_tokenizer(), Preparation(max_length=10))


def test_pairs() -> None:
    rows = [
        {"prompt": "1", "chosen": "23", "rejected": "4"},
        {"prompt": "1", "chosen": "2", "rejected": "2"},
        {"prompt": "1", "chosen": "2", "rejected": "1234567890"},
    ]
    tokenizer = build_tokenizer()
    dataset = build_preference_dataset(source_of(rows), tokenizer, Preparation(max_length=8))
    assert len(dataset) == 1
    chosen, rejected = dataset[0]
    assert tokenizer.decode(chosen.input_ids) == "123</s>" and tokenizer.decode(rejected.input_ids) == "14</s>"
    assert chosen.target_mask.tolist() == [False, True, True, True] and chosen.index == rejected.index == 1
    assert (dataset.stats.dropped_equal, dataset.stats.dropped_long) == (1, 1)
    with pytest.raises(UserError, match="no row is left to train on.*1 with equal answers"):
        build_preference_dataset(source_of(rows[1:2]), tokenizer, Preparation(max_length=8))
    with pytest.raises(UserError, match="row 1: field 'rejected' is missing"):
        build_preference_dataset(source_of([{"prompt": "1", "chosen": "2"}]), tokenizer, Preparation(max_length=8))


def test_a_pair_of_conversations_carries_loss_on_its_last_answers() -> None:
    tokenizer = build_tokenizer(family_template("qwen2_5"), "<|im_end|>")
    history = [
        {"role": "user", "content": "How?"},
        {"role": "assistant", "content": "Well"},
        {"role": "user", "content": "And?"},
    ]
    row = {"prompt": history, "chosen": "Fine", "rejected": [{"role": "assistant", "content": "Third"}]}
    dataset = build_preference_dataset(source_of([row]), tokenizer, Preparation(max_length=400))
    texts = [tokenizer.decode(row.input_ids[row.target_mask]) for row in dataset[0]]
    assert texts == ["Fine<|im_end|>", "Third<|im_end|>"]


def test_prompts(tmp_path: Path) -> None:
    (tmp_path / "ask.txt").write_text("Solve: {}")
    tokenizer = build_tokenizer(family_template("qwen2_5"), "<|im_end|>")
    rows = [{"question": "1+1", "answer": "so\n#### 2", "level": 1}, {"question": "1" * 50, "answer": "1"}]
    instructions = load_instructions(str(tmp_path / "ask.txt"))
    dataset = build_prompt_dataset(source_of(rows), tokenizer, Preparation(max_length=400, instructions=instructions))
    assert len(dataset) == 2
    prompt = dataset[0]
    assert prompt.text.endswith("<|im_start|>user\nSolve: 1+1<|im_end|>\n<|im_start|>assistant\n")
    assert prompt.input_ids.tolist() == tokenizer(prompt.text, add_special_tokens=False)["input_ids"]
    assert (prompt.answer, prompt.index, prompt.extra) == ("so\n#### 2", 1, {"level": 1})
    limit = prompt.input_ids.numel()
    dataset = build_prompt_dataset(source_of(rows), tokenizer, Preparation(max_length=limit, instructions=instructions))
    assert len(dataset) == 1 and dataset.stats.dropped_long == 1


@pytest.mark.slow
def test_worker_processes_give_the_same_rows(monkeypatch) -> None:
    monkeypatch.setattr(workers, "ROWS_WORTH_A_WORKER", 10)
    source = load_source(SourceSpec("arithmetic", split="validation")).select(range(600))
    tokenizer = build_tokenizer()
    here = build_sft_dataset(source, tokenizer, Preparation(max_length=32))
    there = build_sft_dataset(source, tokenizer, Preparation(max_length=32, num_workers=2))
    assert [group[0].input_ids.tolist() for group in here] == [group[0].input_ids.tolist() for group in there]
    assert [group[0].index for group in there] == list(range(1, 601))
    bad = source_of([{"prompt": "1", "completion": "2"}] * 20 + [{"prompt": "1"}])
    with pytest.raises(UserError, match="rows.jsonl, row 21: field 'completion' is missing"):
        build_sft_dataset(bad, tokenizer, Preparation(max_length=32, num_workers=2))


def test_load_tokenizer(tmp_path: Path) -> None:
    folder = tmp_path / "tokenizer"
    tokenizer = build_tokenizer(family_template("llama3"), "<|eot_id|>")
    tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    loaded = load_tokenizer(str(folder), "default")
    assert loaded.pad_token_id == loaded.eos_token_id and loaded.chat_template == family_template("llama3")
    assert load_tokenizer(str(folder)).chat_template == family_template("llama3")
    assert load_tokenizer(str(folder), "{{ messages }}").chat_template == "{{ messages }}"
    (tmp_path / "own.jinja").write_text("{{ bos_token }}")
    assert load_tokenizer(str(folder), str(tmp_path / "own.jinja")).chat_template == "{{ bos_token }}"
    with pytest.raises(UserError, match="chat_template=.*none.jinja: the file cannot be read"):
        load_tokenizer(str(folder), str(tmp_path / "none.jinja"))
    with pytest.raises(UserError, match="is not a folder"):
        load_tokenizer(str(tmp_path / "nowhere"))
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UserError, match="the folder holds no tokenizer"):
        load_tokenizer(str(empty))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.pop("eos_token")
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="no end-of-sequence token"):
        load_tokenizer(str(folder))
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="no tokenizer could be loaded"):
        load_tokenizer(str(folder))
