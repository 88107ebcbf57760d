"""DPO from the command line: ten steps equal TRL's DPOTrainer in every layout, accuracy rises, a resumed run is the
same run, the reference stays where it began, and what cannot be run is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig as TrlConfig
from trl import DPOTrainer

from tests.support.compare import largest_difference, relative_differences
from tests.support.launch import RanksFailed
from tests.support.reference import ALPHA, RANK, TARGETS, save_adapter, stored_name, tie_shared_factors
from tests.support.runs import (
    adapter_of,
    arithmetic_preferences,
    assert_names_are_known,
    metrics,
    run,
    save_base,
    write_lines,
)

pytestmark = pytest.mark.timeout(1200)

STEPS, PAIRS, BETA, RATE = 10, 4, 0.1, 5e-3
TOLERANCE = 1e-4
# An adapter of another kind than the room's first: its folder's name, and ranks and alphas by linear.
UNLIKE = "unlike"
PATTERNS: dict[str, Any] = {"rank_pattern": {"v_proj": 2, "layers.1.mlp.down_proj": 6}, "alpha_pattern": {"o_proj": 3}}
LAYOUTS: dict[str, dict[str, Any]] = {
    "tp1": {},
    "tp2": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "pp2": {"pipeline_model_parallel_size": 2},
}


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, an adapter to start from, and preference rows."""
    folder = tmp_path_factory.mktemp("dpo")
    save_base(folder / "base")
    save_adapter(folder / "base", folder / "adapter")
    save_adapter(folder / "base", folder / UNLIKE, share_a=False, use_dora=True, use_rslora=True, **PATTERNS)
    write_lines(folder / "train.jsonl", arithmetic_preferences(STEPS * PAIRS))
    return folder


def recipe(room: Path, *, megatron: dict[str, Any] | None = None, init: bool = True, **dpo: Any) -> dict[str, Any]:
    """Ten steps over the rows in the file's order; `init` starts from the adapter, else from a drawn one."""
    peft = {"enabled": True, "dim": RANK, "alpha": ALPHA, "init_adapter": str(room / "adapter") if init else None}
    optimizer = {"lr": RATE, "adam_beta1": 0.9, "adam_beta2": 0.98, "adam_eps": 1e-8, "weight_decay": 0.1}
    return {
        "dpo": {"max_num_steps": STEPS, "reference_policy_kl_penalty": BETA, "val_period": 0} | dpo,
        "policy": {
            "model_name": str(room / "base"),
            "precision": "float32",
            "train_global_batch_size": PAIRS,
            "train_micro_batch_size": 2,
            "max_total_sequence_length": 64,
            "megatron_cfg": {"enabled": True, "peft": peft, "optimizer": optimizer} | (megatron or {}),
            "dtensor_cfg": {"lora_cfg": peft | {"match_all_linear": False, "use_triton": False}},
        },
        "data": {"train": {"data_path": str(room / "train.jsonl")}, "shuffle": False},
        "checkpointing": {"save_period": 100},
    }


class InOrder(DPOTrainer):
    """TRL's trainer with the rows in the file's order; only matrices decay, which spares DoRA's magnitudes."""

    def _get_train_sampler(self, *arguments: Any, **options: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)  # type: ignore[arg-type]

    def get_decay_parameter_names(self, model: Any) -> list[str]:
        return [name for name, parameter in model.named_parameters() if parameter.dim() > 1]


