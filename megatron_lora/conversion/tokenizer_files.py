"""A run's tokenizer goes with what is exported from it: vocabulary and chat template are what was trained on."""

import json
import shutil
from pathlib import Path
from typing import Any

from megatron_lora.checksums import check_as_written

# What a tokenizer's folder may hold. One file left over from another tokenizer would win over the run's.
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "chat_template.json", "vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model", "tekken.json",
)  # fmt: skip
# Those that hold a vocabulary in another form than tokenizer.json.
OTHER_VOCABULARIES = ("vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model", "tekken.json")


def copy_run_tokenizer(step: Path, out: Path) -> None:
    """Put the tokenizer of a run's step_N folder into `out`, in the place of one that is there.

    Nothing is done where the step has none. A vocabulary in another form (tokenizer.model) stays where it is that of
    the same tokenizer.
    """
    source = step / "policy" / "tokenizer"
    if not source.is_dir():
        return
    check_as_written(source)
    same = _vocabulary(source) == _vocabulary(out)
    for name in TOKENIZER_FILES:
        if not (same and name in OTHER_VOCABULARIES):
            (out / name).unlink(missing_ok=True)
    if (out / "chat_templates").is_dir():
        shutil.rmtree(out / "chat_templates")
    shutil.copytree(source, out, dirs_exist_ok=True)


def _vocabulary(folder: Path) -> Any:
    file = folder / "tokenizer.json"
    return json.loads(file.read_text())["model"] if file.is_file() else None
