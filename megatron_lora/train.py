"""Entry point: torchrun --nproc-per-node N -m megatron_lora.train RECIPE.yaml [dotted.key=value ...] [flags]."""

import os
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

from megatron_lora.command_line import build_parser, parse_run
from megatron_lora.config.loader import LoadedRecipe, dump_recipe, load_recipe
from megatron_lora.errors import UserError

USER_ERROR_STATUS = 2
FAILURE_STATUS = 1
SPEAK_AFTER_SECONDS = 60.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a recipe; returns the exit status (0 done, 2 a user's mistake, 1 anything else)."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if os.environ.get("RANK", "0") != "0" and {"-h", "--help"} & set(arguments):
        return 0
    try:
        options, _ = parse_run(build_parser("megatron_lora.train", "Run a recipe."), arguments)
        loaded = load_recipe(options.recipe, options.overrides)
        if options.print_config:
            _print_once(dump_recipe(loaded.recipe))
            return 0
        return _run(loaded, dry_run=options.dry_run)
    except UserError as error:
        _let_first_rank_speak()
        if "--debug" in arguments:
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr, flush=True)
        return USER_ERROR_STATUS
    except SystemExit as end:  # --help
        return int(end.code or 0)


def _run(loaded: LoadedRecipe, *, dry_run: bool) -> int:
    # Imported here: a recipe is parsed and printed without waiting for torch.
    from megatron_lora.runtime.quiet import quiet_libraries

    quiet_libraries(int(os.environ.get("RANK", "0")) == 0)
    from megatron_lora.trainers.run import check_only, run_recipe

    if dry_run:
        check_only(loaded)
        _print_once("the recipe is valid: layout, data, tokenizer and weights' files were checked; nothing was trained")
        return 0
    return run_recipe(loaded)


def _print_once(text: str) -> None:
    if int(os.environ.get("RANK", "0")) == 0:
        print(text, flush=True)


def _let_first_rank_speak() -> None:
    """Wait, on the other ranks, until torchrun ends them.

    A mistake is met on every rank and told by the first. A rank that left before would have torchrun end the first one
    with nothing said. Where the first rank does not meet it (a file that only its machine has), another speaks after a
    while.
    """
    if int(os.environ.get("RANK", "0")) == 0:
        return
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    time.sleep(SPEAK_AFTER_SECONDS)


def _leave(status: int) -> None:
    """Threads of process groups and rollout engines may still run; everything is written, so leave at once."""
    if "torch" in sys.modules:
        from megatron_lora.runtime.quiet import end_children

        end_children()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__mp_main__":
    # A helper that Megatron's checkpoint writer started, which imports this module anew.
    from megatron_lora.runtime.processes import die_with_parent

    die_with_parent()

if __name__ == "__main__":
    sys.path.insert(0, str(Path.cwd()))
    if "TORCHELASTIC_RUN_ID" in os.environ:
        # Without torchrun, which holds the store, a rank waits for the others for ever and keeps its GPU.
        from megatron_lora.runtime.processes import die_with_parent

        die_with_parent()
    try:
        exit_status = main()
    except BaseException:
        traceback.print_exc()
        exit_status = FAILURE_STATUS
    _leave(exit_status)