def trl_run(
    room: Path, folder: Path, start: Path | None, adapter_name: str = "adapter"
) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
    """(log of each step, adapter at the end). start: the adapter, trained against the base with the adapter off; None:
    the room's of that name, trained against a frozen copy of it."""
    tokenizer = AutoTokenizer.from_pretrained(room / "base")
    base = AutoModelForCausalLM.from_pretrained(room / "base", attn_implementation="eager")
    from_adapter = start is None
    model = PeftModel.from_pretrained(base, str(room / adapter_name), is_trainable=True) if from_adapter else base
    fresh = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, task_type="CAUSAL_LM")
    arguments = TrlConfig(
        output_dir=str(folder), per_device_train_batch_size=PAIRS, max_steps=STEPS, learning_rate=RATE, beta=BETA,
        lr_scheduler_type="constant", adam_beta2=0.98, weight_decay=0.1, max_grad_norm=1.0, logging_steps=1,
        report_to=[], gradient_checkpointing=False, bf16=False, use_cpu=True, save_strategy="no", max_length=64,
        disable_tqdm=True, dataloader_drop_last=True,
    )  # fmt: skip
    trainer = InOrder(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_json(str(room / "train.jsonl")),
        processing_class=tokenizer,
        peft_config=None if from_adapter else fresh,
    )
    if start is not None:
        trainer.model.load_adapter(str(start), "default", is_trainable=True)  # type: ignore[union-attr]
    if adapter_name != UNLIKE:
        # After TRL has copied the adapter for its reference, which finds parameters by name.
        tie_shared_factors(trainer.model)  # type: ignore[arg-type]
    trainer.train()
    logs = [line for line in trainer.state.log_history if "loss" in line]
    state = trainer.model.state_dict()  # type: ignore[union-attr]
    adapter = {stored_name(name): value for name, value in state.items() if "lora_" in name and ".ref" not in name}
    return logs, adapter


def assert_equal_runs(run_folder: Path, logs: list[dict[str, Any]], adapter: dict[str, torch.Tensor]) -> None:
    ours = metrics(run_folder)
    assert_names_are_known(run_folder)
    assert len(ours) == len(logs) == STEPS
    for name, theirs in (("loss", "loss"), ("reward_margin", "rewards/margins"), ("grad_norm", "grad_norm")):
        pairs = [(line[name], log[theirs]) for line, log in zip(ours, logs, strict=True)]
        assert max(abs(a - b) for a, b in pairs) < TOLERANCE * max(1.0, max(abs(b) for _, b in pairs)), (name, pairs)
    for name in ("chosen", "rejected"):
        assert (
            max(abs(line[f"rewards_{name}"] - log[f"rewards/{name}"]) for line, log in zip(ours, logs, strict=True))
            < TOLERANCE
        )
    assert [line["accuracy"] for line in ours] == [log["rewards/accuracies"] for log in logs]
    assert largest_difference(adapter_of(run_folder / f"step_{STEPS}"), adapter) < TOLERANCE


@pytest.fixture(scope="module")
def from_adapter(room: Path) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
    return trl_run(room, room / "trl", None)


@pytest.mark.parametrize(
    "layout", [pytest.param(name, marks=[pytest.mark.long] if name != "tp2" else []) for name in LAYOUTS]
)
def test_ten_steps_from_an_adapter_equal_trl(layout: str, room: Path, tmp_path: Path, from_adapter: Any) -> None:
    ranks = 1 if layout == "tp1" else 2
    folder = run(tmp_path, recipe(room, megatron=LAYOUTS[layout]), ranks)
    assert_equal_runs(folder, *from_adapter)


@pytest.mark.long
def test_ten_steps_of_the_dtensor_backend_equal_trl(room: Path, tmp_path: Path, from_adapter: Any) -> None:
    folder = run(tmp_path, recipe(room), 2, "policy.megatron_cfg.enabled=false")
    assert_equal_runs(folder, *from_adapter)


@pytest.mark.long
def test_ten_steps_of_dora_with_ranks_by_linear_equal_trl(room: Path, tmp_path: Path) -> None:
    """DoRA, rsLoRA's scale, an A of each linear's own, and ranks and alphas that differ."""
    values = recipe(room, megatron=LAYOUTS["tp2"])
    values["policy"]["megatron_cfg"]["peft"] |= {"type": "dora", "init_adapter": str(room / UNLIKE)}
    assert_equal_runs(run(tmp_path, values, 2), *trl_run(room, tmp_path / "trl", None, UNLIKE))


