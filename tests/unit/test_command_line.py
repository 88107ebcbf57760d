"""A run's command line: any order, mistakes in one line, help that succeeds."""

import pytest

from megatron_lora.cli.options import build_parser, parse_run
from megatron_lora.errors import UserError


def parse(*words: str):
    return parse_run(build_parser("train", "Run."), words)[0]


@pytest.mark.parametrize(
    "words",
    [
        ("r.yaml", "--dry-run", "a.b=1", "~c.d"),
        ("r.yaml", "a.b=1", "~c.d", "--dry-run"),
        ("--dry-run", "a.b=1", "r.yaml", "~c.d"),
        ("a.b=1", "~c.d", "--dry-run", "r.yaml"),
    ],
)
def test_any_order(words: tuple[str, ...]):
    options = parse(*words)
    assert (options.recipe, options.overrides, options.dry_run) == ("r.yaml", ["a.b=1", "~c.d"], True)


@pytest.mark.parametrize("recipe", ["runs/lr=1e-4/config.yaml", "lr=1/config.yaml"])
def test_a_recipe_in_a_folder_with_an_equals_sign(recipe: str):
    assert parse(recipe, "a.b=1").recipe == recipe


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (("r.yaml", "--dryrun"), "unknown flag --dryrun; did you mean --dry-run?"),
        (("r.yaml", "--print_config"), "did you mean --print-config?"),
        (("r.yaml", "--policy.precision=float32"), "overrides have no dashes: policy.precision=float32"),
        (("r.yaml", "--dry"), "--dry-run?"),
        (("r.yaml", "--zzz"), "unknown flag --zzz; the flags are"),
        (("--dry-run",), "which recipe?"),
        ((), "which recipe?"),
    ],
)
def test_mistakes_are_one_line(words: tuple[str, ...], wanted: str):
    with pytest.raises(UserError) as error:
        parse(*words)
    assert wanted in str(error.value) and "\n" not in str(error.value)


def test_help_succeeds(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as end:
        parse("--help")
    assert end.value.code == 0 and "RECIPE.yaml [dotted.key=value ...]" in capsys.readouterr().out
