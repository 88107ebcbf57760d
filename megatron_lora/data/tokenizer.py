"""Load a tokenizer, ready for training: it has an end-of-sequence token, a padding token and its chat template."""

from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from megatron_lora.errors import UserError

VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")


def load_tokenizer(name: str, chat_template: str | None = None) -> PreTrainedTokenizerBase:
    """Load `name` (a hub name or a local folder).

    chat_template: None or "default" keeps the tokenizer's own; otherwise a Jinja template, or the path of a `.jinja`
    file that holds one. A missing padding token becomes the end-of-sequence token. Raises UserError for a tokenizer
    that cannot be loaded, one without an end-of-sequence token, and a template file that cannot be read.
    """
    if (name.startswith((".", "/", "~")) or Path(name).exists()) and not Path(name).expanduser().is_dir():
        raise UserError(f"policy.tokenizer.name={name} is not a folder; give an HF tokenizer's folder or hub name")
    path = Path(name).expanduser()
    if path.is_dir() and not any((path / file).is_file() for file in VOCABULARY_FILES):
        # transformers would build an empty tokenizer from the model's type.
        raise UserError(
            f"policy.tokenizer.name={name}: the folder holds no tokenizer (none of {', '.join(VOCABULARY_FILES)}); put "
            "tokenizer.json and tokenizer_config.json there, or set policy.tokenizer.name to a folder or hub name that "
            "has them"
        )
    from transformers import AutoTokenizer  # imports torch

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path) if path.is_dir() else name, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"policy.tokenizer.name={name}: no tokenizer could be loaded ({reason}); wanted a folder with "
            "tokenizer.json and tokenizer_config.json, or a hub name that this machine can reach"
        ) from error
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"policy.tokenizer.name={name}: the tokenizer has no end-of-sequence token, so no answer would ever end; "
            "set eos_token in its tokenizer_config.json"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if chat_template is not None and chat_template != "default":
        tokenizer.chat_template = _read_template(chat_template)
    return tokenizer


def _read_template(chat_template: str) -> str:
    if not chat_template.endswith(".jinja"):
        return chat_template
    try:
        return Path(chat_template).expanduser().read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"policy.tokenizer.chat_template={chat_template}: the file cannot be read ({error})") from error


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer itself puts its beginning-of-sequence token before a text."""
    return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]


def end_tokens(model_name: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end an answer: the tokenizer's own, those of the model's generation_config.json, and those of its
    config.json (one or a list) that are special tokens: a config class fills in an id where nobody chose one."""
    special = special_ids(tokenizer)
    filled = [number for number in _ids(_declared(model_name, "config.json")) if number in special]
    chosen = _ids(_declared(model_name, "generation_config.json"))
    return sorted({*_ids(tokenizer.eos_token_id), *filled, *chosen})


def special_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Every special token of the tokenizer, named or added."""
    added = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return frozenset({*tokenizer.all_special_ids, *added})


def _declared(model_name: str, file: str) -> Any:
    """eos_token_id in a file of the model's folder; None where it has none, or there is no such file."""
    from transformers import PretrainedConfig

    try:
        values, _ = PretrainedConfig.get_config_dict(str(Path(model_name).expanduser()), _configuration_file=file)
    except (OSError, ValueError):
        return None  # whoever loads the model says what is wrong with it
    return values.get("eos_token_id")


def _ids(value: Any) -> list[int]:
    return list(value) if isinstance(value, list | tuple) else [] if value is None else [value]
