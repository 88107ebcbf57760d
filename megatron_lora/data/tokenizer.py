"""Load a tokenizer, ready for training: it has an end-of-sequence token, a padding token and its chat template."""

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

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
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path) if path.is_dir() else name)
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
        return Path(chat_template).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"policy.tokenizer.chat_template={chat_template}: the file cannot be read ({error})") from error


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer itself puts its beginning-of-sequence token before a text."""
    return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
