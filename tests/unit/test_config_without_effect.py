"""NeMo RL's keys that have no effect: accepted at their defaults, refused by name otherwise."""

from pathlib import Path
from typing import Any

import pytest

from megatron_lora.config import check_recipe
from megatron_lora.config.schema import ALGORITHMS, Recipe
from megatron_lora.config.schema_tree import walk_fields
from megatron_lora.config.unimplemented import ANY, KNOWN_PATHS, TABLE, SameAs
from megatron_lora.errors import UserError


def recipe(**keys: Any) -> dict[str, Any]:
    """A minimal recipe with further keys, dots written as double underscores."""
    content: dict[str, Any] = {"sft": {}, "policy": {"model_name": "m"}, "data": {"train": {"data_path": "rows.jsonl"}}}
    for name, value in keys.items():
        put(content, name.replace("__", "."), value)
    return content


def put(content: dict[str, Any], path: str, value: Any) -> None:
    *parents, last = path.split(".")
    for parent in parents:
        content = content.setdefault(parent, {})
    content[last] = value


def paths_with_values() -> list[tuple[str, Any]]:
    return [
        (f"{group.section}.{name}" if group.section else name, accepted)
        for group in TABLE
        for name, accepted in group.keys.items()
    ]


def test_the_table_and_the_schema_share_no_key():
    in_schema = {path for path, _ in walk_fields(Recipe)}
    assert in_schema.isdisjoint(KNOWN_PATHS)


def test_no_key_stands_twice_in_the_table():
    paths = [path for path, _ in paths_with_values()]
    assert len(paths) == len(set(paths))


@pytest.mark.parametrize(
    ("path", "accepted"), paths_with_values(), ids=lambda item: item if isinstance(item, str) else ""
)
def test_each_key_of_the_table(path: str, accepted: Any):
    free = accepted is ANY
    values = ["anything", 7, None] if free else list(accepted)
    for value in values:
        value = "bfloat16" if isinstance(value, SameAs) else value
        content = recipe(policy__precision="bfloat16", data__validation={"data_path": "v.jsonl"}, sft=None)
        first = path.split(".")[0]
        put(content, first if first in ALGORITHMS else "grpo", {})
        put(content, "policy.train_global_batch_size", 32)  # divides every algorithm's samples
        put(content, path.removesuffix(".*") + (".x" if path.endswith(".*") else ""), value)
        assert len(check_recipe(content).notices) == 1
    if not free:
        content = recipe(data__validation={"data_path": "v.jsonl"})
        put(content, path, "something else")
        with pytest.raises(UserError, match="something else"):
            check_recipe(content)


def test_the_notice_is_one_line_that_names_the_keys():
    content = recipe(cluster__gpus_per_node=8, cluster__num_nodes=2, logger__monitor_gpus=True, data_plane=None)
    (notice,) = check_recipe(content).notices
    assert notice == (
        "NeMo RL keys accepted without effect: cluster.{gpus_per_node, num_nodes}, logger.monitor_gpus, data_plane"
    )


@pytest.mark.parametrize(
    ("path", "value", "wanted"),
    [
        ("policy.megatron_cfg.mtp_num_layers", True, "mtp_num_layers=true is not implemented"),
        ("policy.megatron_cfg.pipeline_dtype", "float32", "pipeline_dtype='float32' is not implemented"),
        ("policy.dtensor_cfg.context_parallel_size", 2, "context parallelism needs policy.megatron_cfg"),
        ("reward_penalties.penalize_malformed_think_tag", True, "use env.reward_functions"),
        ("data_plane", {"enabeld": False}, "unknown key data_plane.enabeld; did you mean data_plane.enabled?"),
    ],
)
def test_refusals_name_key_value_and_remedy(path: str, value: Any, wanted: str):
    content = recipe()
    put(content, path, value)
    with pytest.raises(UserError) as error:
        check_recipe(content)
    assert wanted in str(error.value)


def test_numbers_written_as_text_are_numbers():
    assert check_recipe(recipe(policy__megatron_cfg__optimizer__optimizer_offload_fraction="0.0")).notices


