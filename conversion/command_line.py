"""What the conversion tools share: exit status 2 and one message for a user's mistake."""

import logging
import os
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_lora.errors import UserError
from megatron_lora.runtime.terminal import complain

if TYPE_CHECKING:
    from megatron_lora.conversion.hub_upload import HubUpload


def add_debug(parser: ArgumentParser) -> None:
    parser.add_argument("--debug", action="store_true", help="show the traceback of a mistake")


def add_push(parser: ArgumentParser) -> None:
    parser.add_argument("--push-to-hub", metavar="OWNER/NAME", help="upload the result, into a private repository")
    parser.add_argument("--public", action="store_true", help="with --push-to-hub: a public repository")


def upload_of(arguments: Namespace) -> "HubUpload | None":
    """What --push-to-hub asks for, checked before the export. Raises UserError."""
    if arguments.push_to_hub is None:
        if arguments.public:
            raise UserError("--public is for --push-to-hub OWNER/NAME, which is missing")
        return None
    from megatron_lora.conversion.hub_upload import HubUpload

    return HubUpload(arguments.push_to_hub, public=arguments.public)


def deliver(folder: str, upload: "HubUpload | None") -> None:
    """Say where the result is, and upload it where that was asked for."""
    print(folder, flush=True)
    if upload is not None:
        print(upload.send(Path(folder)))


def run(main: Callable[[Namespace], None], arguments: Namespace) -> int:
    """Run main; returns the process's exit status."""
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # each further attempt where there is no network
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    logging.getLogger("megatron_lora.conversion").setLevel(logging.INFO)
    for name, value in vars(arguments).items():
        if isinstance(value, str):  # all of them are paths, or names where a path may stand
            setattr(arguments, name, os.path.expanduser(value))
    try:
        main(arguments)
    except UserError as error:
        if arguments.debug:
            raise
        complain(f"error: {error}")
        return 2
    return 0


def run_command(
    main: Callable[[Namespace], None],
    parse_args: Callable[[Sequence[str] | None, str | None], Namespace],
    argv: Sequence[str] | None,
    prog: str | None,
) -> int:
    """Parse and run; returns the process's exit status."""
    try:
        arguments = parse_args(argv, prog)
    except UserError as error:
        complain(f"error: {error}")
        return 2
    return run(main, arguments)
