"""A GSM8K run at TP=2 on two CPU processes, from the command line: what it says, learns and writes."""

import json
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_lora.config.loader import load_recipe
from tests.end_to_end.conftest import Job, Run
from tests.support.trainer import read_metrics

CONTRACT_METRICS = {"loss", "grad_norm", "lr", "num_target_tokens", "step_time_seconds", "tokens_per_second"}


def test_the_run_ends_well_and_leaves_no_process(whole_run: Run):
    assert whole_run.ended.status == 0, whole_run.ended.stderr[-3000:]
    assert whole_run.ended.left == []
    assert "Traceback" not in whole_run.ended.stderr


def test_terminal_shows_data_adapters_steps_and_pictures(whole_run: Run):
    stdout = whole_run.ended.stdout
    assert "train: 64 rows, 64 kept, 0 truncated" in stdout or "truncated to 512" in stdout
    assert "linear_qkv" in stdout and "trainable" in stdout and "sft 12/12  loss" in stdout
    assert stdout.count("sft 12/12") == 1  # one rank speaks
    assert str(whole_run.dir / "loss.png") in stdout


def test_loss_falls(whole_run: Run):
    losses = [record["loss"] for record in read_metrics(whole_run.dir)]
    validation = [record["loss"] for record in read_metrics(whole_run.dir, "validation")]
    assert losses[0] > 5 and losses[-1] < 0.8 * losses[0], losses
    assert validation[-1] < validation[0]


def test_metrics_have_the_contracts_names(whole_run: Run):
    train, validation = read_metrics(whole_run.dir), read_metrics(whole_run.dir, "validation")
    assert [record["step"] for record in train] == list(range(1, 13))
    assert [record["step"] for record in validation] == [6, 12]
    for record in train:
        assert set(record) >= CONTRACT_METRICS | {"kind", "step", "peak_memory_gib"}
        assert record["grad_norm"] > 0 and record["num_target_tokens"] > 0 and record["peak_memory_gib"] > 0
    for record in validation:
        assert set(record) >= {"loss", "num_target_tokens", "step_time_seconds", "tokens_per_second"}


def test_only_the_checkpoints_to_keep_are_there(whole_run: Run):
    """save_period=3 made four, keep_top_k=2 kept those two that were validated."""
    names = sorted(path.name for path in whole_run.dir.iterdir())
    assert [name for name in names if name.startswith((".", "step_"))] == ["step_12", "step_6"]
    assert (whole_run.dir / "latest_step.txt").read_text().strip() == "12"


def test_a_checkpoint_holds_the_contracts_files(whole_run: Run, job: Job):
    step = whole_run.dir / "step_12"
    files = {str(path.relative_to(step)) for path in step.rglob("*") if path.is_file()}
    assert files >= {
        "training_info.json",
        "config.yaml",
        "policy/weights/.metadata",
        "policy/weights/adapter.json",
        "policy/optimizer/.metadata",
        "policy/tokenizer/tokenizer.json",
        "hf_adapter/adapter_config.json",
        "hf_adapter/adapter_model.safetensors",
    }
    assert json.loads((step / "training_info.json").read_text())["step"] == 12
    recipe = load_recipe(whole_run.dir / "config.yaml").recipe
    assert recipe.policy.model_name == str(job.base) and recipe.policy.megatron_cfg.tensor_model_parallel_size == 2
    assert load_recipe(step / "config.yaml").recipe == recipe
    base_bytes = (job.base / "model.safetensors").stat().st_size
    weights = sum(path.stat().st_size for path in (step / "policy" / "weights").iterdir())
    assert weights < base_bytes / 2, "the frozen base does not belong into an adapter's checkpoint"


def test_the_adapter_lowers_the_loss_in_peft(whole_run: Run, job: Job):
    """The exported adapter, on transformers' own model: the run's last validation loss comes out again."""
    tokenizer = AutoTokenizer.from_pretrained(whole_run.dir / "step_12" / "policy" / "tokenizer")
    row = json.loads((job.data / "test.jsonl").read_text().splitlines()[0])
    messages = [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}]
    ids = torch.tensor([tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)])
    model = AutoModelForCausalLM.from_pretrained(job.base)
    with torch.no_grad():
        before = model(ids, labels=ids).loss.item()
        adapted = PeftModel.from_pretrained(model, str(whole_run.dir / "step_12" / "hf_adapter"))
        after = adapted(ids, labels=ids).loss.item()
    assert after < before - 0.3
    tensors = load_file(whole_run.dir / "step_12" / "hf_adapter" / "adapter_model.safetensors")
    assert any(tensor.abs().max() > 0 for name, tensor in tensors.items() if "lora_B" in name)


def test_picture_and_trackers(whole_run: Run):
    assert (whole_run.dir / "loss.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    events = EventAccumulator(str(whole_run.logs / "tensorboard")).Reload()
    train = read_metrics(whole_run.dir)
    assert [event.step for event in events.Scalars("train/loss")] == [record["step"] for record in train]
    assert [event.step for event in events.Scalars("validation/loss")] == [6, 12]
    files = list((whole_run.logs / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(files) == 1 and files[0].stat().st_size > 0


def test_nothing_else_is_written(whole_run: Run):
    """The run's folder holds what the contract names, and W&B's run id."""
    expected = {
        "config.yaml",
        "metrics.jsonl",
        "step_6",
        "step_12",
        "latest_step.txt",
        "loss.png",
        "wandb_run_id.txt",
        "log.txt",
    }
    assert {path.name for path in Path(whole_run.dir).iterdir()} == expected
