"""The command line of a run: a recipe, overrides and flags, in any order."""

import argparse
import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from megatron_lora.config.loader import LoadedRecipe, dump_recipe, load_recipe
from megatron_lora.config.overrides import looks_like_override
from megatron_lora.errors import UserError


@dataclass(frozen=True)
class RunOptions:
    """What was asked for. overrides: as they were typed."""

    recipe: str
    overrides: list[str]
    print_config: bool
    dry_run: bool
    debug: bool


class Parser(argparse.ArgumentParser):
    """An argument parser whose mistakes are UserErrors: one line, with the flag that was probably meant."""

    def __init__(self, **kwargs: Any):
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        message = message.replace("ignored explicit argument", "takes no value, and has")
        raise UserError(f"{message}; see {self.prog} --help")

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Raises UserError for what it does not know, SystemExit for --help."""
        found, rest = self.parse_known_args(args, namespace)
        self.refuse_unknown(rest)
        if rest:
            self.error(f"unknown argument {rest[0]}")
        return found

    def refuse_unknown(self, arguments: Sequence[str]) -> None:
        """Raise UserError where an argument is a flag that this parser lacks."""
        known = [flag for action in self._actions for flag in action.option_strings]
        for argument in arguments:
            flag, _, value = argument.partition("=")
            if not argument.startswith("-") or flag in known:
                continue
            near = difflib.get_close_matches(flag, known, n=1, cutoff=0.6)
            if "." in flag or (value and not near):
                raise UserError(f"unknown flag {flag}; overrides have no dashes: {argument.lstrip('-')}")
            if near:
                raise UserError(f"unknown flag {flag}; did you mean {near[0]}?")
            keys = "" if self.usage is None else ", and keys of the recipe have no dashes: sft.seed=3"
            raise UserError(f"unknown flag {flag}; the flags are {', '.join(known)}{keys}")


def build_recipe_parser(prog: str, description: str) -> Parser:
    """A parser of a recipe and overrides, to which a command adds its flags."""
    parser = Parser(
        prog=prog,
        description=description,
        usage="%(prog)s RECIPE.yaml [dotted.key=value ...] [flags]",
        epilog="Overrides: dotted.key=value with a YAML value; ~dotted.key goes back to the default. The keys are in "
        "docs/configuration.md.",
    )
    parser.add_argument("words", nargs="*", metavar="RECIPE.yaml dotted.key=value", help="the recipe and overrides")
    return parser


def build_parser(prog: str, description: str) -> Parser:
    """The parser of a run, to which a launcher adds its own flags."""
    parser = build_recipe_parser(prog, description)
    parser.add_argument("--print-config", action="store_true", help="print the resolved recipe and exit")
    parser.add_argument(
        "--dry-run", action="store_true", help="check all that can be without loading weights, say what would run, exit"
    )
    parser.add_argument(
        "--debug", action="store_true", help="traceback of a user's mistake; all that libraries print on the terminal"
    )
    return parser


def parse_recipe(parser: Parser, arguments: Sequence[str]) -> tuple[str, list[str], argparse.Namespace]:
    """The recipe, the overrides, and what else was found. Raises UserError for an unknown flag or a missing recipe,
    SystemExit for --help."""
    found, rest = parser.parse_known_intermixed_args(list(arguments))
    parser.refuse_unknown(rest)
    words = [*found.words, *rest]
    recipe = next((word for word in words if not looks_like_override(word)), words[0] if words else None)
    if recipe is None:
        raise UserError(f"which recipe? {parser.prog} RECIPE.yaml [dotted.key=value ...]")
    overrides = list(words)
    overrides.remove(recipe)
    if any(word.startswith("=") for word in overrides):
        raise UserError(
            "an override has spaces around its =; write dotted.key=value, in quotes where the value has some"
        )
    return recipe, overrides, found


def parse_run(parser: Parser, arguments: Sequence[str]) -> tuple[RunOptions, argparse.Namespace]:
    """Of a parser with the flags of a run. Raises as `parse_recipe` does."""
    recipe, overrides, found = parse_recipe(parser, arguments)
    options = RunOptions(recipe, overrides, found.print_config, found.dry_run, found.debug)
    return options, found


def load_or_print(options: RunOptions) -> LoadedRecipe | None:
    """The recipe that was asked for; printed, with --print-config, and then None. Raises UserError."""
    loaded = load_recipe(options.recipe, options.overrides)
    if not options.print_config:
        return loaded
    print(dump_recipe(loaded.recipe), flush=True)
    return None
