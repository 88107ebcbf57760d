"""The count of NeMo RL's recipes that resolve: which are counted, what is said of those that do not."""

import importlib.util
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from megatron_lora.config.loader import load_recipe
from megatron_lora.trainers.run import check_only
from tests.support.models import family_config, random_model
from tests.support.runs import save_base, write_lines
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
    assert lines[0] == "12 of 13 recipes resolve" and lines[1].startswith("1 of them ask for asynchronous GRPO, ")
    assert lines[2].split() == ["1", "policy.megatron_cfg.fp8_cfg"]
    assert lines[3].startswith("examples/configs/recipes/llm/sft-fp8.yaml: ")


def test_a_folder_that_is_no_clone_is_a_mistake(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 2 and "holds no examples/configs" in capsys.readouterr().err


def test_every_key_that_a_refusal_names_is_counted() -> None:
    text = "the recipe has several mistakes:\n  unknown key policy.x_cfg; policy has ...\n  policy.backend='y': wanted"
    assert reasons(text) == {"policy.x_cfg", "policy.backend"}


def as_nemo_rl_reads_it(path: Path) -> dict[str, Any]:
    """A recipe merged over its defaults by OmegaConf alone, as NeMo RL does (nemo_rl/utils/config.py)."""
    plain = OmegaConf.to_container(OmegaConf.load(path))
    assert isinstance(plain, dict)
    defaults = plain.pop("defaults", [])
    for name in [defaults] if isinstance(defaults, str) else reversed(defaults):
        plain = OmegaConf.to_container(OmegaConf.merge(as_nemo_rl_reads_it(path.parent / name), plain))
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def leaves(section: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in section.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


# What another spelling is here: key -> (theirs, ours).
SPELT_OTHERWISE = {
    "policy.megatron_cfg.peft.lora_dtype": ("None", None),
    "policy.megatron_cfg.env_vars": (None, {}),
    "policy.dtensor_cfg.env_vars": (None, {}),
    "policy.generation.vllm_cfg.env_vars": (None, {}),
}


@pytest.mark.parametrize("path", sorted((CLONE / "examples/configs").rglob("*.yaml")), ids=lambda path: path.stem)
def test_a_recipe_means_here_what_it_says_there(path: Path) -> None:
    """Every value of their merged recipe is the resolved one here, but for keys that a notice names."""
    loaded = load_recipe(path)
    theirs = OmegaConf.to_container(OmegaConf.create(as_nemo_rl_reads_it(path)), resolve=True)
    assert isinstance(theirs, dict)
    ours, compared = dict(leaves(loaded.resolved)), 0
    for key, value in leaves({str(name): section for name, section in theirs.items()}):
        if key not in ours:
            continue
        mine, compared = ours[key], compared + 1
        if isinstance(value, list) and value and isinstance(value[0], dict):  # keys that an entry lacks are null here
            mine = [{name: item[name] for name in entry} for entry, item in zip(value, mine or [], strict=False)]
        if value == mine or (isinstance(value, str) and value[:1].isdigit() and float(value) == mine):
            continue
        told = key.rpartition(".")[2] in loaded.notices[0]
        assert SPELT_OTHERWISE.get(key) == (value, mine) or told, (key, value, mine)
    assert compared > 100


LORA = sorted((CLONE / "examples/configs/recipes/llm").glob("*-lora.yaml"))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model for each architecture of their LoRA recipes, and rows."""
    folder = tmp_path_factory.mktemp("models")
    for name, family in (("qwen3", "qwen3"), ("llama", "llama3")):
        save_base(folder / name, family, max_position_embeddings=8192)
    shutil.copytree(folder / "qwen3", folder / "nanov3", ignore=shutil.ignore_patterns("*.safetensors"))
    vocabulary = json.loads((folder / "qwen3" / "config.json").read_text())["vocab_size"]
    sizes = {"vocab_size": vocabulary, "max_position_embeddings": 8192, "n_routed_experts": 8}
    random_model(family_config("nemotron_h", **sizes)).save_pretrained(folder / "nanov3")
    write_lines(folder / "rows.jsonl", [{"input": f"{i}+{i}=", "output": str(2 * i)} for i in range(200)])
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("path", LORA, ids=lambda path: path.stem)
def test_their_lora_recipes_pass_the_checks_with_a_small_model(
    path: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On as many ranks as theirs. vLLM serves Nemotron-H, a Mamba hybrid, on GPUs alone."""
    if path.stem.startswith("grpo") and importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed")
    name = next(name for name in ("qwen3", "llama", "nanov3") if name in path.stem)
    overrides = {"policy.model_name": models / name, "policy.tokenizer.name": models / name, "data.validation": "null"}
    overrides |= {"data.train.data_path": models / "rows.jsonl", "checkpointing.checkpoint_dir": models / "run"}
    monkeypatch.setenv("WORLD_SIZE", "16" if "2n8g" in path.stem else "8")
    loaded = load_recipe(path, [f"{key}={value}" for key, value in overrides.items()])
    lines = check_only(loaded)
    assert any(line.startswith("trainable: ") for line in lines)
    waits = name == "nanov3" and path.stem.startswith("grpo") and not torch.cuda.is_available()
    assert [line for line in lines if "run on a GPU alone" in line] == lines[-1:] * waits
