"""What is exported from a run has the run's tokenizer and chat template, whatever the base folder holds."""

from pathlib import Path

from data_tokenizers import build_tokenizer
from transformers import AutoTokenizer

from megatron_lora.conversion.tokenizer_files import copy_run_tokenizer


def write_base(folder: Path) -> Path:
    base = build_tokenizer("{{ 'the base' }}")
    base.save_pretrained(folder)
    (folder / "tokenizer.model").write_text("sentencepiece")
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder


def test_the_runs_own_template_wins(tmp_path: Path) -> None:
    out = write_base(tmp_path / "out")
    build_tokenizer("{{ 'the run' }}").save_pretrained(tmp_path / "step" / "policy" / "tokenizer")
    copy_run_tokenizer(tmp_path / "step", out)
    assert AutoTokenizer.from_pretrained(out).chat_template == "{{ 'the run' }}"
    assert (out / "tokenizer.model").read_text() == "sentencepiece"  # the same vocabulary


def test_nothing_of_another_tokenizer_is_left(tmp_path: Path) -> None:
    out = write_base(tmp_path / "out")
    other = build_tokenizer(None).train_new_from_iterator(["a b c"] * 9, vocab_size=300)
    other.save_pretrained(tmp_path / "step" / "policy" / "tokenizer")
    copy_run_tokenizer(tmp_path / "step", out)
    loaded = AutoTokenizer.from_pretrained(out)
    assert loaded.get_vocab() == other.get_vocab() and not loaded.chat_template
    assert not (out / "tokenizer.model").exists() and (out / "config.json").is_file()


def test_a_step_without_tokenizer_leaves_the_bases(tmp_path: Path) -> None:
    out = write_base(tmp_path / "out")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    copy_run_tokenizer(tmp_path, out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
