"""Which changes of a recipe are told when a run goes on, in which group."""

from pathlib import Path

import pytest

from megatron_lora.config.loader import check_recipe, dump_recipe
from megatron_lora.config.schema import Recipe
from megatron_lora.errors import UserError
from megatron_lora.trainers.changed_keys import ROW_KEYS, algorithm_of, changed_keys
from megatron_lora.trainers.metric_names import check_metric_name, metric_names, validation_notices

SFT = {
    "sft": {"max_num_steps": 10},
    "policy": {"model_name": "base", "megatron_cfg": {"enabled": True, "peft": {"enabled": True}}},
    "data": {"train": {"data_path": "rows.jsonl"}},
}


def recipe(content: dict = SFT, **values: object) -> Recipe:
    """`SFT` with values at dotted paths, `__` between their parts."""
    merged: dict = {key: dict(value) for key, value in content.items()}
    for path, value in values.items():
        *parents, name = path.split("__")
        section = merged
        for parent in parents:
            section[parent] = dict(section.get(parent, {}))
            section = section[parent]
        section[name] = value
    return check_recipe(merged).recipe


def told(folder: Path, now: Recipe, compared: tuple[str, ...] = ()) -> str:
    (folder / "config.yaml").write_text(dump_recipe(recipe()))
    found = changed_keys(folder / "config.yaml", now, compared)
    assert found is not None
    return found.describe(6)


def test_nothing_changed(tmp_path: Path):
    assert told(tmp_path, recipe()) == ""
    assert told(tmp_path, recipe(checkpointing__checkpoint_dir="moved", policy__dtensor_cfg__compile=True)) == ""


def test_one_line_with_two_groups(tmp_path: Path):
    now = recipe(
        policy__megatron_cfg={
            "enabled": True,
            "peft": {"enabled": True, "dropout": 0.1},
            "tensor_model_parallel_size": 2,
            "optimizer": {"lr": 0.5},
        },
        data__validation={"data_path": "more.jsonl"},
    )
    line = told(tmp_path, now)
    harmless, changing = line.split("; changing the run: ")
    assert harmless.startswith("keys changed since step 6: without influence on the numbers: data.validation null -> ")
    assert "policy.megatron_cfg.tensor_model_parallel_size 1 -> 2" in harmless
    assert changing == "policy.megatron_cfg.optimizer.lr 5e-06 -> 0.5, policy.megatron_cfg.peft.dropout 0.0 -> 0.1"


def test_the_way_to_the_experts_is_harmless_and_their_loss_is_not(tmp_path: Path):
    megatron = {"enabled": True, "peft": {"enabled": True}, "moe_token_dispatcher_type": "allgather"}
    megatron |= {"moe_grouped_gemm": False, "moe_per_layer_logging": True, "moe_router_load_balancing_type": "aux_loss"}
    line = told(tmp_path, recipe(policy__megatron_cfg=megatron | {"moe_router_dtype": "fp64"}))
    harmless, changing = line.split("; changing the run: ")
    assert all(key in harmless for key in ("moe_token_dispatcher_type", "moe_grouped_gemm", "moe_per_layer_logging"))
    assert "moe_router_load_balancing_type none -> aux_loss" in changing and "moe_router_dtype fp32 -> fp64" in changing


def test_what_was_compared_itself_is_harmless(tmp_path: Path):
    now = recipe(data__train={"data_path": "moved.jsonl"})
    assert "changing the run: data.train.data_path rows.jsonl -> moved.jsonl" in told(tmp_path, now)
    assert "without influence on the numbers: data.train.data_path" in told(tmp_path, now, ROW_KEYS)


def test_a_config_that_cannot_be_read(tmp_path: Path):
    assert changed_keys(tmp_path / "config.yaml", recipe()) is None and algorithm_of(tmp_path / "config.yaml") is None
    (tmp_path / "config.yaml").write_text("policy: [")
    assert changed_keys(tmp_path / "config.yaml", recipe()) is None


GRPO = {
    "grpo": {"num_prompts_per_step": 8, "num_generations_per_prompt": 4},
    "env": {"reward_functions": [{"kind": "length", "name": "short", "max_tokens": 4}]},
    "policy": {**SFT["policy"], "train_global_batch_size": 32},
    "data": SFT["data"],
}


@pytest.mark.parametrize(
    ("content", "name", "said"),
    [
        (
            SFT,
            "val:los",
            r"no validation line of SFT has 'los'; did you mean val:loss\? It has loss, num_target_tokens",
        ),
        (SFT, "val:grad_norm", r"did you mean train:grad_norm\?"),
        (SFT, "val:qqqq", "name one of them, or null"),
        (SFT, "train:accuracy", "no train line of SFT has 'accuracy'"),
        (GRPO, "val:reward_shrt", r"did you mean val:reward_short\?"),
    ],
)
def test_a_metric_that_is_not_logged_is_refused(content: dict, name: str, said: str):
    with pytest.raises(UserError, match=said):
        check_metric_name(recipe(content, checkpointing__metric_name=name), has_validation=True)


def test_metrics_that_are_logged_pass():
    for content, name in (
        (SFT, "val:val_loss"),
        (SFT, "train:loss"),
        (GRPO, "val:accuracy"),
        (GRPO, "val:reward_short"),
    ):
        assert check_metric_name(recipe(content, checkpointing__metric_name=name), has_validation=True) == []
    assert check_metric_name(recipe(checkpointing__metric_name=None), has_validation=False) == []
    [notice] = check_metric_name(recipe(), has_validation=False)
    assert "no validation: the latest checkpoints are kept" in notice
    assert (
        "no validation" in check_metric_name(recipe(sft={"val_period": 0, "val_at_end": False}), has_validation=True)[0]
    )
    assert "kl" in metric_names(recipe(GRPO), "train") and "kl" not in metric_names(recipe(GRPO), "validation")


def test_validation_that_is_asked_for_without_rows_is_told():
    asked = {"val_period": 5, "val_at_start": False, "val_at_end": True}
    [notice] = validation_notices(recipe(sft=asked), has_validation=False)
    assert notice.startswith("sft.val_period=5 and sft.val_at_end=true, but") and "data.validation" in notice
    assert validation_notices(recipe(sft=asked), has_validation=True) == []
    assert validation_notices(recipe(sft={"val_period": 0, "val_at_end": False}), has_validation=False) == []
    [notice] = validation_notices(recipe(GRPO, grpo=GRPO["grpo"] | asked), has_validation=False)
    assert "answers of training steps are shown" in notice
