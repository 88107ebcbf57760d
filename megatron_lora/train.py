"""Entry point: torchrun --nproc-per-node N -m megatron_lora.train RECIPE.yaml [dotted.key=value ...] [flags]."""

import os
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from types import FrameType

from megatron_lora.config.command_line import RunOptions, build_parser, parse_run
from megatron_lora.config.loader import LoadedRecipe, dump_recipe, load_recipe
from megatron_lora.errors import UserError
from megatron_lora.runtime import terminal
from megatron_lora.runtime.activity import current
from megatron_lora.runtime.failure import LAUNCHER, describe, place_of, tell

USER_ERROR_STATUS = 2
FAILURE_STATUS = 1
SPEAK_AFTER_SECONDS = 60.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a recipe; returns the exit status (0 done, 2 a user's mistake, 1 anything else)."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if _rank() and {"-h", "--help"} & set(arguments):
        return 0
    try:
        options, _ = parse_run(build_parser("megatron_lora.train", "Run a recipe."), arguments)
        loaded = load_recipe(options.recipe, options.overrides)
        if options.print_config:
            _print_once(dump_recipe(loaded.recipe))
            return 0
        return _run(loaded, options)
    except UserError as error:
        _let_first_rank_speak()
        if "--debug" in arguments:
            traceback.print_exc()
        tell(f"error: {error}")
        return USER_ERROR_STATUS
    except SystemExit as end:  # --help
        return int(end.code or 0)


def _run(loaded: LoadedRecipe, options: RunOptions) -> int:
    with nullcontext() if options.debug else terminal.output_in_log(_rank()) as log:
        _leave_quietly_if_asked()
        try:
            return _train(loaded, dry_run=options.dry_run)
        except UserError:
            raise
        except Exception as error:
            os.write(2, traceback.format_exc().encode())  # sys.stderr may be some library's by now
            message = _why(error, loaded)
            if log is not None:
                folder = Path(loaded.recipe.checkpointing.checkpoint_dir)
                if log.is_temporary and not options.dry_run:
                    folder.mkdir(parents=True, exist_ok=True)
                    log.move_to(folder)
                message += f"\n  every rank's traceback is in {log.path}"
            tell(message)
            return FAILURE_STATUS


def _why(error: Exception, loaded: LoadedRecipe) -> str:
    if "torch" in sys.modules:
        from megatron_lora.runtime.out_of_memory import describe_out_of_memory, is_out_of_memory

        if is_out_of_memory(error):
            return f"error: {describe_out_of_memory(error, loaded.recipe, _rank())}"
    return f"error: rank {_rank()} failed while {current().what}, {describe(error)} ({place_of(error)})"


def _train(loaded: LoadedRecipe, *, dry_run: bool) -> int:
    for name, value in loaded.recipe.policy.env_vars.items():
        if value:  # NeMo RL writes "" for none
            os.environ.setdefault(name, value)
    # Imported here: a recipe is parsed and printed without waiting for torch.
    from megatron_lora.runtime.kernel_cache import keep_compiled_kernels
    from megatron_lora.runtime.quiet import quiet_libraries

    quiet_libraries(_rank() == 0)
    keep_compiled_kernels()
    from megatron_lora.trainers.run import check_only, run_recipe

    if dry_run:
        for line in check_only(loaded):
            _print_once(line)
        _print_once("the recipe is valid: layout, data, tokenizer and weights' files were checked; nothing was trained")
        return 0
    return run_recipe(loaded)


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _print_once(text: str) -> None:
    if _rank() == 0:
        terminal.say(text)


def _leave_quietly_if_asked() -> None:
    """SIGTERM and SIGINT while modules are imported; `run_recipe` has a handler of its own."""

    def leave(number: int, frame: FrameType | None) -> None:
        _print_once("stopped before the run began; nothing was written")
        log = terminal.log()
        if log is not None:
            log.discard()
        _leave(0)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, leave)


def _let_first_rank_speak() -> None:
    """Wait, on the other ranks, until torchrun ends them.

    A mistake is met on every rank and told by the first. A rank that left before would have torchrun end the first one
    with nothing said. Where the first rank does not meet it (a file that only its machine has), another speaks after a
    while. `megatron-lora train` takes one message itself.
    """
    if _rank() == 0 or LAUNCHER in os.environ:
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
    if "TORCHELASTIC_RUN_ID" in os.environ or LAUNCHER in os.environ:
        # Without its launcher, which holds the store, a rank waits for the others for ever and keeps its GPU.
        from megatron_lora.runtime.processes import die_with_parent

        die_with_parent()
    try:
        exit_status = main()
    except BaseException as failure:
        traceback.print_exc()
        tell(f"error: rank {_rank()} failed, {describe(failure)} ({place_of(failure)})")
        exit_status = FAILURE_STATUS
    _leave(exit_status)