def test_recipe_without_such_keys_has_no_notice():
    assert check_recipe(recipe()).notices == []


def test_loss_fn_has_the_keys_and_defaults_of_the_objective():
    from megatron_lora.config.schema_loss import OF_DISTILLATION
    from megatron_lora.objectives.grpo_config import GRPOConfig

    loss_fn = check_recipe(recipe(grpo={}, sft=None, policy__train_global_batch_size=512)).recipe.loss_fn.model_dump()
    assert loss_fn.pop("length_normalization") is True  # the objective's constant_length
    loss_fn = {key: value for key, value in loss_fn.items() if key not in OF_DISTILLATION}
    assert loss_fn == {key: value for key, value in vars(GRPOConfig()).items() if key != "constant_length"}


def test_reference_page_is_up_to_date():
    from megatron_lora.config.reference import build_reference

    page = Path(__file__).resolve().parents[2] / "docs/configuration.md"
    assert page.read_text() == build_reference(), (
        "run: python -m megatron_lora.config.reference > docs/configuration.md"
    )


def test_several_refusals_are_told_at_once():
    content = recipe(policy__draft={"enabled": True}, checkpointing__save_consolidated=True, sft={"sede": 1})
    with pytest.raises(UserError) as error:
        check_recipe(content)
    assert all(part in str(error.value) for part in ("draft.enabled=true", "save_consolidated=true", "sft.seed?"))


def test_the_schedulers_of_the_other_backend_are_named():
    content = recipe(
        policy__megatron_cfg={"enabled": True}, policy__scheduler=[{"name": "a.B"}], policy__optimizer=None
    )
    assert check_recipe(content).notices == ["NeMo RL keys accepted without effect: policy.scheduler"]
    with pytest.raises(UserError, match="scheduler needs optimizer"):
        check_recipe(recipe(policy__scheduler=[{"name": "a.B"}]))


def test_an_adapters_keys_in_full_fine_tuning_are_named():
    peft = {"enabled": False, "dim": 64, "alpha": 32, "modules_to_save": ["norm"]}  # alpha: as the default
    megatron = {"policy__megatron_cfg": {"enabled": True, "peft": peft}}
    loaded = check_recipe(recipe(**megatron))
    assert loaded.notices == ["NeMo RL keys accepted without effect: policy.megatron_cfg.peft.{dim, modules_to_save}"]
    assert check_recipe(loaded.resolved).notices == []
    other = {"lora_cfg": {"enabled": True, "dim": 64}}
    trained = {"policy__megatron_cfg": {"enabled": True, "peft": peft | {"enabled": True}}}
    assert check_recipe(recipe(**trained, policy__dtensor_cfg=other)).notices == []
    [notice] = check_recipe(recipe(policy__dtensor_cfg={"lora_cfg": {"dim": 64}})).notices
    assert notice.endswith("policy.dtensor_cfg.lora_cfg.dim")


def test_keys_that_this_run_does_not_read_are_named():
    content = recipe(
        sft={"val_micro_batch_size": 4},
        data__max_input_seq_length=8,
        data__add_generation_prompt=True,
        data__validation={"data_path": "v", "seed": 1, "split_validation_size": 0.1},
    )
    (notice,) = check_recipe(content).notices
    for key in (
        "sft.val_micro_batch_size",
        "{add_generation_prompt, max_input_seq_length}",
        "validation.{split_validation_size, seed}",
    ):
        assert key in notice


def test_contradictions_that_would_change_nothing_or_the_wrong_thing():
    one_update = {"grpo": {}, "sft": None, "policy__train_global_batch_size": 512}
    on_policy = {"loss_fn": {"force_on_policy_ratio": True}}
    assert check_recipe(recipe(**one_update, **on_policy)).recipe.loss_fn.force_on_policy_ratio
    with pytest.raises(UserError, match="makes 2 of a step's 512 samples; use 512"):
        check_recipe(recipe(**one_update | {"policy__train_global_batch_size": 256}, **on_policy))
    clips = {"grpo": {"advantage_clip_low": 1, "advantage_clip_high": -1}}
    with pytest.raises(UserError, match="advantage_clip_low=1.0 is above advantage_clip_high=-1.0"):
        check_recipe(recipe(**one_update | clips))


