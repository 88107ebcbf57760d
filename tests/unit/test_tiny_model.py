"""The small base model: its tokenizer, its training text, and that a folder is built whole, once and reproducibly."""

import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_lora.data.arithmetic import arithmetic_rows
from megatron_lora.errors import UserError
from tools.quickstart import next_run_dir
from tools.tiny_model import (
    MARKER,
    TrainingText,
    answer_without_carry,
    build_base,
    build_tokenizer,
    greedy_answers,
    measure_accuracy,
    parse_problem,
)

STEPS = 30


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_base(tmp_path_factory.mktemp("tiny") / "base", seed=3, steps=STEPS)


def test_any_text_round_trips_and_digits_are_tokens():
    tokenizer = build_tokenizer()
    for text in ("12+7=19", "Natalia sold 48/2 = <<48/2=24>>24 clips.\n#### 24", "5 €, naïve – 日本", " a  b "):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode("12+7=19")) == 7
    assert tokenizer.encode("19<eos>")[-1] == tokenizer.eos_token_id
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


def test_chat_template_makes_the_prompt_a_prefix_of_the_conversation():
    tokenizer = build_tokenizer()
    messages = [{"role": "system", "content": "Add."}, {"role": "user", "content": "What is 1+2?"}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template([*messages, {"role": "assistant", "content": "3"}], tokenize=False)
    assert prompt == "<|system|>Add.<|user|>What is 1+2?<|assistant|>"
    assert whole == f"{prompt}3<eos>"
    assert len(tokenizer.encode(str(whole))) == len("Add.What is 1+2?3") + 4


def test_problems_and_the_forgotten_carry():
    assert parse_problem("47+38=") == (47, "+", 38)
    assert answer_without_carry((47, "+", 38)) == 75
    assert answer_without_carry((42, "-", 17)) == 35
    assert answer_without_carry((21, "+", 34)) == 55


def test_training_text_never_shows_a_held_out_problem():
    held_out = {parse_problem(row["prompt"]) for row in arithmetic_rows("validation")}
    text = TrainingText(build_tokenizer(), seed=0)
    lines = [text.line() for _ in range(3000)]
    problems = [parse_problem(prompt.replace("<|user|>What is ", "")) for prompt, _ in lines]
    assert held_out.isdisjoint(problems)
    right = [str(a + b if sign == "+" else a - b) + "<eos>" for a, sign, b in problems]
    spaced = [answer == truth for (prompt, answer), truth in zip(lines, right, strict=True) if " = " in prompt]
    compact = [answer == truth for (prompt, answer), truth in zip(lines, right, strict=True) if " = " not in prompt]
    assert all(spaced) and len(spaced) > 1000
    assert 0.4 < sum(compact) / len(compact) < 0.85  # some answers there forget a carry, some do not


def test_only_answers_carry_loss():
    tokenizer = build_tokenizer()
    input_ids, labels = next(TrainingText(tokenizer, seed=1).batches())
    for ids, wanted in zip(input_ids, labels, strict=True):
        positions = (wanted != -100).nonzero().flatten().tolist()
        assert positions == list(range(positions[0], positions[-1] + 1))
        assert torch.equal(ids[positions], wanted[positions])
        answer = tokenizer.decode(wanted[positions])
        assert answer.endswith("<eos>") and answer.removesuffix("<eos>").isdigit()
        prompt = tokenizer.decode(ids[: positions[0]])
        assert prompt.endswith(("=", "= ", "<|assistant|>"))


def test_the_folder_loads_in_transformers_and_is_kept(base_dir: Path):
    model = AutoModelForCausalLM.from_pretrained(base_dir)
    tokenizer = AutoTokenizer.from_pretrained(base_dir)
    assert model.config.model_type == "qwen3" and not model.config.tie_word_embeddings
    assert model.config.eos_token_id == tokenizer.eos_token_id == 1
    assert tokenizer.decode(tokenizer.encode("12 + 7 = 19<eos>")) == "12 + 7 = 19<eos>"
    assert tokenizer.chat_template == build_tokenizer().chat_template
    written = (base_dir / "model.safetensors").stat().st_mtime_ns
    assert build_base(base_dir, seed=3, steps=STEPS) == base_dir
    assert (base_dir / "model.safetensors").stat().st_mtime_ns == written
    assert [path.name for path in base_dir.parent.iterdir()] == [base_dir.name]


@pytest.mark.slow
def test_training_lowers_the_loss_and_repeats_exactly(base_dir: Path, tmp_path: Path):
    again = build_base(tmp_path / "again", seed=3, steps=STEPS)
    first, second = (load_file(folder / "model.safetensors") for folder in (base_dir, again))
    assert all(torch.equal(first[name], second[name]) for name in first)
    model = AutoModelForCausalLM.from_pretrained(base_dir)
    input_ids, labels = next(TrainingText(build_tokenizer(), seed=99).batches())
    assert model(input_ids=input_ids, labels=labels).loss.item() < 2.2  # a uniform guess of a digit or end is 2.4


def test_left_padding_does_not_change_an_answer(base_dir: Path):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base_dir), AutoTokenizer.from_pretrained(base_dir)
    rows = random.Random(0).sample(arithmetic_rows("validation"), 12)
    prompts = [row["prompt"] for row in rows]
    together = greedy_answers(model, tokenizer, prompts)
    assert together == [greedy_answers(model, tokenizer, [prompt])[0] for prompt in prompts]
    right = [{"prompt": prompt, "completion": answer} for prompt, answer in zip(prompts, together, strict=True)]
    wrong = [{"prompt": row["prompt"], "completion": "x"} for row in right]
    assert measure_accuracy(model, tokenizer, right[:6] + wrong[6:]) == 0.5


def test_something_else_in_the_folder_is_left_alone(base_dir: Path, tmp_path: Path):
    (tmp_path / "mine").write_text("precious")
    with pytest.raises(UserError, match="something else"):
        build_base(tmp_path, seed=3, steps=STEPS)
    with pytest.raises(UserError, match="'seed': 3"):
        build_base(base_dir, seed=4, steps=STEPS)
    assert (tmp_path / "mine").read_text() == "precious" and (base_dir / MARKER).is_file()


def test_a_second_quickstart_gets_a_folder_of_its_own(tmp_path: Path):
    assert next_run_dir(tmp_path, "run").name == "run"
    (tmp_path / "run").mkdir()
    (tmp_path / "run-2").mkdir()
    assert next_run_dir(tmp_path, "run").name == "run-3"
