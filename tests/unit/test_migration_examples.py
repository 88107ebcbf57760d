"""The worked examples of docs/migrating.md pass --dry-run, with a small model put in for the one that they name."""

import re
import shlex
from pathlib import Path

import pytest
from test_docs import ROOT, migration_commands

from megatron_lora.config.command_line import build_parser, parse_run
from megatron_lora.config.loader import load_recipe
from megatron_lora.data.sources import GSM8K_VARIABLE
from megatron_lora.trainers.run import check_only
from tests.support.runs import save_base, write_lines
from tests.support.trainer import gsm8k_rows


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, GSM8K, and the files that the examples name."""
    work = tmp_path_factory.mktemp("work")
    save_base(work / "base", max_position_embeddings=2048)
    rows = gsm8k_rows(200, seed=1)
    (work / "gsm8k").mkdir()
    for name in ("gsm8k/train.jsonl", "gsm8k/test.jsonl", "rows.jsonl"):
        write_lines(work / name, rows)
    pairs = [{"prompt": row["question"], "chosen": row["answer"], "rejected": "none"} for row in rows]
    write_lines(work / "pairs.jsonl", pairs)
    return work


@pytest.mark.parametrize("command", [words for words in migration_commands() if "examples/" not in words])
def test_a_worked_example_passes_the_checks(command: str, work: Path, monkeypatch: pytest.MonkeyPatch):
    """NeMo RL's own is among the recipes of test_nemo_rl_recipes.py."""
    parser = build_parser("megatron-lora train", "")
    parser.add_argument("--nproc", default="1")
    options, found = parse_run(parser, shlex.split(command)[2:])
    if options.recipe.endswith("grpo.yaml"):
        pytest.importorskip("vllm")
    monkeypatch.chdir(work)
    monkeypatch.setenv("WORLD_SIZE", found.nproc)
    monkeypatch.setenv(GSM8K_VARIABLE, str(work / "gsm8k"))
    loaded = load_recipe(ROOT / options.recipe, [*options.overrides, f"policy.model_name={work / 'base'}"])
    lines = check_only(loaded)
    assert any(line.startswith("trainable: ") for line in lines) and any(
        re.match(r"steps: .* tokens a step$", line) for line in lines
    )
    assert any(f"ranks {found.nproc} = " in line for line in lines), lines
