"""The installed command: `megatron-lora train RECIPE.yaml --nproc 8 key=value`, `serve`, `show`, `export`, ..."""

import os
import sys
from argparse import Namespace
from collections.abc import Sequence
from difflib import get_close_matches
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

from megatron_lora.cli.completion import complete, script
from megatron_lora.cli.launcher import Machines, launch
from megatron_lora.config.command_line import RunOptions, build_parser, integer, load_or_print, parse_run
from megatron_lora.errors import UserError
from megatron_lora.runtime.terminal import complain

# subcommand -> (function that takes arguments and its name, what it does)
TOOLS = {
    "show": ("megatron_lora.data.show:main", "show rows as the run trains on them"),
    "export": ("conversion.convert_lora_to_hf:command", "a checkpoint's adapter as an HF PEFT folder"),
    "merge": ("conversion.convert_lora_to_hf:command", "base and adapter merged into an HF model"),
    "import": ("conversion.import_hf_adapter:command", "an HF PEFT adapter as a checkpoint"),
}
COMMANDS = ("train", "serve", *TOOLS, "completion")
USAGE = "\n".join(
    [
        "usage: megatron-lora COMMAND ...",
        "",
        "  train       run a recipe: megatron-lora train RECIPE.yaml [--nproc N] [dotted.key=value ...]",
        "  serve       rollout server for a run: megatron-lora serve RECIPE.yaml --port 8000",
        *(f"  {name:<11} {what}" for name, (_, what) in TOOLS.items()),
        "  completion  print a completion script, for bash, zsh or fish",
        "",
        "megatron-lora COMMAND --help says more.",
    ]
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 2 for a user's mistake."""
    command, *rest = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if command == "help" and rest:
        command, rest = rest[0], ["--help"]
    try:
        if command == "train":
            return train(rest)
        if command == "serve":
            from megatron_lora.cli.serve import serve

            return serve(rest)
        if command in TOOLS:
            module, _, function = TOOLS[command][0].partition(":")
            return getattr(import_module(module), function)(rest, f"megatron-lora {command}")
        if command == "completion":
            print(script(rest))
            return 0
        if command == "__complete":
            print("\n".join(complete(rest, list(COMMANDS))))
            return 0
        if command in ("-h", "--help", "help"):
            print(USAGE)
            return 0
        if command in ("-V", "--version", "version"):
            print(f"megatron-lora {version('megatron-lora')}")
            return 0
        raise UserError(_unknown_command(command))
    except UserError as error:
        complain(f"error: {error}")
        return 2
    except SystemExit as end:  # --help
        return int(end.code or 0)


def train(arguments: Sequence[str]) -> int:
    """Check the recipe here, where it takes no second, and start the ranks."""
    parser = build_parser("megatron-lora train", "Run a recipe on this machine's GPUs, or on CPU processes.")
    parser.add_argument("--nproc", type=integer(1), metavar="N", help="ranks on this machine; default: its GPUs, or 1")
    parser.add_argument("--nnodes", type=integer(1), default=1, help="machines that run this command (default 1)")
    parser.add_argument("--node-rank", type=integer(0), default=0, help="this machine's number, from 0")
    parser.add_argument("--master-addr", default="localhost", help="machine 0, with --nnodes")
    parser.add_argument("--master-port", type=integer(0, 65535), default=0, help="a free port of it, with --nnodes")
    options, found = parse_run(parser, arguments)
    if load_or_print(options) is None:
        return 0
    command = [sys.executable, "-m", "megatron_lora.train", *_for_a_rank(options)]
    return launch(command, _machines(found), only_first=options.dry_run)


def _machines(found: Namespace) -> Machines:
    nproc = count_gpus() or 1 if found.nproc is None else found.nproc
    if found.node_rank >= found.nnodes:
        raise UserError(
            f"--nnodes={found.nnodes} --node-rank={found.node_rank}: machines are counted from 0; wanted a node rank "
            "below the number of machines"
        )
    if found.nnodes > 1 and (found.master_addr == "localhost" or not found.master_port):
        raise UserError(f"--nnodes={found.nnodes} needs --master-addr and --master-port of machine 0")
    return Machines(nproc, found.nnodes, found.node_rank, found.master_addr, found.master_port)


def count_gpus() -> int:
    """GPUs that a run may use, without importing torch: CUDA_VISIBLE_DEVICES, else the driver's list."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([name for name in visible.split(",") if name.strip() not in ("", "-1")])
    folder = Path("/proc/driver/nvidia/gpus")
    return len(list(folder.iterdir())) if folder.is_dir() else 0


def _for_a_rank(options: RunOptions) -> list[str]:
    flags = [name for name, is_on in (("--dry-run", options.dry_run), ("--debug", options.debug)) if is_on]
    return [options.recipe, *options.overrides, *flags]


def _unknown_command(command: str) -> str:
    near = get_close_matches(command.lstrip("-").lower(), COMMANDS, n=1)
    if not near and command.endswith((".yaml", ".yml")):
        return f"unknown command {command}; did you mean megatron-lora train {command}?"
    if command.startswith("-") and not near:
        return f"a command comes first, before {command}: {', '.join(COMMANDS)}"
    return f"unknown command {command}; " + (
        f"did you mean {near[0]}?" if near else f"the commands are {', '.join(COMMANDS)}"
    )


if __name__ == "__main__":
    sys.exit(main())
