"""Rows through `data.show` in this process: what a run would train on, or what it says instead."""

import io
import json
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_tokenizers import build_tokenizer, family_template

from megatron_lora.config.schema import ALGORITHMS
from megatron_lora.data import show
from megatron_lora.data.dataset import Preparation
from megatron_lora.data.forms import Keys
from megatron_lora.data.prepare import BUILDERS
from megatron_lora.data.sources import Source
from megatron_lora.data.tokenize import EncodingOptions
from megatron_lora.errors import UserError


def user(text: Any, **more: Any) -> dict:
    return {"role": "user", "content": text, **more}


def assistant(text: Any, **more: Any) -> dict:
    return {"role": "assistant", "content": text, **more}


def calling(arguments: Any, text: Any = None) -> dict:
    call = {"type": "function", "id": "c1", "function": {"name": "add", "arguments": arguments}}
    return assistant(text, tool_calls=[call])


ANSWERED = {"role": "tool", "tool_call_id": "c1", "content": "19"}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}


@dataclass
class Shown:
    """status and said: what the command ended with and wrote to stderr. rows: its objects."""

    status: int
    said: str
    rows: list[dict[str, Any]] = field(default_factory=list)
    tokenizer: Any = None

    def part(self, name: str, row: int = 1) -> dict[str, Any]:
        return next(shown for shown in self.rows if (shown["part"], shown["row"]) == (name, row))

    def trained(self, name: str, row: int = 1) -> list[str]:
        """The decoded text of each run of tokens that carry loss."""
        shown, runs, before = self.part(name, row), [], 0
        for token, target in zip(shown["input_ids"], shown["target_mask"], strict=True):
            if target and not before:
                runs.append([])
            if target:
                runs[-1].append(token)
            before = target
        return [self.tokenizer.decode(run) for run in runs]


def encode_rows(
    algorithm: str,
    rows: list,
    *,
    template: str | None = "qwen2_5",
    eos: str = "<|im_end|>",
    bos: str | None = None,
    end_token_ids: tuple[int, ...] = (),
    **keys: str | None,
) -> Shown:
    """What `data.show` would show of these rows. template: one of the families' or a Jinja text. keys: as in
    `Keys`."""
    tokenizer = build_tokenizer(None, eos, bos, adds_bos=bos is not None)
    if template is not None:
        tokenizer.chat_template = template if "{" in template else family_template(template)
    source = Source("data.jsonl", rows, sft_keys=Keys(**keys), prompt_keys=Keys(**keys), strict=True)
    preparation = Preparation(2048, EncodingOptions(end_token_ids=end_token_ids))
    try:
        dataset = BUILDERS[ALGORITHMS[algorithm].rows](source, tokenizer, preparation)
    except UserError as error:
        return Shown(2, str(error))
    shown = list(show.show_rows(ALGORITHMS[algorithm].rows, "train", source, dataset, tokenizer, len(rows)))
    return Shown(0, "\n".join(dataset.stats.lines()), shown, tokenizer)


def run_show(
    folder: Path,
    algorithm: str,
    rows: list | str | bytes,
    *,
    template: str | None = "qwen2_5",
    eos: str = "<|im_end|>",
    bos: str | None = None,
    file: str = "data.jsonl",
    data: dict[str, Any] | None = None,
    overrides: tuple[str, ...] = (),
    config: dict[str, Any] | None = None,
) -> Shown:
    """Show up to eight rows. template: one of the families' or a Jinja text. The model's folder holds no weights."""
    tokenizer = build_tokenizer(None, eos, bos, adds_bos=bos is not None)
    if template is not None:
        tokenizer.chat_template = template if "{" in template else family_template(template)
    tokenizer.save_pretrained(folder / "tokenizer")
    (folder / "model").mkdir(exist_ok=True)
    (folder / "model" / "config.json").write_text(json.dumps({"model_type": "llama", **(config or {})}))
    path = folder / file
    if isinstance(rows, bytes):
        path.write_bytes(rows)
    else:
        path.write_text(rows if isinstance(rows, str) else "".join(json.dumps(row) + "\n" for row in rows))
    recipe = {
        algorithm: {"max_num_steps": 1},
        "policy": {
            "model_name": str(folder / "model"),
            "tokenizer": {"name": str(folder / "tokenizer")},
            "max_total_sequence_length": 2048,
            "train_global_batch_size": 1,
        },
        "data": {"shuffle": False, "train": {"data_path": str(path), **(data or {})}},
    }
    if algorithm == "grpo":
        recipe["grpo"] |= {"num_prompts_per_step": 1, "num_generations_per_prompt": 2}
        recipe["env"] = {"reward_functions": [{"kind": "exact"}]}
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    out, said = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(said):
        status = show.main([str(folder / "recipe.yaml"), *overrides, "--json", "--rows", "8"])
    shown = [json.loads(line) for line in out.getvalue().splitlines()]
    return Shown(status, said.getvalue(), shown, tokenizer)
