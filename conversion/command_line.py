"""What the conversion tools share: exit status 2 and one message for a user's mistake."""

import logging
import os
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable

from megatron_lora.errors import UserError


def add_debug(parser: ArgumentParser) -> None:
    parser.add_argument("--debug", action="store_true", help="show the traceback of a mistake")


def run(main: Callable[[Namespace], None], arguments: Namespace) -> int:
    """Run main; returns the process's exit status."""
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
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
