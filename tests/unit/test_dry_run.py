"""What --dry-run refuses because the run would, and what it says that a run will do."""

from pathlib import Path

import pytest

from megatron_lora.config.loader import load_recipe
from megatron_lora.errors import UserError
from megatron_lora.trainers import plan
from megatron_lora.trainers.run import check_only
from tests.support.runs import save_base

SFT, GRPO = "recipes/sft-quickstart-megatron.yaml", "recipes/grpo-quickstart-megatron.yaml"
MEGATRON, DTENSOR = "policy.megatron_cfg", "policy.dtensor_cfg"
ONE_RANK = [f"{MEGATRON}.tensor_model_parallel_size=1"]
ON_DTENSOR = [f"{MEGATRON}.enabled=false", f"{DTENSOR}.tensor_parallel_size=1", f"{DTENSOR}.lora_cfg.enabled=true"]
VLLM = [*ONE_RANK, "policy.generation.vllm_cfg.tensor_parallel_size=1"]
ADAMW = "policy.optimizer={name: torch.optim.AdamW, kwargs: {lr: 0.001}}"
LINEAR = "torch.optim.lr_scheduler.LinearLR"


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("bases") / "dense")


def dry_run(base: Path, recipe: str, *overrides: str) -> list[str]:
    keys = [f"policy.model_name={base}", f"checkpointing.checkpoint_dir={base.parent / 'run'}", *overrides]
    return check_only(load_recipe(recipe, keys))


@pytest.mark.parametrize(
    ("recipe", "keys", "wanted"),
    [
        (SFT, [*ON_DTENSOR, "policy.optimizer={name: torch.optim.Nope}"], "'torch.optim.Nope' cannot be imported"),
        (SFT, [*ON_DTENSOR, "policy.optimizer={name: torch.optim.AdamW, kwargs: {rate: 1}}"], "not take kwargs"),
        (SFT, [*ON_DTENSOR, ADAMW, f"policy.scheduler=[{{name: {LINEAR}x}}]"], f"'{LINEAR}x' cannot be imported"),
        (SFT, [*ON_DTENSOR, ADAMW, f"policy.scheduler=[{{name: {LINEAR}, kwargs: {{x: 1}}}}]"], "not take kwargs"),
        (
            SFT,
            [*ONE_RANK, "logger.tensorboard_enabled=true", "logger.log_dir=/proc/x"],
            "logger.log_dir='/proc/x' cannot",
        ),
        (
            SFT,
            [*ONE_RANK, "logger.mlflow_enabled=true", "logger.log_dir=/dev/null/x"],
            "and logger.mlflow_enabled keeps",
        ),
        *(
            pytest.param(GRPO, [*VLLM, key], wanted, marks=mark)  # each starts a process that imports vLLM
            for key, wanted, mark in (
                ("policy.generation.vllm_kwargs.max_num_seq=3", "did you mean max_num_seqs?", pytest.mark.slow),
                ("policy.max_total_sequence_length=512", "the model's 256 positions", pytest.mark.long),
                ("policy.generation.vllm_kwargs.max_num_seqs=-1", "greater than or equal to 1", pytest.mark.long),
            )
        ),
    ],
)
def test_what_the_run_would_refuse(dense: Path, recipe: str, keys: list[str], wanted: str) -> None:
    with pytest.raises(UserError) as refused:
        dry_run(dense, recipe, *keys)
    assert wanted in str(refused.value)


@pytest.mark.long
def test_arguments_that_vllm_takes_pass(dense: Path) -> None:
    dry_run(dense, GRPO, *VLLM, "policy.generation.vllm_kwargs.max_num_seqs=3")


def test_of_prompts_no_target_tokens_are_told(dense: Path) -> None:
    lines = dry_run(dense, GRPO, *VLLM)
    [told] = [line for line in lines if line.startswith("train: ")]
    assert "prompts kept" in told and "tokens a prompt: " in told and "target tokens" not in told


def test_servers_that_do_not_answer_yet_are_told_of_and_refuse_nothing(dense: Path) -> None:
    urls = "policy.generation.servers.urls=[http://127.0.0.1:9]"
    *_, told = dry_run(dense, GRPO, *ONE_RANK, "policy.generation.colocated.enabled=false", urls)
    assert told.startswith("not ready yet: ") and "127.0.0.1:9" in told and "megatron-lora serve" in told


def test_sequences_beyond_the_models_positions_are_told_of(tmp_path: Path) -> None:
    base = save_base(tmp_path / "short", max_position_embeddings=8)
    assert any("longer than the 8 positions" in line for line in dry_run(base, SFT, *ONE_RANK))


def memory_of(base: Path, monkeypatch: pytest.MonkeyPatch, *keys: str) -> float:
    """MiB of the base on a rank, as it is told (for large models: in GiB)."""
    monkeypatch.setattr(plan, "GIB", 2**20)
    [line] = [line for line in dry_run(base, SFT, *ONE_RANK, *keys) if line.startswith("memory a rank")]
    return float(line.partition("base ")[2].split()[0])


@pytest.mark.slow
def test_the_bases_memory_follows_from_its_layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    base = save_base(tmp_path / "experts", "qwen3_moe", moe_intermediate_size=256)
    divided = f"{MEGATRON}.expert_model_parallel_size=2"
    # 4 layers of 4 experts of 3 x 64 x 256 values are 3 MiB in fp32.
    assert memory_of(base, monkeypatch) - memory_of(base, monkeypatch, divided) == pytest.approx(1.5, abs=0.011)
    assert any("4 experts a layer over EP 2 x ETP 1" in line for line in dry_run(base, SFT, *ONE_RANK, divided))


@pytest.mark.slow
def test_a_base_in_four_bits_is_counted_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = save_base(tmp_path / "wide", intermediate_size=2048)
    four_bits = [f"{MEGATRON}.peft.quantization=nf4", f"{MEGATRON}.peft.lora_dtype=float32"]
    # 4 bits and a scale of 32 for 64 values, beside 32; the embeddings stay as they are.
    share = memory_of(base, monkeypatch, *four_bits) / memory_of(base, monkeypatch)
    assert share == pytest.approx((0.5 + 4 / 64) / 4, abs=0.03)
