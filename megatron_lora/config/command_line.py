"""The command line of a run: a recipe, overrides and flags, in any order."""

import argparse
import difflib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, NoReturn

from megatron_lora.config.loader import LoadedRecipe, dump_recipe, load_recipe, read_recipe
from megatron_lora.config.other_names import elsewhere, key_here
from megatron_lora.config.overrides import looks_like_override
from megatron_lora.errors import UserError

_SUFFIXES = (".yaml", ".yml")
# NeMo RL's, Hydra's, ms-swift's and others' flags that name a recipe.
_FLAGS_OF_A_RECIPE = frozenset("c config recipe config-file config-name config-path config_file config_name".split())
# torchrun's, accelerate's and others' flags for the number of ranks.
_FLAGS_OF_RANKS = frozenset("n np nproc_per_node num_processes num_gpus ngpus gpus devices".split())


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
        args = list(sys.argv[1:] if args is None else args)
        self.refuse_unknown(args)  # before a required flag is missed
        found, rest = self.parse_known_args(args, namespace)
        self.refuse_unknown(rest, "-")
        if rest:
            self.error(f"unknown argument {rest[0]}")
        return found

    def refuse_unknown(self, arguments: Sequence[str], start: str = "--") -> None:
        """Raise UserError where an argument is a flag that this parser lacks. start: what a flag begins with."""
        known = [flag for action in self._actions for flag in action.option_strings]
        for argument, following in zip_longest(arguments, arguments[1:], fillvalue=""):
            flag, equals, value = argument.partition("=")
            if flag.startswith(start) and flag.strip("-") and flag not in known:
                recipe = next((word for word in arguments if word.endswith(_SUFFIXES) and Path(word).is_file()), None)
                raise UserError(f"unknown flag {flag}; {self._meant(flag, equals, value or following, known, recipe)}")

    def _meant(self, flag: str, equals: str, value: str, known: Sequence[str], recipe: str | None) -> str:
        """What is to be written in place of an unknown flag. value: behind its =, if it has one, or the next word.
        recipe: the file that is named beside it, if one is."""
        name, takes_recipe = flag.lstrip("-"), self.usage is not None
        if takes_recipe and name in _FLAGS_OF_A_RECIPE:
            return f"the recipe needs no flag: {self.prog} {value or 'RECIPE.yaml'} [dotted.key=value ...]"
        if "--nproc" in known and name.replace("-", "_") in _FLAGS_OF_RANKS:
            return f"did you mean --nproc{f' {value}' if value.isdecimal() else ''}?"
        if takes_recipe and (place := elsewhere(name)) is not None:
            return place
        if takes_recipe and recipe is not None and (key := key_here(name, _content(recipe))) is not None:
            shown = value if value and not value.startswith("-") and value != recipe else "VALUE"
            return f"keys of the recipe have no dashes: {key}={shown}"
        names = {known_flag.lstrip("-"): known_flag for known_flag in known if known_flag.startswith("--")}
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
        if takes_recipe and ("." in name or (equals and not near)):
            return f"overrides have no dashes: {name}={value}"
        if near:
            return f"did you mean {names[near[0]]}?"
        keys = ", and keys of the recipe have no dashes: sft.seed=3" if takes_recipe else ""
        return f"the flags are {', '.join(known)}{keys}"


def _content(recipe: str) -> dict[str, Any]:
    """A recipe's sections, unchecked; none where it cannot be read, which is told when it is."""
    try:
        return read_recipe(Path(recipe))
    except UserError:
        return {}


def integer(least: int, most: int | None = None) -> Callable[[str], int]:
    """The type of a flag that takes a number in bounds."""
    bounds = f"of at least {least}" if most is None else f"from {least} to {most}"

    def read(text: str) -> int:
        number = int(text) if text.lstrip("-").isdecimal() else None
        if number is None or number < least or (most is not None and number > most):
            raise argparse.ArgumentTypeError(f"got {text!r}, wanted an integer {bounds}")
        return number

    return read


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
    parser.refuse_unknown(arguments)
    found, rest = parser.parse_known_intermixed_args(list(arguments))
    parser.refuse_unknown(rest, "-")
    words = [*found.words, *rest]
    recipe = next((word for word in words if not looks_like_override(word) or Path(word).is_file()), None)
    if recipe is None:
        # In a folder with an equals sign in its name.
        recipe = next((word for word in words if word.endswith(_SUFFIXES)), None)
    if recipe is None:
        raise UserError(f"which recipe? {parser.prog} RECIPE.yaml [dotted.key=value ...]")
    overrides = list(words)
    overrides.remove(recipe)
    _refuse_stray_words(recipe, overrides)
    return recipe, overrides, found


def _refuse_stray_words(recipe: str, overrides: Sequence[str]) -> None:
    """Raise UserError for words that are no override and that a shell has probably cut off from one."""
    for word, before in zip(overrides, ["", *overrides], strict=False):
        if looks_like_override(word):
            continue
        if word.startswith("=") or before.endswith("="):
            raise UserError(
                "an override has spaces around its =; write dotted.key=value, in quotes where the value has some"
            )
        if word.endswith(_SUFFIXES):
            raise UserError(
                f"two recipes, {recipe} and {word}; a run has one, which may name others in its defaults: [...]"
            )


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
