"""Shows rows as a run trains on them.

    python -m megatron_lora.data.show RECIPE.yaml [key=value ...] [--rows N] [--json]

Reads the tokenizer and the rows as the run would, no weights. The tokens that carry loss are coloured on a terminal,
and stand in [[...]] elsewhere. Status 2 and one message where the run would refuse the rows.
"""

import json
import os
import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from typing import Any

from megatron_lora.config.algorithm_section import RowKind
from megatron_lora.config.command_line import build_recipe_parser, integer, parse_recipe
from megatron_lora.config.loader import load_recipe
from megatron_lora.config.schema import Recipe
from megatron_lora.errors import UserError
from megatron_lora.runtime.terminal import complain

USER_ERROR_STATUS = 2
DEFAULT_ROWS = 3
PARTS: dict[RowKind, tuple[str, ...]] = {
    "conversations": ("row",),
    "pairs": ("chosen", "rejected"),
    "prompts": ("prompt",),
}
_COLOUR, _PLAIN = "\x1b[30;42m", "\x1b[0m"


def main(arguments: Sequence[str] | None = None, prog: str = "megatron_lora.data.show") -> int:
    """Returns the exit status. prog: what it was called by."""
    try:
        options = _parse(arguments, prog)
        recipe = load_recipe(options.recipe, options.overrides).recipe
        return _show(recipe, options.rows, options.json)
    except UserError as error:
        complain(f"error: {error}")
        return USER_ERROR_STATUS
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _parse(arguments: Sequence[str] | None, prog: str) -> Namespace:
    parser = build_recipe_parser(prog, "Show rows as a run trains on them; no weights are read.")
    parser.add_argument(
        "--rows", type=integer(1), default=DEFAULT_ROWS, help=f"rows of each set (default {DEFAULT_ROWS})"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    recipe, overrides, found = parse_recipe(parser, sys.argv[1:] if arguments is None else arguments)
    return Namespace(recipe=recipe, overrides=overrides, rows=found.rows, json=found.json)


def _show(recipe: Recipe, num_rows: int, as_json: bool) -> int:
    # Imported here: a wrong recipe is told without waiting for torch.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # each further attempt where there is no network
    from megatron_lora.data.prepare import prepare_data

    data = prepare_data(recipe)
    for line in data.lines():
        complain(line)
    for name, source, dataset in data.sets:
        for shown in show_rows(recipe.section.rows, name, source, dataset, data.tokenizer, num_rows):
            # In ASCII: some characters of a text end a line for those who read these lines.
            text = json.dumps(shown) if as_json else _readable(shown, data.tokenizer)
            print(text, flush=True)
    return 0


def show_rows(
    kind: RowKind, name: str, source: Any, dataset: Any, tokenizer: Any, num_rows: int
) -> Iterator[dict[str, Any]]:
    """The first `num_rows` rows of a set in the file's order, one object for each part of a row."""
    parts = PARTS[kind]
    position = 0
    for number in (source[place][0] for place in range(min(num_rows, len(source)))):
        head = {"set": name, "row": number}
        if number in dataset.stats.drops:
            yield {**head, "part": parts[0], "dropped": dataset.stats.drops[number]}
            continue
        if kind == "prompts":
            prompt = dataset[position]
            ids = prompt.input_ids.tolist()
            tokens = [(ids, [0] * len(ids))]
            more = {"answer": prompt.answer}
        else:
            tokens = [(row.ids.tolist(), row.mask.astype(int).tolist()) for row in dataset.encoded(position)]
            more = {}
        position += 1
        for part, (ids, mask) in zip(parts, tokens, strict=True):
            text = tokenizer.decode(ids)
            yield {**head, "part": part, "input_ids": ids, "target_mask": mask, "text": text, **more}


def _readable(shown: dict[str, Any], tokenizer: Any) -> str:
    """One part of a row for the eye: a line that says which, then the text with its targets marked."""
    title = f"--- {shown['set']} row {shown['row']}, {shown['part']}"
    if "dropped" in shown:
        return f"{title}: dropped, {shown['dropped']}"
    ids, mask = shown["input_ids"], shown["target_mask"]
    title += f": {len(ids)} tokens, {sum(mask)} carry loss"
    opening, closing = (_COLOUR, _PLAIN) if sys.stdout.isatty() else ("[[", "]]")
    text, start = "", 0
    for end in range(1, len(ids) + 1):
        if end == len(ids) or mask[end] != mask[start]:
            run = tokenizer.decode(ids[start:end])
            text += f"{opening}{run}{closing}" if mask[start] else run
            start = end
    answer = f"\n(reference answer: {shown['answer']!r})" if "answer" in shown else ""
    return f"{title}\n{text}{answer}"


if __name__ == "__main__":
    sys.exit(main())