@pytest.mark.long
def test_ten_steps_of_a_new_adapter_equal_trl(room: Path, tmp_path: Path) -> None:
    # A step too small for fp32 shows where a drawn adapter starts.
    still = recipe(room, init=False, max_num_steps=1)
    still["policy"]["megatron_cfg"]["optimizer"] |= {"lr": 1e-30, "weight_decay": 0.0}
    start = run(tmp_path / "start", still, 1) / "step_1" / "hf_adapter"
    folder = run(tmp_path / "run", recipe(room, init=False, megatron=LAYOUTS["pp2"]), 2)
    assert_equal_runs(folder, *trl_run(room, tmp_path / "trl", start))


@pytest.mark.long
def test_a_resumed_run_of_the_whole_model_keeps_its_reference(room: Path, tmp_path: Path) -> None:
    values = recipe(room, init=False)
    values["policy"]["megatron_cfg"]["peft"]["enabled"] = False
    whole = run(tmp_path / "whole", values, 2)
    run(tmp_path / "halves", values | {"dpo": values["dpo"] | {"max_num_steps": 4}}, 2)
    resumed = run(tmp_path / "halves", values, 2)
    names = ("step", "loss", "grad_norm", "reward_margin", "accuracy")
    found, wanted = ([[line[name] for name in names] for line in metrics(folder)] for folder in (resumed, whole))
    assert found == wanted and wanted[-1][3] > 0


@pytest.mark.long
def test_precomputed_reference_is_the_same_run(room: Path, tmp_path: Path) -> None:
    plain = run(tmp_path / "plain", recipe(room), 1)
    ahead = run(tmp_path / "ahead", recipe(room, precompute_reference_logprobs=True), 1)
    losses = [[line["loss"] for line in metrics(folder)] for folder in (ahead, plain)]
    assert max(relative_differences(*losses)) < 1e-5


@pytest.mark.long
def test_resumed_run_is_the_same_run(room: Path, tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", recipe(room), 1)
    halves = recipe(room)
    run(tmp_path / "halves", halves | {"dpo": halves["dpo"] | {"max_num_steps": 4}}, 1)
    resumed = run(tmp_path / "halves", halves, 1)
    names = ("step", "loss", "grad_norm", "reward_margin", "accuracy")
    assert [[line[name] for name in names] for line in metrics(resumed)] == [
        [line[name] for name in names] for line in metrics(whole)
    ]
    found, wanted = (adapter_of(folder / f"step_{STEPS}") for folder in (resumed, whole))
    assert all(torch.equal(found[name], value) for name, value in wanted.items())


@pytest.mark.long
def test_accuracy_rises(room: Path, tmp_path: Path) -> None:
    # Longer answers are preferred: what a model can learn in a few steps, and a random one does not know.
    def rows(numbers: range) -> list[dict[str, str]]:
        return [{"prompt": f"say {n}:", "chosen": f"{n} it is", "rejected": f"no {n}"} for n in numbers]

    values = recipe(room, init=False, max_num_steps=25, val_at_start=True, val_at_end=True)
    values["data"] = {
        "train": {"data_path": str(write_lines(tmp_path / "train.jsonl", rows(range(100))))},
        "validation": {"data_path": str(write_lines(tmp_path / "validation.jsonl", rows(range(200, 232))))},
    }
    folder = run(tmp_path, values, 1)
    before, after = metrics(folder, "validation")
    assert before["accuracy"] < 0.6 and after["accuracy"] > 0.95
    assert after["rewards_chosen"] > after["rewards_rejected"] and after["loss"] < before["loss"]


@pytest.mark.long
def test_refusals(room: Path, tmp_path: Path) -> None:
    cases = {
        "'rejected' is missing": (recipe(room), {"prompt": "1+1=", "chosen": "2"}),
        "no row is left": (recipe(room), {"prompt": "1+1=", "chosen": "2", "rejected": "2"}),
    }
    for number, (text, (values, row)) in enumerate(cases.items()):
        folder = tmp_path / str(number)
        folder.mkdir()
        if row:
            values["data"]["train"]["data_path"] = str(write_lines(folder / "rows.jsonl", [row]))
        with pytest.raises(RanksFailed, match="error: ") as failure:
            run(folder, values, 1)
        assert text in str(failure.value) and "exitcode  : 2" in str(failure.value)
        assert not (folder / "run").exists()
