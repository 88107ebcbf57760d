"""A run's command line: any order, mistakes in one line, help that succeeds."""

import re
from typing import get_args

import pytest

from conversion.convert_lora_to_hf import EXPERT_LAYOUTS, export_lora_adapter_to_hf, merge_lora_to_hf, parse_args
from megatron_lora.cli.completion import FLAGS
from megatron_lora.cli.main import main
from megatron_lora.config.command_line import build_parser, parse_run
from megatron_lora.config.schema_adapters import DTYPES
from megatron_lora.conversion import export
from megatron_lora.errors import UserError
from megatron_lora.lora.peft_format import ExpertLayout


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
        (
            ("r.yaml", "--seed", "3"),
            "the flags are -h, --help, --print-config, --dry-run, --debug, and keys of the recipe",
        ),
        (("r.yaml", "--dry-run=true"), "--dry-run: takes no value, and has 'true'"),
        (("r.yaml", "--sft.seed", "3"), "overrides have no dashes: sft.seed=3"),
        (("--config", "r.yaml"), "unknown flag --config; the recipe needs no flag: train r.yaml ["),
        (("--recipe=r.yaml", "a.b=1"), "unknown flag --recipe; the recipe needs no flag: train r.yaml ["),
        (("r.yaml", "s.yml"), "two recipes, r.yaml and s.yml; a run has one"),
        (("r.yaml", "sft.seed=", "3"), "an override has spaces around its ="),
        (("sft.seed=3",), "which recipe?"),
        (("r.yaml", "sft.seed", "=", "3"), "an override has spaces around its =; write dotted.key=value"),
        (("r.yaml", "sft.seed", "=3"), "an override has spaces around its ="),
        (("--dry-run",), "which recipe?"),
        ((), "which recipe?"),
    ],
)
def test_mistakes_are_one_line(words: tuple[str, ...], wanted: str):
    with pytest.raises(UserError) as error:
        parse(*words)
    assert wanted in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(("name", "mode"), [("export", "adapter"), ("merge", "merged"), ("other", None)])
def test_a_commands_name_says_what_is_written(name: str, mode: str | None):
    arguments = ["--adapter-ckpt", "step_1", "--hf-ckpt-path", "out"]
    assert parse_args(arguments, f"megatron-lora {name}").mode == mode


def test_nemo_rls_entry_points_and_the_layouts_are_those_of_the_library():
    assert (export_lora_adapter_to_hf, merge_lora_to_hf) == (export.export_lora_adapter_to_hf, export.merge_lora_to_hf)
    assert get_args(ExpertLayout) == EXPERT_LAYOUTS and set(DTYPES) == set(export.DTYPES)


def test_an_unknown_flag_is_named_before_a_required_one_is_missed():
    with pytest.raises(UserError, match="unknown flag --adapter-ckp; did you mean --adapter-ckpt?"):
        parse_args(["--adapter-ckp", "x", "--hf-ckpt-path", "y"], "megatron-lora export")


@pytest.mark.parametrize("command", FLAGS)
def test_completion_knows_every_flag(command: str, capsys: pytest.CaptureFixture[str]):
    assert main([command, "--help"]) == 0
    shown = capsys.readouterr().out.partition("\noptions:")[2]
    entries = [line.partition("  ")[0] for line in shown.replace("\n  -", "\n-").splitlines() if line.startswith("-")]
    assert {flag for entry in entries for flag in re.findall(r"--[a-z-]+", entry)} == set(FLAGS[command]) != set()


def test_help_succeeds(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as end:
        parse("--help")
    assert end.value.code == 0 and "RECIPE.yaml [dotted.key=value ...]" in capsys.readouterr().out
