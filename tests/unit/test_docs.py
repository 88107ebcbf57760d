"""What the docs claim can be looked up: tests that they name exist, commands that they show are understood."""

import re
import shlex
from pathlib import Path

import pytest
import test_model_folder
import test_planted_rows
import test_rewards_calling

from megatron_lora.config import load_recipe
from megatron_lora.config.command_line import build_parser, parse_run
from megatron_lora.config.other_names import elsewhere, key_here
from megatron_lora.config.schema import Recipe
from megatron_lora.config.schema_tree import walk_fields
from tests.end_to_end.test_adapter_export import EXPORT_FAULTS
from tests.end_to_end.test_run_folder_faults import FAULTS as RUN_FAULTS

ROOT = Path(__file__).resolve().parents[2]
WHY_WORSE = (ROOT / "docs/why-worse.md").read_text()
MIGRATING = (ROOT / "docs/migrating.md").read_text()
TESTS = {path.name: path.read_text() for path in (ROOT / "tests").rglob("test_*.py")}


def _named_tests() -> list[tuple[str, str | None]]:
    """(file, test or None) as the page names them; `::test_x` alone goes with the file before it."""
    found, file = [], ""
    for name, test in re.findall(r"`(?:tests/[\w/]*)?(test_\w+\.py)?(?:::(test_\w+))?`", WHY_WORSE):
        file = name or file
        if name or test:
            found.append((file, test or None))
    return found


def _named_cases() -> list[str]:
    """Names of parity cases: what stands behind `cases` up to the next semicolon."""
    parts = re.findall(r"test_megatron_parity\.py` cases ([^;|]*)", WHY_WORSE)
    return [name for part in parts for name in re.findall(r"`(\w+)`", part)]


@pytest.mark.parametrize(("file", "test"), _named_tests(), ids=str)
def test_tests_that_rule_something_out_exist(file: str, test: str | None):
    assert file in TESTS
    if test is not None:
        assert re.search(rf"^def {test}\b", TESTS[file], re.MULTILINE), f"{file} has no {test}"


def test_every_row_names_a_test():
    rows = [line for line in WHY_WORSE.splitlines() if line.startswith("| **")]
    assert len(rows) >= 12 and all("`test_" in row.split(" | ")[-1] for row in rows)


def test_parity_cases_that_are_named_exist():
    names = _named_cases()
    assert len(names) > 10 and len(_named_tests()) > 20
    for name in names:
        assert f'case("{name}"' in TESTS["test_megatron_parity.py"], name


def migration_commands() -> list[str]:
    """The worked examples of docs/migrating.md."""
    blocks = re.findall(r"```\n(.*?)```", MIGRATING, re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line.strip() for line in lines if line.strip().startswith("megatron-lora train")]


@pytest.mark.parametrize("command", migration_commands())
def test_commands_of_the_migration_page_are_understood(command: str):
    parser = build_parser("megatron-lora train", "")
    parser.add_argument("--nproc", type=int)
    options, _ = parse_run(parser, shlex.split(command)[2:])
    theirs = options.recipe.startswith("examples/")
    recipe = ROOT / ("tests/fixtures/nemo_rl" if theirs else "") / options.recipe
    assert load_recipe(recipe, options.overrides).recipe.policy.adapter.enabled


def test_keys_of_the_migration_page_exist():
    """Full paths in the tables' right-hand column."""
    known = {path for path, _ in walk_fields(Recipe)}
    rows = [line.split("|") for line in MIGRATING.splitlines() if line.startswith("| `") and line.count("|") == 3]
    sections = "policy|data|checkpointing|sft|dpo|grpo|loss_fn|env|logger"
    keys = {key for row in rows for key in re.findall(rf"`((?:{sections})\.[\w.]+)", row[2])}
    assert len(keys) > 30
    assert {key.rstrip(".") for key in keys} <= known
    assert all(key_here(key, {}) in (None, key) or key in known for key in keys)


def _messages() -> dict[str, dict[str, str]]:
    """docs/messages.md: heading -> what was planted -> what was printed."""
    parts = re.split(r"^## (.*)\n", (ROOT / "docs/messages.md").read_text(), flags=re.MULTILINE)[1:]
    tables = {}
    for name, text in zip(parts[::2], parts[1::2], strict=True):
        rows = re.findall(r"^\| (.*?) \| (.*) \|$", text, re.MULTILINE)
        tables[name] = {planted: printed.replace("\\|", "|") for planted, printed in rows[1:]}
    return tables


# The tests' tables: what was planted -> expressions that are found in what is printed.
PLANTED: dict[str, dict[str, list[str]]] = {
    "Model folders": {name: [*map(re.escape, words)] for name, (_, words) in test_model_folder.FAULTS.items()},
    "Rows": {name: [says] for name, (_, _, says) in test_planted_rows.REFUSED.items()},
    "Files of rows": {name: [re.escape(says)] for name, (_, _, says) in test_planted_rows.FILES.items()},
    "Reward functions": {name: [says] for name, (_, _, says) in test_rewards_calling.REFUSALS.items()},
    "Exports": {name: [says] for name, (_, says) in EXPORT_FAULTS.items()},
    "Resumes and run folders": {name: [*map(re.escape, fault.said)] for name, fault in RUN_FAULTS.items()},
}


def test_keys_of_other_projects_on_the_migration_page_are_answered():
    """Each name of a left column, typed here as it stands there, is a key of this project or is answered with one."""
    recipes = [{name: {}, "policy": {"megatron_cfg": {"enabled": True}}} for name in ("sft", "dpo", "grpo")]
    ours = {path.rpartition(".")[2] for path, _ in walk_fields(Recipe)}
    sections = re.split(r"^## ", MIGRATING, flags=re.MULTILINE)[1:]
    # Values, commands, and what is no one key here.
    left_out = set(
        """rloo reinforce_plus_plus reinforce_plus_plus_baseline none dr_grpo swift allocation_mode lora_attn_modules
        apply_lora_to_mlp apply_lora_to_output load_safetensors custom_reward_function
        """.split()
    )
    checked = 0
    for section in sections:
        if section.startswith(("NeMo RL", "What", "Learning")):
            continue
        for line in section.splitlines():
            cells = line.split(" | ")
            if not line.startswith("| ") or len(cells) != 2 or cells[1].startswith("here"):
                continue
            for text in re.findall(r"`([^`]*)`", cells[0].replace("--", "")):
                name = re.split(r"[:= ]", text)[0].rpartition(".")[2]
                if name in left_out or not re.fullmatch(r"[a-z][a-z_]*", name):
                    continue
                checked += 1
                answered = elsewhere(name) or any(key_here(name, recipe) for recipe in recipes)
                assert answered or name in ours, f"{section.splitlines()[0]}: {name}"
    assert checked > 70


@pytest.mark.parametrize("table", PLANTED)
def test_the_page_of_messages_has_what_the_tests_plant(table: str):
    page, planted = _messages()[table], PLANTED[table]
    assert list(page) == list(planted)
    for name, printed in page.items():
        missing = [says for says in planted[name] if not re.search(says, printed)]
        assert not missing or printed.endswith(" ..."), (name, missing)


def test_the_page_of_messages_has_no_other_table():
    assert list(_messages()) == list(PLANTED)
