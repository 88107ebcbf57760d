"""The count of NeMo RL's recipes that resolve: which are counted, what is said of those that do not."""

import shutil
from pathlib import Path

import pytest

from tools.nemo_rl_recipes import main, reasons, recipes

CLONE = Path(__file__).resolve().parents[1] / "fixtures" / "nemo_rl"


def test_recipes_of_other_kinds_are_not_counted(tmp_path: Path) -> None:
    clone = Path(shutil.copytree(CLONE, tmp_path / "clone"))
    llm = clone / "examples/configs/recipes/llm"
    (clone / "examples/configs/vlm_grpo_3B.yaml").write_text("grpo: {}\n")
    (clone / "examples/configs/ppo_math_1B.yaml").write_text("ppo: {}\n")
    (llm / "grpo-of-its-base.yaml").write_text("defaults: ../../grpo_math_1B.yaml\n")
    found = {path.name for path in recipes(clone)}
    assert found == {path.name for path in recipes(CLONE)} | {"grpo-of-its-base.yaml"} and len(found) == 12


def test_what_keeps_a_recipe_out_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clone = Path(shutil.copytree(CLONE, tmp_path / "clone"))
    llm = clone / "examples/configs/recipes/llm"
    (llm / "grpo-asynchronous.yaml").write_text(
        "defaults: ../../grpo_math_1B.yaml\ngrpo: {async_grpo: {enabled: true}}\n"
    )
    (llm / "sft-fp8.yaml").write_text("defaults: ../../sft.yaml\npolicy: {megatron_cfg: {fp8_cfg: {enabled: true}}}\n")
    assert main([str(clone), "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "12 of 13 recipes resolve" and lines[1].startswith("1 of them ask for asynchronous GRPO")
    assert lines[2].split() == ["1", "policy.megatron_cfg.fp8_cfg.enabled"]
    assert lines[3].startswith("examples/configs/recipes/llm/sft-fp8.yaml: ")


def test_a_folder_that_is_no_clone_is_a_mistake(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 2 and "holds no examples/configs" in capsys.readouterr().err


def test_every_key_that_a_refusal_names_is_counted() -> None:
    text = "the recipe has several mistakes:\n  unknown key policy.x_cfg; policy has ...\n  policy.backend='y': wanted"
    assert reasons(text) == {"policy.x_cfg", "policy.backend"}