def test_an_estimator_of_advantages_says_which_keys_its_name_overrules():
    grpo = {"sft": None, "policy__train_global_batch_size": 512}
    nemo_rl = {"normalize_rewards": True, "use_leave_one_out_baseline": False, "minus_baseline": True}
    loaded = check_recipe(recipe(**grpo, grpo={"adv_estimator": {"name": "reinforce_plus_plus", **nemo_rl}}))
    assert loaded.notices == ["NeMo RL keys accepted without effect: grpo.adv_estimator.normalize_rewards"]
    loaded = check_recipe(recipe(**grpo, grpo={"adv_estimator": {"name": "rloo", **nemo_rl}}))
    assert "{normalize_rewards, use_leave_one_out_baseline}" in loaded.notices[0]
    with pytest.raises(UserError, match="Dr. GRPO.* set loss_fn.length_normalization=false"):
        check_recipe(recipe(**grpo, grpo={"adv_estimator": {"name": "dr_grpo"}}))
    halves = {"grpo": {"adv_estimator": {"name": "dr_grpo"}}, "loss_fn": {"length_normalization": False}}
    again = check_recipe(check_recipe(recipe(**grpo, **halves)).resolved)
    assert not again.notices and again.recipe.grpo is not None and not again.recipe.grpo.adv_estimator.normalize_rewards


def test_validation_repeats_and_training_does_not():
    grpo = {"grpo": {}, "sft": None, "policy__train_global_batch_size": 512}
    repeated = {"data__validation": {"data_path": "v", "repeat": 16}}
    validation = check_recipe(recipe(**grpo, **repeated)).recipe.data.validation
    assert validation is not None and validation.repeat == 16
    assert "data.validation.repeat" in check_recipe(recipe(**repeated)).notices[0]
    with pytest.raises(UserError, match="training repeats by max_num_epochs"):
        check_recipe(recipe(**grpo, data__train={"data_path": "x", "repeat": 2}))


def test_what_does_not_run_as_written_is_said():
    grpo = {"sft": None, "policy__train_global_batch_size": 512}
    controller = {"async_rl": {"sampler": {"name": "windowed"}}}
    loaded = check_recipe(recipe(**grpo, grpo={}, **controller))
    assert len(loaded.notices) == 2 and "set grpo.async_grpo.enabled=true in its place" in loaded.notices[1]
    assert len(check_recipe(recipe(**grpo, grpo={"async_grpo": {"enabled": True}}, **controller)).notices) == 1
    assert len(check_recipe(recipe(**grpo, grpo={"async_grpo": None}, async_rl={"enabled": False})).notices) == 1


@pytest.mark.parametrize(
    ("grpo", "message"),
    [
        ({"stop_at_validation_metric": "accuracy"}, "belong together"),
        ({"stop_at_validation_threshold": 0.5}, "belong together"),
        ({"stop_at_validation_metric": "pass_k", "stop_at_validation_threshold": 1}, "set val_num_generations_per_"),
    ],
)
def test_keys_that_end_a_run_belong_together(grpo: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        check_recipe(recipe(grpo=grpo, sft=None, policy__train_global_batch_size=512))


def test_environment_variables_of_the_backend_that_trains():
    content = recipe(
        policy__megatron_cfg={"enabled": True, "env_vars": {"A": 1, "B": True}},
        policy__dtensor_cfg={"env_vars": {"C": "x"}},
        policy__generation={"vllm_cfg": {"env_vars": {"A": "2", "D": "y"}}},
    )
    assert check_recipe(content).recipe.policy.env_vars == {"A": "1", "B": "True", "D": "y"}


def test_nemo_rls_never():
    assert check_recipe(recipe(sft={"val_period": -1})).recipe.sft.val_period == 0  # type: ignore[union-attr]
